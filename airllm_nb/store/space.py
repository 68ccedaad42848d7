"""Whether a disk has room for what is to be written, and what to say when it has not."""

from __future__ import annotations

import errno
from pathlib import Path

from ..config import format_bytes
from ..disk import free_disk, nearest
from ..errors import StoreError

# Manifest, journal and what the file system adds for itself.
OVERHEAD = 4 << 20
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def check_space(folder: Path, need: int, who: str, more: str, remedy: str) -> None:
    """Raise :class:`StoreError` if the disk has not ``need`` bytes; both sizes are named."""
    free = free_disk(folder)
    if free is not None and need > free:
        raise StoreError(f"{who} needs {format_bytes(need)}{more} but {nearest(folder)} has {format_bytes(free)} free; "
                         f"{remedy}")  # fmt: skip


def explain(error: OSError, folder: Path) -> StoreError:
    """What the disk refused, with the remedy."""
    if error.errno in FULL:
        return StoreError(f"the disk of {folder} is full; what is finished is kept: free some space and start again, "
                          "or name a folder on a larger disk with layer_shards_saving_path=…")  # fmt: skip
    return StoreError(f"the store in {folder} cannot be written: {error}; name a writable folder with "
                      "layer_shards_saving_path=…")  # fmt: skip
