"""Source weights → the jobs that write a store: rows are read, cast and encoded by several threads, in order."""

from __future__ import annotations

import functools
import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from typing import TypeVar

import torch

from ..disk import status
from ..encoding.base import Encoding, Part, Plain
from ..errors import CheckpointError
from ..tensors.dtypes import CASTABLE, DTYPE_NAMES, TORCH_DTYPES
from ..tensors.files import BLOCK, Files
from ..tensors.index import ITEMSIZE, TensorInfo
from .names import expert_of, shard_name
from .shard import Chunk, Item, ShardJob

# Values worked on at once; on a CPU bitsandbytes makes about five float32 copies of them in each thread.
HOST_VALUES, DEVICE_VALUES = 1 << 19, 1 << 22
MOST_THREADS = 8

T = TypeVar("T")


def encode_jobs(
    index: Mapping[str, TensorInfo],
    codec: Encoding,
    compressed: Collection[str],
    dtype: torch.dtype,
    *,
    keep: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> list[ShardJob]:
    """The shards of a store of ``index``: one a layer, and one of the rest.

    Parameters
    ----------
    index
        Parameter name → bytes, under the names that the model uses.
    compressed
        Names of the parameters that ``codec`` encodes; the others are stored as they are.
    dtype
        What matrices of floating point are cast to, before they are encoded too. Vectors keep their dtype: they are
        few bytes, and some must not be rounded.
    keep
        Names of further parameters that keep their dtype.
    device
        Where to encode.
    """
    workers = RowWorkers(torch.device(device))
    missing = [name for name in compressed if name not in index]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {missing[0]} ({len(missing)} of the weights to compress)")
    shards: dict[str, list[Item]] = {}
    for name, info in index.items():
        is_matrix = len(info.shape) > 1 or expert_of(name)  # of all experts' vectors below one another
        is_cast = name not in keep and info.dtype in CASTABLE and is_matrix
        target = DTYPE_NAMES[dtype] if is_cast else info.dtype
        used = codec if name in compressed else Plain()
        parts = used.parts(info.shape, target)
        produce = functools.partial(_encoded, info, used, TORCH_DTYPES[target], parts, workers)
        shards.setdefault(shard_name(name), []).append(Item(name, target, info.shape, parts, produce))
    return [ShardJob(name, tuple(items), concurrent=True) for name, items in sorted(shards.items())]


def _encoded(
    info: TensorInfo, codec: Encoding, dtype: torch.dtype, parts: Sequence[Part], workers: RowWorkers
) -> Iterator[Chunk]:
    """The bytes of all parts: the first comes in chunks; the others, a few percent of it, wait until it is complete."""
    if codec.compression == "none":
        yield from workers.map(info, 1, lambda rows: rows.to(dtype, copy=True))
        return
    # In one piece each: many small tensors between large temporaries would fragment the heap.
    waiting = [torch.empty(math.prod(part.shape), dtype=TORCH_DTYPES[part.dtype]) for part in parts[1:]]
    filled = [0] * len(waiting)

    def encode(rows: torch.Tensor) -> list[torch.Tensor]:
        return [part.cpu() for part in codec.encode(rows.to(workers.device).to(dtype)).values()]

    with closing(workers.map(info, codec.encodable_rows(info.shape), encode)) as chunks:
        for first, *others in chunks:
            yield first
            for number, part in enumerate(others):
                waiting[number][filled[number] : filled[number] + part.numel()] = part.reshape(-1)
                filled[number] += part.numel()
    yield from waiting


class RowWorkers:
    """Threads, files and buffers for reading rows, shared by all that is converted at once.

    They live while somebody iterates over :meth:`map`; the buffers stay as long as this object, because fresh memory
    is slower than the disk.

    Parameters
    ----------
    device
        Where the work is done. For a CPU there is a thread a core, as that is what computes; otherwise they are there
        to keep the disk busy, and what the page cache does not hold is read past it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._on_host = device.type == "cpu"
        self._threads = min(os.cpu_count() or 1, MOST_THREADS) if self._on_host else MOST_THREADS
        self._buffers: list[torch.Tensor] = []
        self._lock, self._users, self._torch_threads = threading.Lock(), 0, torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._files = Files()

    def map(self, info: TensorInfo, step: int, work: Callable[[torch.Tensor], T]) -> Generator[T, None, None]:
        """``work(rows)`` for every chunk ``[rows, columns]`` of a tensor, in order, a few of them ahead.

        Parameters
        ----------
        step
            Every chunk but the last has a multiple of so many rows.
        work
            Called in several threads at once. The rows lie in a buffer that is used again: what it returns must not
            share memory with them.

        Raises
        ------
        CheckpointError
            If a file of the tensor ends early or cannot be read; the message names it.
        """
        rows, columns = (info.shape[0] if info.shape else 1), math.prod(info.shape[1:])
        if not rows or not columns:
            return
        count = max((HOST_VALUES if self._on_host else DEVICE_VALUES) // columns // step, 1) * step
        width = columns * ITEMSIZE[info.dtype]

        def one(first: int) -> T:
            taken = min(count, rows - first)
            with self._buffer(taken * width) as buffer:
                chunk = _read(self._files, info, first * width, taken * width, buffer)
                return work(chunk.view(TORCH_DTYPES[info.dtype]).view(taken, columns))

        running: deque[Future[T]] = deque()
        with self._started() as pool:
            try:
                for first in range(0, rows, count):
                    running.append(pool.submit(one, first))
                    if len(running) > self._threads:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()
                wait(running)

    @contextmanager
    def _started(self) -> Iterator[ThreadPoolExecutor]:
        """The threads; the first who comes starts them and the last who leaves ends them."""
        with self._lock:
            self._users += 1
            if self._pool is None:
                # Each thread computes alone. Short operations that all cores share wait mostly for one another.
                self._files = Files(direct=not self._on_host)
                self._pool = ThreadPoolExecutor(self._threads, "rows", torch.set_num_threads, (1,))
            pool = self._pool
        try:
            yield pool
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._pool = None
                    pool.shutdown()
                    self._files.close()
                    # The number is not of a thread alone: threads that are made later would compute with one.
                    torch.set_num_threads(self._torch_threads)

    @contextmanager
    def _buffer(self, nbytes: int) -> Iterator[torch.Tensor]:
        """Memory that begins on a page, with room for ``nbytes`` wherever in their page they begin."""
        buffer = None
        with suppress(IndexError):
            buffer = self._buffers.pop()
        if buffer is None or buffer.numel() < nbytes + 2 * BLOCK:
            buffer = torch.frombuffer(mmap.mmap(-1, nbytes + 2 * BLOCK), dtype=torch.uint8)
        try:
            yield buffer
        finally:
            self._buffers.append(buffer)


def _read(files: Files, info: TensorInfo, start: int, nbytes: int, buffer: torch.Tensor) -> torch.Tensor:
    """A run of the tensor's bytes, as if its extents were one; a view of ``buffer``."""
    taken, passed = [], 0  # (extent, bytes to skip, bytes to take)
    for extent in info.extents:
        skip = max(start - passed, 0)
        take = min(start + nbytes, passed + extent.nbytes) - passed - skip
        if take > 0:
            taken.append((extent, skip, take))
        passed += extent.nbytes
    if passed < start + nbytes:
        raise CheckpointError(f"{info.name}: its {info.nbytes:,} bytes are fewer than its shape {list(info.shape)} "
                              "asks for; download the checkpoint again")  # fmt: skip
    path, where = taken[0][0].path, taken[0][0].offset + taken[0][1]
    first = where % BLOCK if where % ITEMSIZE[info.dtype] == 0 else 0
    whole = -(-(first + nbytes) // BLOCK) * BLOCK
    size = 0  # a file that is gone: reading it says so
    with suppress(OSError):
        size = status(path).st_size
    if len(taken) == 1 and where - first + whole <= size:
        # Whole blocks that lie in memory as in the file are one read, past the page cache too.
        files.read(path, where - first, memoryview(buffer[:whole].numpy()))
        return buffer[first : first + nbytes]
    view = memoryview(buffer[first : first + nbytes].numpy())
    for extent, skip, take in taken:
        files.read(extent.path, extent.offset + skip, view[:take])
        view = view[take:]
    return buffer[first : first + nbytes]
