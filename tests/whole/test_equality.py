"""Streamed equals resident: the same tokens and the same logits, wherever the weights are and however far ahead."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from airllm_nb.config import LoadOptions
from airllm_nb.engine import facade
from airllm_nb.engine.facade import StreamedModel, open_model
from airllm_nb.errors import BudgetError
from airllm_nb.intake import planning
from airllm_nb.model.device import Budgets
from airllm_nb.plan.residency import Machine, ResidencyPlan
from airllm_nb.plan.work import SMALLEST_CHUNK
from airllm_nb.stream.ring import LOCKED, PAGE_CACHE, PAGEABLE, host_room

pytestmark = pytest.mark.usefixtures("one_thread")

ROOM = {"max_seq_len": 256, "batch_size": 5}
DEPTHS = [0, 1, 2, 3, 4, None]
MIXES = ["ram", "ram|disk", "disk", "gpu", "gpu|ram", "ram, device", "gpu|disk", "ram|disk, device", "gpu|ram|disk"]
PROMPTS = [
    "What is the capital of France?",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of motion are",
    "1, 2, 3, 5, 8,",
]


@functools.cache
def budgets_for(folder: Path, mix: str, *, ram: str | None = None, **options: Any) -> dict[str, int]:
    """Budgets that give the tiers of ``mix``, each as full as possible: the best of a grid of plans."""
    with open_model(folder, LoadOptions.create(**ROOM, **options)) as model:
        plan, prepared = model.plan, model._prepared
    least = planning.needs(prepared, prepared.planned, SMALLEST_CHUNK).total
    span = plan.needs.total - least
    total, has_device = sum(host_room(unit.nbytes) for unit in plan.units), "gpu" in mix or "device" in mix
    machine = dataclasses.replace(plan.machine, has_device=has_device, ram=ram or plan.machine.ram)
    best: tuple[int, dict[str, int]] = (0, {})
    # What work needs does not depend on budgets, and takes most of the time.
    needs = functools.cache(functools.partial(planning.needs, prepared, prepared.planned))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "needs", lambda _, work, tokens: needs(tokens))
        for vram, host in itertools.product(range(0, 33) if has_device else [0], range(0, 48, 2)):
            budgets = {"vram_budget": least + (span + total) * vram // 32, "ram_budget": total * host // 32}
            try:
                tiers = placed(planning.plan(prepared, machine, Budgets(*budgets.values()), prepared.planned)[0])
            except BudgetError:
                continue
            if set(tiers) == wanted(mix) and min(tiers.values()) > best[0]:
                best = (min(tiers.values()), budgets if has_device else {"ram_budget": budgets["ram_budget"]})
    assert best[0], f"no budget gives {mix}"
    return best[1]


def open_in(folder: Path, mix: str, depth: int | None = None, **options: Any) -> StreamedModel:
    """Open ``folder`` with the tiers of ``mix``, for five sequences of 256 tokens."""
    prefetching = True if depth is None else depth
    budgets = budgets_for(folder, mix, **options)
    return open_model(folder, LoadOptions.create(**ROOM, prefetching=prefetching, **budgets, **options))


def wanted(mix: str) -> set[str]:
    return set(mix.partition(",")[0].split("|"))


def placed(plan: ResidencyPlan) -> Counter[str]:
    """How many units are in each tier, tables aside: those are never swept."""
    units = zip(plan.units, plan.tiers, strict=True)
    return Counter(tier for unit, tier in units if unit.kind != "embedding")


def resident_model(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def greedy(model: Any, ids: torch.Tensor, tokens: int = 16) -> list[int]:
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return output[0].tolist()


# ---- the real one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2_ids(smollm2_folder: Path) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]


@pytest.fixture(scope="session")
def smollm2_batch(smollm2_folder: Path) -> dict[str, torch.Tensor]:
    """The five prompts at once, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder, padding_side="left")
    encoded = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@pytest.fixture(scope="session")
def smollm2_reference(
    smollm2_folder: Path, smollm2_ids: list[torch.Tensor], smollm2_batch: dict[str, torch.Tensor]
) -> dict[str, Any]:
    model = resident_model(smollm2_folder, "bfloat16")
    torch.manual_seed(11)
    return {
        "sampled": model.generate(smollm2_ids[1], max_new_tokens=16, do_sample=True, temperature=0.8, top_k=50),
        "beams": model.generate(smollm2_ids[0], max_new_tokens=12, num_beams=3, do_sample=False),
        "greedy": [greedy(model, ids) for ids in smollm2_ids],
        "batch": model.generate(**smollm2_batch, max_new_tokens=24, do_sample=False),
    }


@pytest.mark.slow
def test_smollm2_says_the_same_for_five_prompts(
    smollm2_folder: Path, smollm2_ids: list[torch.Tensor], smollm2_reference: dict[str, Any]
) -> None:
    with open_in(smollm2_folder, "gpu|ram|disk") as model:
        assert [greedy(model, ids) for ids in smollm2_ids] == smollm2_reference["greedy"]


@pytest.mark.slow
@pytest.mark.parametrize(("mix", "depth"), [("ram|disk, device", 2), ("gpu|ram|disk", None)])
def test_smollm2_says_the_same_for_a_batch(
    smollm2_folder: Path,
    smollm2_batch: dict[str, torch.Tensor],
    smollm2_reference: dict[str, Any],
    mix: str,
    depth: int | None,
) -> None:
    with open_in(smollm2_folder, mix, depth) as model:
        assert set(placed(model.plan)) == wanted(mix)
        found = model.generate(**smollm2_batch, max_new_tokens=24, do_sample=False)
        assert found.equal(smollm2_reference["batch"])


@pytest.mark.slow
def test_smollm2_beams_and_sampling_are_the_same(
    smollm2_folder: Path, smollm2_ids: list[torch.Tensor], smollm2_reference: dict[str, Any]
) -> None:
    with open_in(smollm2_folder, "gpu|ram|disk") as model:
        torch.manual_seed(11)
        sampled = model.generate(smollm2_ids[1], max_new_tokens=16, do_sample=True, temperature=0.8, top_k=50)
        assert sampled.equal(smollm2_reference["sampled"])
        beams = model.generate(smollm2_ids[0], max_new_tokens=12, num_beams=3, do_sample=False)
        assert beams.equal(smollm2_reference["beams"])


@pytest.mark.slow
def test_smollm2_logits_in_float32_are_equal(smollm2_folder: Path, smollm2_ids: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        expected = resident_model(smollm2_folder, "float32")(smollm2_ids[1]).logits
    with open_in(smollm2_folder, "gpu|ram|disk", dtype="float32") as model:
        torch.testing.assert_close(model(smollm2_ids[1]).logits, expected, atol=1e-5, rtol=0)


# ---- the full cross product, on a small random model -----------------------------------------------------------------


@pytest.fixture(scope="module", params=["untied", "tied"])
def tiny(request: pytest.FixtureRequest, tiny_llama: Callable[..., Path]) -> Iterator[Path]:
    """A folder; while it is used, opening it measures nothing."""

    def machine(prepared: planning.Prepared) -> Machine:
        return Machine(prepared.options.vram_budget is not None, disk=1e9, link=1e10, memory=1e10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facade, "measure", machine)
        yield tiny_llama(tied=request.param == "tied", num_hidden_layers=10, shards=2)


@pytest.fixture(scope="module")
def tiny_reference(tiny: Path) -> dict[str, Any]:
    model = resident_model(tiny, "float32")
    ids = torch.tensor([[1, 70, 90, 33, 60, 71, 72]])
    torch.manual_seed(3)
    sampled = model.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.3, top_p=0.95)
    beams = model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)
    with torch.inference_mode():
        logits = model(ids).logits
    return {"ids": ids, "greedy": greedy(model, ids, 24), "sampled": sampled, "beams": beams, "logits": logits}


# Every mix at two depths, and every depth in three mixes: that depths do not matter is a property of the prefetcher.
WITH_DEPTHS = [
    *(("untied", mix, DEPTHS[(index + shift) % len(DEPTHS)]) for index, mix in enumerate(MIXES) for shift in (0, 3)),
    *(("tied", mix, None) for mix in MIXES),
]


@pytest.mark.parametrize(("tiny", "mix", "depth"), WITH_DEPTHS, indirect=["tiny"])
def test_a_tiny_model_says_the_same_in_every_mix_and_at_every_depth(
    tiny: Path, tiny_reference: dict[str, Any], mix: str, depth: int | None
) -> None:
    ids = tiny_reference["ids"]
    with open_in(tiny, mix, depth, dtype="float32") as model:
        assert set(placed(model.plan)) == wanted(mix)
        assert greedy(model, ids, 12) == tiny_reference["greedy"][: ids.shape[-1] + 12]
        torch.testing.assert_close(model(ids).logits, tiny_reference["logits"], atol=1e-5, rtol=0)
        assert model._executor is not None
        assert model._executor.resets == 0


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", [PAGE_CACHE, LOCKED, PAGEABLE])
@pytest.mark.parametrize("mix", ["ram, device", "gpu|ram", "ram|disk, device", "gpu|ram|disk"])
@pytest.mark.parametrize("tiny", ["untied"], indirect=True)
def test_it_is_the_same_however_weights_lie_in_ram_and_are_read(
    tiny: Path, tiny_reference: dict[str, Any], mix: str, kind: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(True, disk=1e9, link=1e10, memory=1e10, ram=kind, direct=direct)
    budgets = budgets_for(tiny, mix, dtype="float32", ram=kind)
    monkeypatch.setattr(facade, "measure", lambda prepared: machine)
    with open_model(tiny, LoadOptions.create(**ROOM, **budgets, dtype="float32")) as model:
        assert set(placed(model.plan)) == wanted(mix)
        for _ in range(2):
            assert (
                greedy(model, tiny_reference["ids"], 6) == tiny_reference["greedy"][: len(tiny_reference["ids"][0]) + 6]
            )
        assert model._executor is not None
        assert model._executor.resets == 0


@pytest.mark.parametrize("mix", MIXES)
def test_a_tiny_model_samples_and_searches_the_same_in_every_mix(
    tiny: Path, tiny_reference: dict[str, Any], mix: str
) -> None:
    ids = tiny_reference["ids"]
    with open_in(tiny, mix, dtype="float32") as model:
        torch.manual_seed(3)
        sampled = model.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.3, top_p=0.95)
        assert sampled.equal(tiny_reference["sampled"])
        assert model.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False).equal(tiny_reference["beams"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("mix", ["ram", "disk", "gpu|ram|disk"])
def test_a_cast_gives_what_a_resident_cast_gives(
    tiny_llama: Callable[..., Path], stored: str, dtype: str, mix: str
) -> None:
    folder, ids = tiny_llama(dtype=stored, num_hidden_layers=8), torch.tensor([[1, 70, 90, 33]])
    with torch.inference_mode():
        expected = resident_model(folder, dtype)(ids).logits
    with open_in(folder, mix, dtype=dtype) as model:
        assert model(ids).logits.dtype == getattr(torch, dtype)
        torch.testing.assert_close(model(ids).logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_without_a_dtype_in_the_config_the_weights_decide(tiny_llama: Callable[..., Path], stored: str) -> None:
    folder = tiny_llama(dtype=stored)
    assert "dtype" not in json.loads((folder / "config.json").read_text())
    with open_model(folder) as model:
        assert model.dtype == resident_model(folder, "auto").dtype == getattr(torch, stored)
