"""Which device and dtype to compute in, and how much memory there is to take."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import GiB, LoadOptions
from ..errors import CheckpointError, OptionError

# Left free when no budget is named: for other programs, and for what the allocator rounds up.
VRAM_MARGIN = 0.08
RAM_SHARE = 0.7


def choose_device(options: LoadOptions) -> torch.device:
    """The device named in the options, else the first GPU that this torch can use, else the CPU.

    Raises
    ------
    OptionError
        If a GPU is named that is not there or that this build of torch has no kernels for.
    """
    wanted = options.device
    if wanted == "cpu" or (wanted is None and not (torch.cuda.is_available() and _has_kernels(0))):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise OptionError(f"device={wanted!r}: torch sees no GPU; use device='cpu', or install a CUDA build of torch")
    device = torch.device(wanted or "cuda")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise OptionError(f"device={wanted!r}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    if not _has_kernels(index):
        raise OptionError(
            f"device={wanted!r}: this torch has no kernels for {torch.cuda.get_device_name(index)} "
            f"(it has {', '.join(torch.cuda.get_arch_list())}); use device='cpu' or an older torch"
        )
    return torch.device("cuda", index)


def _has_kernels(index: int) -> bool:
    """Old GPUs pass ``is_available`` and fail at the first operation; the list of built architectures tells."""
    built = [
        int(name.removeprefix("sm_").rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")
    ]
    major, minor = torch.cuda.get_device_capability(index)
    return not built or min(built) <= major * 10 + minor


def choose_dtype(options: LoadOptions, config: Any, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype named in the options, else the config's, else that of the weights; float16 on GPUs without bfloat16."""
    named = options.dtype or getattr(config, "dtype", None) or stored or torch.bfloat16
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"config.json is damaged: dtype is {str(named)[:40]!r}; download it again, or name one "
                              f"(dtype='float16')")  # fmt: skip
    lacks_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    if options.dtype is None and dtype == torch.bfloat16 and lacks_bfloat16:
        return torch.float16
    return dtype


def has_memory(options: LoadOptions, device: torch.device) -> bool:
    """Whether weights are copied to a memory of the device; a ``vram_budget`` on a CPU rehearses one."""
    return device.type != "cpu" or options.vram_budget is not None


class Budgets(NamedTuple):
    """Bytes that a model may take of device memory, and of host memory for its weights."""

    vram: int
    ram: int


def budgets_of(options: LoadOptions) -> Budgets:
    """Those that are named, else what is free now.

    Ask once for a model: what is free later is less by what it takes itself.
    """
    return Budgets(vram_budget(options, choose_device(options)), ram_budget(options))


def vram_budget(options: LoadOptions, device: torch.device) -> int:
    """Bytes of device memory to use: as named, else what is free, less a margin."""
    if options.vram_budget is not None:
        return options.vram_budget
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * (1 - VRAM_MARGIN))


def ram_budget(options: LoadOptions) -> int:
    """Bytes of host memory for weights: as named, else a share of what is free (of the container, if there is one)."""
    if options.ram_budget is not None:
        return options.ram_budget
    return int(available_ram() * RAM_SHARE)


def available_vram(device: torch.device) -> int:
    """Bytes that this process can still take on a GPU, less a margin; what its allocator holds unused is counted."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + unused) * (1 - VRAM_MARGIN))


def used_memory(device: torch.device) -> tuple[int, int]:
    """Bytes allocated and reserved on the device; of the process where the device is this CPU.

    What is reserved now, not its peak: that would be the process's, and what is reserved is hardly ever given back.
    """
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0, 0
    return resident, resident


def memory_of_others(device: torch.device) -> int:
    """Bytes of device memory that are not this process's allocator's, as the driver counts them."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(total - free - torch.cuda.memory_reserved(device), 0)


def available_ram() -> int:
    """Free host memory in bytes, counting what the page cache would give back."""
    free = [_meminfo(), _cgroup()]
    known = [value for value in free if value is not None]
    return min(known) if known else 4 * GiB


def total_ram() -> int:
    """Host memory in bytes, whoever uses it (of the container, if there is one)."""
    known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    with suppress(OSError, ValueError):  # not in a container, or without a limit
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known, default=1 << 62)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return _sysconf()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _sysconf() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup() -> int | None:
    base = Path("/sys/fs/cgroup")
    try:
        limit, used = (base / "memory.max").read_text().strip(), int((base / "memory.current").read_text())
        if limit == "max":
            return None
        stat = dict(line.split() for line in (base / "memory.stat").read_text().splitlines())
        # The page cache is counted as used, and given back when somebody needs it.
        cached = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
        return max(int(limit) - used + min(cached, used), 0)
    except (OSError, ValueError):
        return None
