"""What this machine can do for one prepared model: the probed bandwidths that its plan is made from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from ..disk import status
from ..encoding.base import encoded
from ..encoding.linear import EncodedLinear
from ..intake.planning import Prepared
from ..intake.prepare import NOWHERE
from ..model.device import available_ram, has_memory, vram_budget
from ..plan.residency import Machine
from ..stream.probe import FALLBACK, best_seconds, disk_bandwidth, link_bandwidth
from ..stream.ring import LOCKED
from ..stream.trial import direct_is_faster, ram_kind

# A matrix that no cache holds; a GPU needs a larger one to be busy at all.
_PROBE_SIDE = {"cpu": 4096, "cuda": 8192}
_SPEEDS: dict[tuple[object, ...], float] = {}


def measure(prepared: Prepared) -> Machine:
    """Probe this machine with this checkpoint's files and this codec.

    Takes some tenths of a second; the first time on a file system with a GPU a second more, see
    :mod:`~airllm_nb.stream.trial`.
    """
    device, is_cpu = prepared.device, prepared.device.type == "cpu"
    units = prepared.units if prepared.sizes_from == "files" else ()  # what is not here cannot be measured
    files = {piece.extent.path for unit in units for piece in unit.stream.pieces[:1]} - {NOWHERE}
    file = max(files, key=lambda file: status(file).st_size, default=None)
    direct = file is not None and _reads_directly(prepared, file)
    disk = disk_bandwidth(file, direct) if file else FALLBACK
    has_device = has_memory(prepared.options, device)
    link = link_bandwidth(device) if has_device else 1e12
    ram = ram_kind(file, device, link) if file and has_device else LOCKED
    compute = _compute_bandwidth(prepared)
    prepared.scratch.close()
    if not is_cpu:
        torch.cuda.empty_cache()
    layers = getattr(prepared.config.get_text_config(), "num_hidden_layers", 0) or 0
    overhead = layers * _layer_seconds(device)
    replays = device.type == "cuda" and not (prepared.options.exact or prepared.options.profiling_mode)
    return Machine(has_device, disk, link, compute, ram, direct, overhead, replays)


def _reads_directly(prepared: Prepared, file: Path) -> bool:
    """Past the page cache: a model that it cannot hold would push everything out of it and never be found in it."""
    if prepared.options.direct_io is not None:
        return prepared.options.direct_io
    return sum(unit.nbytes for unit in prepared.units) > available_ram() and direct_is_faster(file)


def _compute_bandwidth(prepared: Prepared) -> float:
    """Bytes of weights a second that one token's matrix product reads, as they are encoded here, on this device."""
    device, kind = prepared.device, prepared.device.type
    side, room = _PROBE_SIDE[kind], vram_budget(prepared.options, device)
    while kind != "cpu" and side > 2048 and 16 * side**2 > room:  # far inside the budget that it serves
        side //= 2
    codec, layers = prepared.codec, [m for m in prepared.skeleton.modules() if isinstance(m, EncodedLinear)]
    packed = _typical(layers) if codec.compression == "none" else None
    if packed is not None and not packed.keeps:
        return _speed(packed.sample(device), prepared)
    # The same product on the same machine: measured once a process, as models are opened again and again.
    key = (device, torch.get_num_threads(), codec.compression, prepared.dtype, side)
    if key not in _SPEEDS:
        module: torch.nn.Module = torch.nn.Linear(side, side, bias=False, dtype=prepared.dtype, device=device)
        if codec.compression != "none":
            parts = codec.encode(module.weight.detach())
            module = EncodedLinear(encoded(codec, (side, side)), False, prepared.dtype, prepared.scratch)
            for name, part in parts.items():
                module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
        _SPEEDS[key] = _speed(module, prepared)
    if packed is None:
        return _SPEEDS[key]
    # Units count the packed bytes, compute reads the unpacked ones.
    return _SPEEDS[key] * _stored_bytes(packed) / packed.scratch_bytes


def _speed(module: Any, prepared: Prepared) -> float:
    row = torch.zeros(1, module.in_features, dtype=prepared.dtype, device=prepared.device)
    with torch.inference_mode():
        return _stored_bytes(module) / best_seconds(lambda: module(row), prepared.device)


def _stored_bytes(module: torch.nn.Module) -> int:
    return sum(part.numel() * part.element_size() for part in module._parameters.values() if part is not None)


def _typical(layers: list[EncodedLinear]) -> EncodedLinear | None:
    """The largest layer that is quickly unpacked: of a small one, the launches would be measured."""
    quick = [layer for layer in layers if layer.in_features * layer.out_features <= _PROBE_SIDE["cuda"] ** 2]
    return max(quick or layers[:1], key=lambda layer: layer.in_features * layer.out_features, default=None)


@functools.cache
def _layer_seconds(device: torch.device) -> float:
    """What one block of a decoder costs beside its weights: Python, launches, norms and attention of one token.

    It bounds models that are small or fit the GPU: measured on blocks of almost no weights.
    """
    from transformers import LlamaConfig, LlamaModel

    layers, size = 4, 64
    config = LlamaConfig(
        hidden_size=size, intermediate_size=size, num_hidden_layers=layers, num_attention_heads=1, vocab_size=size
    )
    # Whoever seeds before opening a model gets the same samples as without this.
    with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model, ids = LlamaModel(config).eval(), torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        return best_seconds(lambda: model(input_ids=ids, use_cache=True), device) / layers
