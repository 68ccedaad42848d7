"""Whether a disk has room for a store, and what to say when it has not."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import format_bytes
from ..disk import free_disk, nearest
from ..errors import StoreError

if TYPE_CHECKING:
    from .shard import ShardJob

# Manifest, journal and what the file system adds for itself.
OVERHEAD = 4 << 20


def check_space(folder: Path, jobs: list[ShardJob], kept: Mapping[str, Any]) -> None:
    """Raise :class:`StoreError` if what is not ``kept`` does not fit; both sizes are named."""
    need = sum(job.nbytes for job in jobs if job.file not in kept) + OVERHEAD
    free = free_disk(folder)
    if free is not None and need > free:
        raise StoreError(f"the store in {folder} needs {format_bytes(need)} more but {nearest(folder)} has "
                         f"{format_bytes(free)} free; name a folder on a larger disk with "
                         "layer_shards_saving_path=…")  # fmt: skip


def explain(error: OSError, folder: Path) -> StoreError:
    """What the disk refused, with the remedy."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return StoreError(f"the disk of {folder} is full; what is finished is kept: free some space and start again, "
                          "or name a folder on a larger disk with layer_shards_saving_path=…")  # fmt: skip
    return StoreError(f"the store in {folder} cannot be written: {error}; name a writable folder with "
                      "layer_shards_saving_path=…")  # fmt: skip
