"""On a real GPU: a dozen families in half precision, streamed equals resident; experts in 4-bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from airllm_nb import AutoModel
from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import StreamedModel
from airllm_nb.engine.machine import measure
from airllm_nb.intake import planning, prepare
from airllm_nb.model.device import Budgets
from airllm_nb.plan.placement import window
from airllm_nb.stream.ring import align, host_room

pytestmark = pytest.mark.gpu

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3_moe", "qwen3_next", "gemma2", "gemma3_text", "phi3", "glm4",
    "deepseek_v3", "gpt_oss", "olmo2", "cohere2", "falcon", "bloom", "mamba2", "jamba",
)  # fmt: skip
MiB = 1 << 20


def streamed(folder: Path, dtype: str, **options: Any) -> StreamedModel:
    """With room for three units on the GPU, and less RAM than weights."""
    prepared = prepare.prepare(
        folder, LoadOptions.create(vram_budget="1GiB", ram_budget="1GiB", dtype=dtype, **{"max_seq_len": 32} | options)
    )
    units = [align(unit.nbytes) for unit in prepared.sizes if unit.kind != "embedding"]
    needs = planning.needs(prepared, prepared.planned, prepared.planned.sizes[0]).total
    vram = needs + window(units)
    ram = window([host_room(size) for size in units]) + max(units)
    return StreamedModel(prepared, measure(prepared), Budgets(vram, ram))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_resident(family: str, dtype: str, tmp_path: Path) -> None:
    tiny_models.save_tiny(family, tmp_path)
    ids = tiny_models.IDS.cuda()
    native: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).cuda().eval()
    with torch.inference_mode():
        logits, tokens = native(ids).logits, tiny_models.generated(native, ids)
    with streamed(tmp_path, dtype) as model:
        assert model.device.type == "cuda" and str(model.dtype) == f"torch.{dtype}"
        assert model.plan.streamed_bytes > 0
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(tiny_models.generated(model, ids), tokens)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_mixture_of_experts_in_4bit(family: str, tmp_path: Path) -> None:
    """What is compressed is dequantised to what the resident model computes on, whatever streams."""
    source, ids = tmp_path / "source", tiny_models.IDS.cuda()
    tiny_models.save_tiny(family, source)
    with torch.inference_mode():
        exact = tiny_models.resident(source).cuda()(ids).logits.float()
    found = []
    for name, vram in (("resident", "2GiB"), ("streamed", "200MiB")):
        how = {"compression": "4bit", "layer_shards_saving_path": tmp_path / name, "max_seq_len": 32}
        with AutoModel.from_pretrained(source, vram_budget=vram, **how) as model:
            found.append((model(ids).logits.float(), tiny_models.generated(model, ids)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert torch.nn.functional.cosine_similarity(found[0][0].flatten(), exact.flatten(), dim=0) > 0.9
