"""Experts move when they are asked for: the words are those of the resident model, the bytes no more than needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IDS, MACHINE, generated, resident, run, streamed

from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import StreamedModel, open_model
from airllm_nb.errors import AirLLMError
from airllm_nb.intake import planning, prepare
from airllm_nb.model.device import Budgets
from airllm_nb.plan.experts import SLACK, staging
from airllm_nb.stream.ring import align

pytestmark = pytest.mark.usefixtures("one_thread")
# With biases, transposed, with shared experts, hybrids.
KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba", "qwen3_next")


def with_slots(folder: Path, slots: int, **options: Any) -> StreamedModel:
    """Everything but experts on the device, and so many slots in each layer."""
    ample = {"vram_budget": "1GiB", "ram_budget": "1GiB", "max_seq_len": 32, "dtype": "float32"}
    prepared = prepare.prepare(folder, LoadOptions.create(**(ample | options)))
    banks = [unit.experts for unit in prepared.sizes if unit.experts]
    dense = sum(align(unit.nbytes) for unit in prepared.sizes if not unit.experts)
    needs = planning.needs(prepared, prepared.planned, prepared.planned.sizes[0]).total
    room = sum(slots * bank.nbytes + SLACK for bank in banks)
    vram = needs + dense + max(staging(banks, 0)[1] + room, room * 4 // 3)
    model = StreamedModel(prepared, MACHINE, Budgets(vram, 1 << 30))
    assert any(model.plan.slots), "there are slots"
    assert "gpu" in model.plan.tiers
    return model


def misses(model: StreamedModel) -> int:
    """Bytes of the experts that were asked for and not there."""
    size = {unit.name: unit.bank.expert_bytes for unit in model._prepared.units if unit.experts}
    return sum((sum(each.asked) - each.hits) * size[name] for name, each in model.trace.experts.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_slots_says_the_same_and_moves_what_it_misses(kind: str, tiny: Callable[[str], Path]) -> None:
    tokens, logits = run(resident(tiny(kind)))
    with with_slots(tiny(kind), 2, prefetching=False) as model:
        ours, our_logits = run(model)
        assert torch.equal(ours, tokens)
        assert torch.equal(our_logits, logits)
        assert 0 < model.trace.hit_rate < 1  # type: ignore[operator]
        assert model.trace.totals["copy"].nbytes == misses(model) > 0
        experts = model.trace.summary()["experts"]
        assert experts["moved"] == pytest.approx(experts["asked"] * (1 - experts["hit_rate"]))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"prefill_chunk_size": 5}],
    ids=["beams", "sequences", "chunks"],
)
def test_so_it_does_in_every_way_of_generating(kind: str, options: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    expected = generated(resident(tiny(kind)), IDS, **options)
    with with_slots(tiny(kind), 2, batch_size=3) as model:
        assert torch.equal(generated(model, IDS, **options), expected)
    with streamed(tiny(kind), batch_size=3) as model:
        assert torch.equal(generated(model, IDS, **options), expected)


def test_a_batch_of_prompts(tiny: Callable[[str], Path]) -> None:
    ids = torch.randint(3, 250, (5, 9), generator=torch.Generator().manual_seed(3))
    expected = generated(resident(tiny("qwen3_moe")), ids)
    with with_slots(tiny("qwen3_moe"), 2, batch_size=5) as model:
        assert torch.equal(generated(model, ids), expected)
        assert model.trace.hit_rate, "slots that are free are filled by a batch too"


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_experts_that_need_a_cast(stored: str, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    for kind in ("mixtral", "gpt_oss"):
        native = resident(tiny(kind), getattr(torch, stored))
        folder = tmp_path / kind
        native.save_pretrained(folder)
        expected = run(resident(folder))
        for opened in (with_slots(folder, 2), streamed(folder)):
            with opened as model:
                tokens, logits = run(model)
                assert torch.equal(tokens, expected[0])
                assert torch.equal(logits, expected[1])


def test_where_compute_is_in_ram_only_experts_that_are_asked_for_are_read(tiny: Callable[[str], Path]) -> None:
    tokens, logits = run(resident(tiny("qwen3_moe")))
    with open_model(tiny("qwen3_moe"), LoadOptions.create(device="cpu", ram_budget="600KiB", max_seq_len=32)) as model:
        assert "disk" in model.plan.tiers
        ours, our_logits = run(model)
        assert torch.equal(ours, tokens)
        assert torch.equal(our_logits, logits)
        banks = [unit for unit in model._prepared.units if unit.experts]
        read = sum(model.trace.by_unit[unit.name]["read"] > 0 for unit in banks)
        assert read == len(banks)
        model(IDS[:, :1])
        assert model.trace.totals["read"].nbytes == misses(model)
        assert "cached" in str(model.plan)


def test_a_stopped_or_failed_read_loses_nothing(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(resident(tiny("mixtral")))
    with with_slots(tiny("mixtral"), 2) as model:
        reader = model._executor._banked._reader
        submit, count = reader.submit, 0

        def failing(pieces: Any, into: Any, done: Any, before: Any = None) -> None:
            nonlocal count
            count += 1
            if count == 3:
                done(AirLLMError("the disk is gone"))
                return
            submit(pieces, into, done, before)

        monkeypatch.setattr(reader, "submit", failing)
        with pytest.raises(AirLLMError, match="the disk is gone"):
            model(IDS)
        for _ in range(2):
            tokens, logits = run(model)
            assert torch.equal(tokens, expected[0])
            assert torch.equal(logits, expected[1])


def test_closed_it_is_as_it_was(tiny: Callable[[str], Path]) -> None:
    model = with_slots(tiny("mixtral"), 2)
    experts = [unit.module for unit in model._prepared.units if unit.experts]
    assert all("forward" in vars(module) for module in experts)
    model.close()
    assert not any("forward" in vars(module) for module in experts)
    assert {module.num_experts for module in experts} == {4}
    model.close()
