"""Extents → host memory, by parallel positional reads that release the GIL.

One :class:`Reader` owns the threads and the open files. A read either fills all its bytes or fails with the file and
the offset in the message.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import CheckpointError, ClosedError
from .unit import Piece

CHUNK = 8 << 20
THREADS = min(8, max(4, os.cpu_count() or 4))

Done = Callable[[BaseException | None], None]


class Reader:
    """A pool of reading threads over read-only files.

    Parameters
    ----------
    threads
        How many reads run at once.
    chunk
        Bytes of one read; a larger piece is read by several threads.
    """

    def __init__(self, threads: int = THREADS, chunk: int = CHUNK):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="airllm-read")
        self._chunk, self._files, self._lock, self._closed = chunk, _Files(), threading.Lock(), False

    def submit(
        self, pieces: Sequence[Piece], into: memoryview, done: Done, before: Callable[[], None] | None = None
    ) -> None:
        """Read ``pieces`` into ``into``; call ``done(None)`` or ``done(error)`` once, from a reading thread.

        ``before`` is waited for in the reading thread before the first byte is written.
        """
        if self._closed:
            raise ClosedError("the reader is closed; load the model again")
        jobs = [
            (piece.extent.path, piece.extent.offset + at, into[piece.offset + at : piece.offset + at + size])
            for piece in pieces
            for at, size in _chunks(piece.extent.nbytes, self._chunk)
        ]
        batch = _Batch(len(jobs), done, before)
        for path, offset, view in jobs:
            self._pool.submit(self._run, batch, path, offset, view)
        if not jobs:
            done(None)

    def _run(self, batch: _Batch, path: Path, offset: int, view: memoryview) -> None:
        error: BaseException | None = None
        try:
            batch.wait_before()
            if self._closed:
                error = ClosedError(f"the reader was closed before {path} was read; load the model again")
            elif batch.error is None:
                read_exactly(self._files.descriptor(path), path, offset, view)
        except BaseException as caught:  # whatever a thread meets belongs to the caller
            error = caught
        batch.finish(error)

    def close(self) -> None:
        """Let running reads end, fail waiting ones, close the files. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._pool.shutdown(wait=True)
        self._files.close()


class _Batch:
    """The reads of one unit: counts them down and reports once."""

    def __init__(self, count: int, done: Done, before: Callable[[], None] | None):
        self._left, self._done, self._before = count, done, before
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def wait_before(self) -> None:
        if self._before is not None:
            self._before()

    def finish(self, error: BaseException | None) -> None:
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            last = self._left == 0
        if last:
            self._done(self.error)


class _Files:
    """Descriptors by path, opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be opened while streaming ({error.strerror}); "
                                          "was it moved or deleted? Load the model again") from None  # fmt: skip
            return self._open[path]

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


def _chunks(nbytes: int, chunk: int) -> list[tuple[int, int]]:
    return [(at, min(chunk, nbytes - at)) for at in range(0, nbytes, chunk)]


def read_exactly(descriptor: int, path: Path, offset: int, view: memoryview) -> None:
    """Fill ``view`` from ``offset``.

    Raises
    ------
    CheckpointError
        If the file ends before, or the disk fails; the message names file and offset.
    """
    got = 0
    while got < len(view):
        try:
            count = _pread(descriptor, view[got:], offset + got)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read at byte {offset + got:,} ({error.strerror}); "
                                  "check the disk, then load the model again") from None  # fmt: skip
        if count == 0:
            raise CheckpointError(f"{path} ends at byte {offset + got:,}, {len(view) - got:,} bytes too early; "
                                  "was it changed while the model was open? Download it again")  # fmt: skip
        got += count


if hasattr(os, "preadv"):

    def _pread(descriptor: int, view: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [view], offset)

else:  # Windows: no positional read; one seek and read at a time
    _seek_lock = threading.Lock()

    def _pread(descriptor: int, view: memoryview, offset: int) -> int:
        with _seek_lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(view))
        view[: len(data)] = data
        return len(data)
