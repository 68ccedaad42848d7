"""Mapped pages of files, and what happens when a file loses them: not the end of the process, but an error soon after.

To touch a mapped page that its file has no longer (somebody made it shorter), or that the disk cannot give, is SIGBUS,
which ends a process with all that a notebook holds. For the mappings that are watched here a handler of our own puts
empty pages in the place of what is lost and counts the loss. Whoever computes on mapped weights asks
(:meth:`~airllm_nb.tensors.files.Unchanged.check_pages`) before a result leaves. All other faults go to the handler
that was there before.

The handler is Python's, so a thread that faults waits for the interpreter first. That ends, because what touches mapped
bytes either lets go of the interpreter (torch's operators, and their worker threads with them; ctypes) or holds it in
the very thread that faults (slices, numpy). Linux with 64 bits; elsewhere a file that shrinks ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..disk import open_descriptor, status, told
from ..errors import CheckpointError
from . import libc

# From the headers of Linux, where these are the same on x86-64 and aarch64.
_SA_SIGINFO = 4
_MAP_FIXED = 0x10
_AT_CODE, _AT_ADDRESS = 8, 16  # in siginfo_t
_DEFAULT = 0
# What is watched: first page, end, file; each by a number of its own, as several may begin on one page, or one be
# watched twice. A dictionary is changed by one operation of the interpreter, so that the handler, and a finalizer that
# comes in between, need no lock.
_watched: dict[int, tuple[int, int, Path]] = {}
_numbers = itertools.count()
_losses: dict[Path, int] = {}
_previous = _DEFAULT
_installing = threading.Lock()


def losses(path: Path) -> int:
    """How often pages of this file were lost under a mapping since the process began."""
    return _losses.get(path, 0)


def total() -> int:
    """The losses of all files together."""
    return sum(_losses.values()) if _losses else 0


def map_pages(path: Path, first: int, nbytes: int, end: int, *, private: bool = False) -> Any:
    """Map whole pages of a file and watch them; unmapped when the last reference to the answer goes.

    Parameters
    ----------
    first, nbytes
        Of the file, both multiples of a page.
    end
        Where the file must reach to.
    private
        Whether the pages may be written to, which changes no file.

    Returns
    -------
    ctypes.Array
        Of bytes.

    Raises
    ------
    CheckpointError
        If the file is gone, has become shorter or cannot be mapped.
    """
    descriptor = open_descriptor(path)
    try:
        with told(path, "mapped"):
            if os.fstat(descriptor).st_size < end:
                raise CheckpointError(f"{path} has become shorter since it was opened; load the model again")
            address = libc.map_file(descriptor, first, nbytes, private)
    finally:
        os.close(descriptor)
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    # Not at the end of the interpreter: a generation that was left alone may still copy from it then.
    weakref.finalize(memory, _release, _watch(address, nbytes, path), address, nbytes).atexit = False
    return memory


def watch(path: Path, memory: Iterable[tuple[int, int]]) -> Callable[[], None]:
    """Watch what another library has mapped of ``path``, each ``(address, bytes)``, until the answer is called."""
    numbers = [_watch(address, nbytes, path) for address, nbytes in memory]

    def release() -> None:
        for number in numbers:
            _watched.pop(number, None)

    return release


@contextlib.contextmanager
def watched(path: Path, *memory: tuple[int, int]) -> Iterator[None]:
    """:func:`watch` to the end of this.

    Raises
    ------
    CheckpointError
        At the end, if pages were lost meanwhile: what was read of them is wrong.
    """
    before, release = losses(path), watch(path, memory)
    try:
        yield
    finally:
        release()
    if losses(path) > before:
        raise lost(path)


def lost(path: Path) -> CheckpointError:
    """The error for a file of which pages were lost."""
    size = "it is gone"
    with contextlib.suppress(OSError):
        size = f"it has {status(path).st_size:,} bytes by now"
    return CheckpointError(f"{path} became shorter, or the disk failed, while it was read ({size}): what was computed "
                           "since is wrong and dropped; restore the file, then load the model again")  # fmt: skip


def guard() -> None:
    """Have faults in watched pages come here; also where another handler was set since."""
    global _previous
    if not libc.is_supported():
        return
    with _installing:
        found = _Action()
        _sigaction(None, found)
        if found.handler != _handler_address():
            _previous = found.handler or _DEFAULT
            _sigaction(_Action(handler=_handler_address(), flags=_SA_SIGINFO), None)


def _watch(address: int, nbytes: int, path: Path) -> int:
    guard()
    number, end = next(_numbers), address + nbytes
    _watched[number] = (_page(address), end + -end % mmap.PAGESIZE, path)
    return number


def _release(number: int, address: int, nbytes: int) -> None:
    _watched.pop(number, None)  # first: the system may give the address to somebody else
    libc.unmap(address, nbytes)


def _page(address: int) -> int:
    return address // mmap.PAGESIZE * mmap.PAGESIZE


class _Action(ctypes.Structure):
    """``struct sigaction`` as the C libraries of Linux have it."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def _sigaction(new: _Action | None, old: _Action | None) -> None:
    _libc.sigaction(signal.SIGBUS, new and ctypes.byref(new), old and ctypes.byref(old))


def _on_fault(signum: int, info: int, context: int) -> None:
    """In the thread that faulted. Short, and without a lock: it may come in the middle of anything."""
    if ctypes.c_int.from_address(info + _AT_CODE).value > 0:  # of the processor, not sent by somebody
        address = ctypes.c_size_t.from_address(info + _AT_ADDRESS).value
        for start, end, path in list(_watched.values()):
            if start <= address < end and _empty(_page(address), end):
                _losses[path] = _losses.get(path, 0) + 1
                return
    _pass_on(signum, info, context)


def _empty(start: int, end: int) -> bool:
    """Memory of zeros in the place of what a file has lost: the instruction that faulted goes on with it."""
    flags = _MAP_FIXED | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return bool(_libc.mmap(start, end - start, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == start)


def _pass_on(signum: int, info: int, context: int) -> None:
    """To the handler before this one, once (it may end the process by the signal itself); then to the system."""
    global _previous
    previous, _previous = _previous, _DEFAULT
    if previous > signal.SIG_IGN:
        _HANDLER(previous)(signum, info, context)
        return
    _sigaction(_Action(), None)
    if ctypes.c_int.from_address(info + _AT_CODE).value <= 0:
        os.kill(os.getpid(), signum)  # a fault comes again by itself


if sys.platform == "linux":
    # errno is the interrupted code's, and is put back. PyDLL: the interpreter is kept while the pages are replaced.
    _HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, use_errno=True)
    _libc: Any = ctypes.PyDLL(None)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _handler = _HANDLER(_on_fault)  # kept for ever: the system knows its address


def _handler_address() -> int:
    return ctypes.cast(_handler, ctypes.c_void_p).value or 0
