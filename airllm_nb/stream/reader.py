"""Extents → host memory, by parallel positional reads that release the GIL.

One :class:`Reader` owns the threads and the open files. A read either fills all its bytes or fails with the file and
the offset in the message. Reading past the page cache (O_DIRECT) is in :mod:`~airllm_nb.tensors.files`.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ..errors import ClosedError
from ..tensors.files import Files
from .unit import Piece

CHUNK = 8 << 20
THREADS = min(8, max(4, os.cpu_count() or 4))

Done = Callable[[BaseException | None], None]
Job = Callable[[], None]


class Pages(Protocol):
    """Memory that knows itself how its bytes come into it."""

    def jobs(self, chunk: int) -> list[Job]:
        """What to run, in any order and in parallel."""


class Reader:
    """A pool of reading threads over read-only files.

    Parameters
    ----------
    threads
        How many reads run at once.
    chunk
        Bytes of one read; a larger piece is read by several threads.
    direct
        Read what the page cache does not hold past it, where the file system can: see :class:`Files`.
    """

    def __init__(self, threads: int = THREADS, chunk: int = CHUNK, direct: bool = False):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="airllm-read")
        self._chunk, self._files, self._lock, self._closed = chunk, Files(direct), threading.Lock(), False

    def submit(
        self, pieces: Sequence[Piece], into: memoryview | Pages, done: Done, before: Callable[[], None] | None = None
    ) -> None:
        """Read ``pieces`` into ``into``; call ``done(None)`` or ``done(error)`` once, from a reading thread.

        ``before`` is waited for in the reading thread before the first byte is written.
        """
        if not isinstance(into, memoryview):
            self.run(into.jobs(self._chunk), done, before)
            return
        jobs: list[Job] = []
        for piece in pieces:
            path, offset = piece.extent.path, piece.extent.offset
            for at, size in chunks(offset, piece.extent.nbytes, self._chunk):
                view = into[piece.offset + at : piece.offset + at + size]
                jobs.append(functools.partial(self._files.read, path, offset + at, view))
        self.run(jobs, done, before)

    def run(self, jobs: Sequence[Job], done: Done, before: Callable[[], None] | None = None) -> None:
        """Run ``jobs`` on the reading threads; ``done`` and ``before`` as in :meth:`submit`."""
        if self._closed:
            raise ClosedError("the reader is closed; load the model again")
        batch = _Batch(len(jobs), done, before)
        for job in jobs:
            self._pool.submit(self._work, batch, job)
        if not jobs:
            done(None)

    def _work(self, batch: _Batch, job: Job) -> None:
        error: BaseException | None = None
        try:
            batch.wait_before()
            if self._closed:
                error = ClosedError("the reader was closed before everything was read; load the model again")
            elif batch.error is None:
                job()
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


def chunks(offset: int, nbytes: int, chunk: int) -> list[tuple[int, int]]:
    """Cut ``nbytes`` from ``offset`` on into ``(start, size)``, the cuts on multiples of ``chunk`` in the file."""
    cuts = [0, *range(chunk - offset % chunk, nbytes, chunk), nbytes]
    return [(start, end - start) for start, end in itertools.pairwise(cuts) if end > start]
