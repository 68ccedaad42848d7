"""Files on their way, and what a process that was killed left of them: whoever meets that next removes it.

Ours are known by their names, and whoever writes one has it locked: what is locked, and what others named, stays.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..disk import entries, open_descriptor
from ..errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: nobody can tell what is still being written, so it stays
    fcntl = None  # type: ignore[assignment]

# A small file that is written as a whole; and a shard, which is written under the lock of its store.
_SMALL = re.compile(r"(.+)\.\d+-\d+\.tmp")
_SHARD = re.compile(r"(layer|rest|carried)(-\d{5,})*\.safetensors")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


def begin(path: Path, mode: int) -> tuple[Path, BinaryIO]:
    """A new file beside ``path`` that is to take its place: its name, and itself, locked until it is closed.

    Parameters
    ----------
    mode
        What may be done with it at most.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    while True:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | getattr(os, "O_BINARY", 0)
            descriptor = os.open(temporary, flags, mode)
        except FileExistsError:  # of a process that had our number
            temporary.unlink(missing_ok=True)
            continue
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # else somebody took it for a leftover in the moment before
            return temporary, cast(BinaryIO, os.fdopen(descriptor, "wb"))
        os.close(descriptor)


def sweep(folder: Path, names: Callable[[str], object]) -> None:
    """Remove small files that nobody is writing any more.

    Parameters
    ----------
    names
        Whether we write a file into this folder that would be called so at the end: other programs call theirs alike.
    """
    for path in _listed(folder):
        found = _SMALL.fullmatch(path.name)
        if found and names(found[1]):
            _remove(path)


def is_left(folder: Path) -> bool:
    """Whether shards are there that are not whole; what is to be locked before they are removed, is the store's."""
    return any(_is_part(path) for path in _listed(folder))


def sweep_shards(folder: Path) -> None:
    """Remove shards that are not whole; only for who writes into this store."""
    for path in _listed(folder):
        if _is_part(path):
            path.unlink(missing_ok=True)


def is_shard(name: str) -> bool:
    """Whether a file of a store is called so."""
    return _SHARD.fullmatch(name) is not None


def _is_part(path: Path) -> bool:
    return path.suffix == ".tmp" and is_shard(path.stem) and not path.is_symlink()


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return entries(folder)
    return []


def _remove(path: Path) -> None:
    if fcntl is None:
        return
    with suppress(OSError):
        descriptor = open_descriptor(path, _NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


def refuse_damaged(manifest: Path, error: Exception) -> Any:
    """Raise ``StoreError`` for a manifest that cannot be read.

    Where no shard of ours is beside it, it is another program's, and there is no store: ``None``.
    """
    if any(_SHARD.fullmatch(path.name) for path in entries(manifest.parent)):
        raise StoreError(f"{manifest} is damaged ({error!r}); delete it and convert again") from None
    return None
