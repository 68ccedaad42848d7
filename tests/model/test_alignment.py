"""Weights begin as far into a cache line as a resident model's, wherever they lie: a matrix library may choose its
kernel by that, and kernels round differently. Equal logits on one processor would not be equal on another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import IDS, resident, streamed

from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import StreamedModel, open_model
from airllm_nb.intake import prepare
from airllm_nb.model import skeleton
from airllm_nb.model.units import experts_of
from airllm_nb.plan.residency import Machine
from airllm_nb.stream.ring import CACHE_LINE, LOCKED, PAGE_CACHE, PAGEABLE
from airllm_nb.tensors.index import TensorInfo

pytestmark = pytest.mark.usefixtures("one_thread")

# Tied, fused, of experts that transformers merges, with weights of modules that are no linear layers.
KINDS = ["llama", "gpt2", "gemma2", "dbrx", "qwen3_moe", "mamba", "deepseek_v3", "qwen3_next"]


def place(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() % CACHE_LINE


def places(model: StreamedModel) -> dict[str, int]:
    """Where each weight begins while it is computed with; tables, whose rows are gathered, aside."""
    found: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, *_: Any) -> None:
            if not isinstance(module, torch.nn.Embedding):
                bound = module._parameters.items()
                found.update({f"{name}.{key}": place(value) for key, value in bound if value is not None})

        return hook

    # A unit binds what is below its module: what the modules below see of it is seen after that. Experts are bound
    # within the forward, for native code.
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in model.native.named_modules()
             if not experts_of(module)]  # fmt: skip
    for name, layer in model._executor._banked.layers.items() if model._executor._banked else ():
        layer.rounds.native = functools.partial(noted, layer.rounds.native, note(name))
    with torch.inference_mode():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return found


def noted(native: Callable[..., Any], note: Callable[..., None], module: torch.nn.Module, *args: Any) -> Any:
    note(module)
    return native(module, *args)


def check(model: StreamedModel, native: Any) -> None:
    # A tied weight is known by both names here.
    expected = {name: place(weight) for name, weight in native.named_parameters(remove_duplicate=False)}
    found = places(model)
    assert len(found) > 20
    wrong = {name: (where, expected[name]) for name, where in found.items() if where != expected[name]}
    assert not wrong


@pytest.mark.parametrize("limit", [skeleton.UNIT_BYTES, 12_000])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_weights_lie_as_resident_ones(
    kind: str, limit: int, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton.cut_units, "__defaults__", (limit,))
    native = resident(tiny(kind))
    with streamed(tiny(kind)) as model:
        check(model, native)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", ["600KB", "1GiB"])
def test_so_they_do_where_compute_is_in_host_memory(budget: str, dtype: str, tiny: Callable[[str], Path]) -> None:
    options = LoadOptions.create(ram_budget=budget, max_seq_len=16, dtype=dtype)
    with open_model(tiny("llama"), options) as model:
        assert ("disk" in model.plan.tiers) is (budget == "600KB")
        check(model, resident(tiny("llama"), getattr(torch, dtype)))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("ram", [PAGE_CACHE, LOCKED, PAGEABLE])
def test_so_they_do_however_they_lie_in_ram_and_are_read(
    ram: str, direct: bool, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(True, disk=1e9, link=1e10, memory=1e10, ram=ram, direct=direct)
    monkeypatch.setattr(tiny_models, "MACHINE", machine)
    with streamed(tiny("llama")) as model:
        assert {"ram", "disk"} <= set(model.plan.tiers)
        check(model, resident(tiny("llama")))


def test_experts_that_are_stored_as_one_lie_so_too(tmp_path: Path) -> None:
    native = tiny_models.save_tiny("qwen3_moe", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    native.save_pretrained(tmp_path, save_original_format=False)
    with streamed(tmp_path) as model:
        check(model, resident(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_device_every_weight_begins_where_its_kernels_want_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen bytes, for kernels that load so many at once; a unit itself begins on a page."""
    model = skeleton.build(tiny_models.tiny_config(kind), torch.bfloat16, torch.device("cpu"))
    tensors = {name: moved(info, 8) for name, info in prepare.sizes_only(model).items()}
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    units, _ = skeleton.cut_units(model, skeleton.collect_weights(model, tensors, torch.bfloat16))
    bindings = [binding for unit in units for binding in unit.bindings]
    assert len(bindings) > len(units)
    assert not [binding.weight.name for binding in bindings if binding.offset % 16]


def moved(info: TensorInfo, by: int) -> TensorInfo:
    """The same in a file where everything begins later."""
    return replace(info, extents=tuple(replace(extent, offset=extent.offset + by) for extent in info.extents))
