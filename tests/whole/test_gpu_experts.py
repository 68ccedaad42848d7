"""On a real GPU: experts that kernels look up, bring and multiply give the tokens of those that the host serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import IDS, generated

from airllm_nb import AutoModel

pytestmark = pytest.mark.gpu


def opened(folder: Path, stores: Path, vram: int | str, **options: Any) -> Any:
    return AutoModel.from_pretrained(
        folder, dtype="float32", max_seq_len=64, layer_shards_saving_path=stores, vram_budget=vram, **options
    )


def with_slots(folder: Path, stores: Path, **options: Any) -> Any:
    """With slots for most experts, but not for all."""
    with opened(folder, stores, "400MiB", **options) as model:
        plan = model.plan
    dense = sum(unit.nbytes + 4096 for unit in plan.units if not unit.experts)
    experts = sum(unit.nbytes for unit in plan.units if unit.experts)
    return opened(folder, stores, plan.needs.total + dense + int(experts * 0.85), **options)


@pytest.mark.parametrize("compression", [None, "4bit", "8bit"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_tokens_are_those_of_the_exact_way(kind: str, compression: str | None, tmp_path: Path) -> None:
    folder, ids, length = tmp_path / "model", IDS.cuda(), {"max_new_tokens": 24, "min_new_tokens": 24}
    tiny_models.save_tiny(kind, folder)
    with opened(folder, tmp_path, "400MiB", compression=compression, exact=True) as model:
        assert model.trace.hit_rate is None, "all are there"
        expected = generated(model, ids, **length)
    for exact in (True, False):
        with with_slots(folder, tmp_path, compression=compression, exact=exact) as model:
            assert model.plan.slots_bytes > 0
            assert torch.equal(generated(model, ids, **length), expected)
            assert 0 < model.trace.hit_rate < 1
            # No byte that was not missing.
            size = {unit.name: unit.bank.expert_bytes for unit in model._prepared.units if unit.experts}
            missed = sum((sum(each.asked) - each.hits) * size[name] for name, each in model.trace.experts.items())
            assert model.trace.totals["copy"].nbytes >= missed > 0
