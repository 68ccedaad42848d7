"""Files that are whole or not there, and what a process that was killed left on the way: who meets that removes it.

Ours are known by their names, and whoever writes one has it locked: what is locked, and what others named, stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from ..disk import entries, open_descriptor
from .names import final, is_small, is_unfinished, temporary

try:
    import fcntl
except ImportError:  # Windows: nobody can tell what is still being written, so it stays
    fcntl = None  # type: ignore[assignment]

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a small file by way of a temporary one: it is whole or it is not there, whoever writes it at once.

    Parameters
    ----------
    mode
        What may be done with it at most; the process may have a stricter rule for new files.
    """
    beside, file = begin(path, mode)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":  # still locked, so that nobody takes it for a leftover
                beside.replace(path)
        if os.name == "nt":
            beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def begin(path: Path, mode: int) -> tuple[Path, BinaryIO]:
    """A new file beside ``path`` that is to take its place: its path, and itself, locked until it is closed.

    Parameters
    ----------
    mode
        What may be done with it at most.
    """
    beside = path.with_name(temporary(path.name))
    while True:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | getattr(os, "O_BINARY", 0)
            descriptor = os.open(beside, flags, mode)
        except FileExistsError:  # of a process that had our number
            beside.unlink(missing_ok=True)
            continue
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # else somebody took it for a leftover in the moment before
            return beside, cast(BinaryIO, os.fdopen(descriptor, "wb"))
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the platform can."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path, is_ours: Callable[[str], object] = is_small) -> None:
    """Remove small files that nobody is writing any more.

    Parameters
    ----------
    is_ours
        Whether we write a file into this folder that would be called so at the end: other programs call theirs alike.
    """
    for path in _listed(folder):
        name = final(path.name)
        if name is None or not is_ours(name) or fcntl is None:
            continue
        with suppress(OSError):
            descriptor = open_descriptor(path, _NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def unfinished_shards(folder: Path) -> list[Path]:
    """Shards that are not whole; only who has the store's lock may remove them."""
    return [path for path in _listed(folder) if is_unfinished(path.name) and not path.is_symlink()]


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return entries(folder)
    return []
