"""What this machine can do for one prepared model: the probed bandwidths that its plan is made from."""

from __future__ import annotations

import torch

from .config import GiB
from .load import NOWHERE, Prepared
from .model.plan import Machine
from .stream.probe import best_seconds, disk_bandwidth, link_bandwidth

# A matrix that no cache holds; a GPU needs a larger one to be busy at all.
_PROBE_SIDE = {"cpu": 4096, "cuda": 8192}


def measure(prepared: Prepared) -> Machine:
    """Probe this machine with this checkpoint's files and this codec; takes some tens of milliseconds."""
    device, is_cpu = prepared.device, prepared.device.type == "cpu"
    files = [unit.stream.pieces[0].extent.path for unit in prepared.units if unit.stream.pieces]
    largest = max((file for file in set(files) if file != NOWHERE), key=lambda file: file.stat().st_size, default=None)
    disk = disk_bandwidth(largest) if largest else 1e9
    has_device = not is_cpu or prepared.options.vram_budget is not None
    link = link_bandwidth(device) if has_device else 1e12
    compute = _compute_bandwidth(prepared)
    prepared.scratch.close()
    if not is_cpu:
        torch.cuda.empty_cache()
    return Machine(has_device, disk, link, compute)


def _compute_bandwidth(prepared: Prepared) -> float:
    """Bytes of weights a second that one token's matrix product reads, in this codec on this device."""
    device, kind = prepared.device, prepared.device.type
    # The probe itself must stay far inside the budget that it serves.
    side = _PROBE_SIDE[kind] if kind == "cpu" or prepared.vram_budget > 2 * GiB else 2048
    linear = torch.nn.Linear(side, side, bias=False, dtype=prepared.dtype, device=device)
    parts = prepared.codec.encode(linear.weight.detach())
    module = prepared.codec.module(linear, prepared.dtype, prepared.scratch)
    for name, part in parts.items():
        module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
    row = torch.zeros(1, side, dtype=prepared.dtype, device=device)
    with torch.inference_mode():
        seconds = best_seconds(lambda: module(row), device)
    return sum(part.numel() * part.element_size() for part in parts.values()) / seconds
