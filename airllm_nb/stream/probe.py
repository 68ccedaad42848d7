"""How fast this machine is, measured in a few milliseconds: disk, link, and compute on weights.

The numbers feed the plan's prediction, nothing else: a wrong one makes a prediction wrong, not an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..checkpoint.index import Extent
from .reader import Reader
from .ring import HostArena
from .unit import Piece

READ_BYTES = 256 << 20
COPY_BYTES = 64 << 20
# Where nothing can be measured.
FALLBACK = 1e9


def disk_bandwidth(path: Path) -> float:
    """Bytes a second of reading ``path`` the way the reader does (of the page cache, where the file is in it)."""
    size = min(READ_BYTES, path.stat().st_size)
    if size < 1 << 20:
        return FALLBACK
    reader, arena = Reader(), HostArena(size)
    arena.view(0, size).zero_()
    try:
        import threading

        finished = threading.Event()
        # The middle of a file is less likely to be cached by whoever looked at its header.
        piece = Piece(Extent(path, (path.stat().st_size - size) // 2, size), 0)
        start = time.perf_counter()
        reader.submit([piece], memoryview(arena.view(0, size).numpy()), lambda error: finished.set())
        finished.wait()
        return size / (time.perf_counter() - start)
    finally:
        reader.close()
        arena.close()


def link_bandwidth(device: torch.device) -> float:
    """Bytes a second from pinned host memory to ``device``; of a copy in memory where that is a CPU."""
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    arena = HostArena(COPY_BYTES, pin=device.type == "cuda")
    source = arena.view(0, COPY_BYTES)
    try:
        return COPY_BYTES / best_seconds(lambda: target.copy_(source, non_blocking=True), device)
    finally:
        arena.close()


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The fastest of a few runs of ``work``, the device's own work included, after one run to warm up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
