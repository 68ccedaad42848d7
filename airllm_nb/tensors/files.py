"""Positional reads of whole runs of bytes, through the page cache or past it.

Past the cache (O_DIRECT) a cold disk is read faster, and a model larger than RAM does not push everything else out of
it. What the cache holds anyway is taken from there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from ..disk import open_descriptor, refused, status
from ..errors import CheckpointError
from . import libc, pages

# What O_DIRECT asks offsets, sizes and addresses to be multiples of; no disk asks for more.
BLOCK = 4096
_HAS_DIRECT = hasattr(os, "O_DIRECT") and libc.is_supported()


class Files:
    """Open files by path, for any thread.

    Parameters
    ----------
    direct
        Read past the page cache what it does not hold. A file system that cannot is read through it.
    """

    def __init__(self, direct: bool = False):
        self._direct = direct and _HAS_DIRECT
        self._open: dict[tuple[Path, bool], int] = {}
        self._lock, self._thread = threading.Lock(), threading.local()

    def read(self, path: Path, offset: int, view: memoryview) -> None:
        """Fill ``view`` from byte ``offset``.

        Raises
        ------
        CheckpointError
            If the file ends before, or the disk fails; the message names file and offset.
        """
        descriptor = self._descriptor(path)
        if self._direct and len(view) and not libc.is_resident(descriptor, offset, len(view)):
            got = self._read_direct(path, offset, view)
            offset, view = offset + got, view[got:]
        read_exactly(descriptor, path, offset, view)

    def close(self) -> None:
        """Close every file; safe to call twice."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _read_direct(self, path: Path, offset: int, view: memoryview) -> int:
        """Bytes read past the cache; what is left, if any, is for the usual way to read or to complain about."""
        done = 0
        try:
            descriptor = self._descriptor(path, direct=True)
            while done < len(view):
                got = self._read_blocks(descriptor, offset + done, view[done:])
                if got <= 0:
                    break
                done += got
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                self._direct = False
        return done

    def _read_blocks(self, descriptor: int, offset: int, view: memoryview) -> int:
        """One read of whole blocks: straight into ``view`` where that lies like the file, else by way of a buffer."""
        lies_alike = (_address(view) - offset) % BLOCK == 0
        skip = offset % BLOCK
        if lies_alike and not skip and len(view) >= BLOCK:
            return os.preadv(descriptor, [view[: len(view) // BLOCK * BLOCK]], offset)
        wanted = min(len(view), BLOCK - skip) if lies_alike else len(view)
        bounce = self._bounce(-(-(skip + wanted) // BLOCK) * BLOCK)
        got = max(min(os.preadv(descriptor, [bounce], offset - skip) - skip, wanted), 0)
        # memmove, by ctypes, lets go of the interpreter.
        ctypes.memmove(_address(view), _address(bounce) + skip, got)
        return got

    def _bounce(self, nbytes: int) -> memoryview:
        """This thread's page-aligned buffer."""
        buffer = getattr(self._thread, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._thread.buffer = mmap.mmap(-1, nbytes)
        return memoryview(buffer)[:nbytes]

    def _descriptor(self, path: Path, direct: bool = False) -> int:
        with self._lock:
            if (path, direct) not in self._open:
                self._open[path, direct] = open_descriptor(path, os.O_DIRECT if direct else 0)
            return self._open[path, direct]


class Unchanged:
    """Notices files that were rewritten since: their pages are shared, so a model would compute with the new bytes."""

    def __init__(self, paths: Iterable[Path]):
        self._stamps = {path: _stamp(path) for path in set(paths)}
        self._lost, self._losses = pages.total(), {path: pages.losses(path) for path in self._stamps}

    def check(self) -> None:
        """Raise ``CheckpointError`` if a file is another one by now. One that is gone is not: its pages stay."""
        self.check_pages()
        pages.guard()
        for path, stamp in self._stamps.items():
            if _stamp(path) not in (stamp, None):
                raise CheckpointError(f"{path} was changed while the model was open: what was computed since may be "
                                      "wrong; load the model again")  # fmt: skip

    def check_pages(self) -> None:
        """Raise ``CheckpointError`` if mapped pages were lost: compute went on with zeros. Takes no time."""
        if self._lost == (total := pages.total()):
            return
        for path, before in self._losses.items():
            if pages.losses(path) != before:
                raise pages.lost(path)
        self._lost = total


def _stamp(path: Path) -> tuple[int, int] | None:
    """Not the inode: file systems over a network may number a file anew."""
    try:
        found = status(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


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
            raise refused(error, path, f"read at byte {offset + got:,}") from None
        if count == 0:
            raise CheckpointError(f"{path} ends at byte {offset + got:,}, {len(view) - got:,} bytes too early; "
                                  "was it changed while the model was open? Download it again")  # fmt: skip
        got += count


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


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
