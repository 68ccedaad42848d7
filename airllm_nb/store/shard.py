"""One safetensors file, written as a stream: the layout is known before the first byte, memory stays bounded.

The data begins on a page and every tensor on 256 bytes, so that a file can be mapped, read directly and copied as it
lies; what one expert has lies together and begins on a page, so that it is one read. The format forbids holes, so what
fills them is a tensor of its own, ``__pad.<shard>.<n>``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Union

from ..encoding.base import Part
from ..errors import StoreError
from ..tensors.index import ITEMSIZE, PAD
from ..tensors.libc import start_writing
from .atomic import sync_folder
from .names import expert_of, unfinished

if TYPE_CHECKING:
    import torch

PAGE = 4096
ALIGNMENT = 256

# One shard at a time would leave the disk idle while it is synced, and be no faster than one thread's sha256.
AT_ONCE = 3
POLL_SECONDS = 0.1
# How much is written before the disk is told to begin: a sync that finds everything to do holds up all others.
WRITE_BACK = 16 << 20

Chunk = Union["torch.Tensor", bytes, bytearray, memoryview]


@dataclass(frozen=True)
class Entry:
    """One tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Item:
    """One parameter on its way into a shard.

    Parameters
    ----------
    name, dtype, shape
        The parameter as the model knows it.
    parts
        What it becomes. The first part keeps the name; the others take its place beside it
        (``….q_proj.weight`` → ``….q_proj.absmax``).
    produce
        Called when the shard is written; yields the bytes of all parts in order, as tensors or bytes of any size. A
        chunk belongs to one part. It may be reused once the next one is asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    produce: Callable[[], Iterable[Chunk]]

    @property
    def entries(self) -> tuple[Entry, ...]:
        prefix = self.name.rpartition(".")[0]
        names = [self.name, *(f"{prefix}.{part.attribute}".lstrip(".") for part in self.parts[1:])]
        return tuple(Entry(name, part.dtype, part.shape) for name, part in zip(names, self.parts, strict=True))


def plain(name: str, dtype: str, shape: Iterable[int], produce: Callable[[], Iterable[Chunk]]) -> Item:
    """An item that is stored as it is; ``produce`` yields its bytes, row-major and little-endian."""
    shape = tuple(shape)
    return Item(name, dtype, shape, (Part(name.rpartition(".")[2], dtype, shape),), produce)


@dataclass(frozen=True)
class ShardJob:
    """What one file of a store is made of.

    Parameters
    ----------
    name
        The file's without ``.safetensors``.
    concurrent
        Whether it may be produced in one thread while others are in other threads.
    is_padded
        Whether data and experts begin on a page and tensors on 256 bytes; else all is as the reference library has it.
    """

    name: str
    items: tuple[Item, ...]
    concurrent: bool = False
    is_padded: bool = True

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    def entries(self) -> list[Entry]:
        """Every tensor of the file, padding included, in order."""
        found, pads = list[Entry](), itertools.count()
        for short, entry in self.laid_out():
            found += [Entry(f"{PAD}{self.name}.{next(pads)}", "U8", (short,))] if short else []
            found.append(entry)
        return found

    def laid_out(self) -> Iterator[tuple[int, Entry]]:
        """Every tensor of the items, in order, and how many bytes are to be filled before it."""
        cursor, before = 0, ""
        for item in self.items:
            expert = expert_of(item.name)
            step = PAGE if expert and expert != before else ALIGNMENT
            for entry in item.entries:
                short = -cursor % step if self.is_padded else 0
                yield short, entry
                cursor, step = cursor + short + entry.nbytes, ALIGNMENT
            before = expert

    def header(self) -> bytes:
        """The length field and the JSON, padded with spaces so that the data begins on a page, or on 8 bytes."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        cursor = 0
        for entry in self.entries():
            if entry.name in table:
                raise StoreError(f"{self.file}: two tensors are named {entry.name!r}")
            end = cursor + entry.nbytes
            table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [cursor, end]}
            cursor = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % (PAGE if self.is_padded else 8))
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header()) + sum(entry.nbytes for entry in self.entries())


def write_shards(
    folder: Path, jobs: list[ShardJob], wrote: Callable[[str, int], None], finished: Callable[[ShardJob, str], None]
) -> None:
    """Write ``jobs`` into ``folder``, a few at once where they allow it: while one is synced, others go on.

    Both callbacks run in the calling thread. Whatever ends this, no thread is left and what is finished was told.

    Parameters
    ----------
    wrote
        Told the file and the bytes of every step, which waits for it. It may raise to stop.
    finished
        Told each shard and its sha256 once it is on the disk, in the order of ``jobs``.
    """
    steps: queue.Queue[tuple[str, int] | None] = queue.Queue(1)
    stopped, running = threading.Event(), deque[tuple[ShardJob, Future[str]]]()

    def step(file: str, nbytes: int) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                return steps.put((file, nbytes), timeout=POLL_SECONDS)
        raise _Stopped

    def wake(_: object) -> None:
        with suppress(queue.Full):
            steps.put_nowait(None)

    with ThreadPoolExecutor(AT_ONCE if all(job.concurrent for job in jobs) else 1, "shard") as pool:
        try:
            for job in jobs:
                future = pool.submit(write_shard, folder / job.file, job, functools.partial(step, job.file))
                running.append((job, future))
                future.add_done_callback(wake)
            while running or not steps.empty():
                if (one := steps.get()) is not None:
                    wrote(*one)
                for _, future in running:
                    if future.done():
                        future.result()  # an error ends all
                while running and running[0][1].done():
                    job, future = running.popleft()
                    finished(job, future.result())
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            for job, future in running:
                if not future.cancelled() and future.exception() is None:
                    finished(job, future.result())


class _Stopped(Exception):
    """Ends the writing of a shard because another one ended it all."""


def write_shard(path: Path, job: ShardJob, wrote: Callable[[int], None]) -> str:
    """Write ``job`` to ``path`` by way of a temporary file that is synced and renamed; returns the sha256.

    ``wrote`` is told the bytes of every step and may raise to stop; then nothing is left behind.
    """
    temporary = path.with_name(unfinished(path.name))
    try:
        with temporary.open("wb") as file, _Sink(file, wrote) as sink, closing(_stream(job)) as stream:
            sink.put(job.header())
            for data in stream:
                sink.put(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return sink.sha256


class _Sink:
    """A file and its hash, which is computed beside the writing: hashlib lets go of the interpreter."""

    def __init__(self, file: IO[bytes], wrote: Callable[[int], None]):
        self._file, self._wrote, self._hash = file, wrote, hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, "sha256")
        self._written = self._started = 0

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def put(self, data: bytes | memoryview) -> None:
        hashed = self._pool.submit(self._hash.update, data)
        try:
            self._file.write(data)
            self._written += len(data)
            if self._written >= self._started + WRITE_BACK:
                start_writing(self._file.fileno(), self._started, self._written - self._started)
                self._started = self._written
        finally:
            hashed.result()
        self._wrote(len(data))

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _stream(job: ShardJob) -> Generator[bytes | memoryview, None, None]:
    layout = job.laid_out()
    for item in job.items:
        chunks = iter(item.produce())
        try:
            for short, entry in itertools.islice(layout, len(item.parts)):
                if short:
                    yield bytes(short)
                yield from _exactly(entry, chunks, job.file)
            if any(len(_raw(chunk)) for chunk in chunks):
                raise StoreError(f"{job.file}: {item.name} got more bytes than it should take; it may be of another "
                                 "model")  # fmt: skip
        finally:
            if isinstance(chunks, Generator):
                chunks.close()  # the traceback of an error would keep it and its threads


def _exactly(entry: Entry, chunks: Iterator[Chunk], file: str) -> Iterator[memoryview]:
    reached = 0
    while reached < entry.nbytes:
        data = _raw(next(chunks, b""))
        reached += len(data)
        if not len(data) or reached > entry.nbytes:
            raise StoreError(f"{file}: {entry.name} should take {entry.nbytes:,} bytes but its source gave "
                             f"{reached:,}; the source files may have changed")  # fmt: skip
        yield data


def _raw(chunk: Chunk) -> memoryview:
    if isinstance(chunk, (bytes, bytearray, memoryview)):
        return memoryview(chunk).cast("B")
    import torch

    flat = chunk.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
