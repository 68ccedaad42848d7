"""How fast this machine is, measured in a few milliseconds: disk, link, and compute on weights.

The numbers feed the plan's prediction, nothing else: a wrong one makes a prediction wrong, not an answer.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..disk import status
from ..tensors.index import Extent
from .host import HostMemory
from .reader import Reader
from .ring import PAGE
from .unit import Piece

COPY_BYTES = 64 << 20
# A round of reads keeps every thread busy; rounds go on until the time or the bytes are enough.
ROUND_BYTES, MOST_BYTES, SECONDS = 64 << 20, 256 << 20, 0.25
# Where nothing can be measured.
FALLBACK = 1e9


def disk_bandwidth(path: Path, direct: bool = False) -> float:
    """Bytes a second of reading ``path`` the way the reader does (of the page cache, where the file is in it)."""
    length = status(path).st_size
    size = min(ROUND_BYTES, length)
    if size < 1 << 20:
        return FALLBACK
    # Anywhere but where an earlier probe read: its bytes are cached, the rest of the file may not be.
    cursor = random.randrange(length - size + 1) // PAGE * PAGE
    reader, arena = Reader(direct=direct), HostMemory(size)
    memory = arena.view(0, size).zero_()
    done, start = 0, time.perf_counter()
    try:
        while done < MOST_BYTES and time.perf_counter() < start + SECONDS:
            if cursor + size > length:
                cursor = 0
            _read(reader, Extent(path, cursor, size), memoryview(memory.numpy()))
            done, cursor = done + size, cursor + size
        return done / (time.perf_counter() - start)
    finally:
        reader.close()
        arena.close()


def _read(reader: Reader, extent: Extent, into: memoryview) -> None:
    errors: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    reader.submit([Piece(extent, 0)], into, errors.put)
    if error := errors.get():
        raise error


def link_bandwidth(device: torch.device) -> float:
    """Bytes a second from locked host memory to ``device``; of a copy in memory where that is a CPU."""
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    arena = HostMemory(COPY_BYTES)
    source = arena.view(0, COPY_BYTES).zero_()
    if device.type == "cuda":
        arena.lock(device)
    try:
        return COPY_BYTES / best_seconds(lambda: target.copy_(source, non_blocking=True), device)
    finally:
        arena.close()


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The fastest of a few runs of ``work``, the device's own work included, after one run to warm up.

    On a GPU several are queued at a time, as a sweep queues them: one alone would be timed with what it waits for.
    """
    work()
    best, queued = float("inf"), 4 if device.type == "cuda" else 1
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(queued):
            work()
        _synchronize(device)
        best = min(best, (time.perf_counter() - start) / queued)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
