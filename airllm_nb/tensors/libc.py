"""The calls of the C library that Python does not have, or has with side effects. Linux with 64 bits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
from typing import Any

# Fault pages in as a read would (Linux 5.14).
MADV_POPULATE_READ = 22
MAP_NORESERVE = 0x4000
# Begin to write dirty pages and do not wait for them.
SYNC_FILE_RANGE_WRITE = 2


def is_supported() -> bool:
    """Whether the functions below work on this platform, with pages of the size that units are laid out in."""
    return sys.platform == "linux" and sys.maxsize > 1 << 32 and mmap.PAGESIZE == 4096


def map_file(descriptor: int, offset: int, nbytes: int, private: bool = False) -> int:
    """Map whole pages of a file; returns the address. Raises ``OSError``.

    Python's own ``mmap`` would keep a descriptor open for every mapping.

    Parameters
    ----------
    private
        Not read-only and shared, but writable without a change of the file.
    """
    # Memory for every page that could be written would be kept, and files larger than RAM refused, unless told not to.
    flags = mmap.MAP_PRIVATE | MAP_NORESERVE if private else mmap.MAP_SHARED
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if private else 0)
    address = _libc().mmap(None, nbytes, protection, flags, descriptor, offset)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(address)


def unmap(address: int, nbytes: int) -> None:
    """Undo :func:`map_file`."""
    _libc().munmap(address, nbytes)


def populate(address: int, nbytes: int) -> int:
    """Have the pages of a mapping in memory; returns the error number, 0 for none. Lets go of the interpreter."""
    return ctypes.get_errno() if _libc().madvise(address, nbytes, MADV_POPULATE_READ) else 0


def is_resident(descriptor: int, offset: int, nbytes: int) -> bool:
    """Whether the page cache holds every page of a run of bytes. Asking starts no reading, unlike ``RWF_NOWAIT``.

    Linux does not tell of files that are another user's: then no. Where a file cannot be mapped: yes, read it the
    usual way.
    """
    if os.fstat(descriptor).st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{descriptor}", os.W_OK):
        return False
    first = offset // mmap.PAGESIZE * mmap.PAGESIZE
    pages = -(-(offset + nbytes - first) // mmap.PAGESIZE)
    try:
        address = map_file(descriptor, first, pages * mmap.PAGESIZE)
    except OSError:
        return True
    try:
        found = (ctypes.c_ubyte * pages)()
        if _libc().mincore(address, pages * mmap.PAGESIZE, found):
            return False
        return all(page & 1 for page in bytes(found))
    finally:
        unmap(address, pages * mmap.PAGESIZE)


def start_writing(descriptor: int, offset: int, nbytes: int) -> None:
    """Have a file's new bytes go to the disk now, where the system would wait for a sync; does nothing elsewhere."""
    if is_supported():
        with contextlib.suppress(AttributeError):  # a C library without the call
            _libc().sync_file_range(descriptor, offset, nbytes, SYNC_FILE_RANGE_WRITE)


def trim_heap() -> None:
    """Give back to the system what was freed; glibc keeps it, as much as it likes. Nothing with other C libraries."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            _libc().malloc_trim(0)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with contextlib.suppress(AttributeError):
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
    with contextlib.suppress(AttributeError):
        libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return libc
