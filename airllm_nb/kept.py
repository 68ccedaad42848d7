"""The stores that are kept on this machine: what there is, which are meant by a name, and removing them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoint.cached import CachedStore, cached_stores, remove_store
from .checkpoint.hub import cache_folder
from .config import cache_dir
from .disk import free_disk
from .errors import SourceError, StoreError

__all__ = ["CachedStore", "Kept", "choose", "kept_stores", "remove_store", "source_is_here"]


@dataclass(frozen=True)
class Kept:
    """The stores of one folder.

    Attributes
    ----------
    free
        Free bytes there; ``None`` where nobody tells.
    """

    folder: Path
    stores: tuple[CachedStore, ...]
    free: int | None

    @property
    def nbytes(self) -> int:
        """What they take together."""
        return sum(store.nbytes for store in self.stores)


def kept_stores(folder: str | Path | None = None) -> Kept:
    """The stores in ``folder``; default: where stores go when no folder is named.

    Raises
    ------
    SourceError
        If a folder is named that is not there.
    """
    base = cache_dir() if folder is None else Path(folder).expanduser()
    if folder is not None and not base.is_dir():
        raise SourceError(f"there is no folder {base.absolute()}; check the path")
    return Kept(base, tuple(cached_stores(base)), free_disk(base))


def choose(
    kept: Kept, names: Sequence[str] = (), *, unfinished: bool = False, everything: bool = False
) -> list[CachedStore]:
    """The stores that are meant.

    Parameters
    ----------
    names
        Of stores; or of models, or what stores were made from: then all stores of each.
    unfinished
        Those that a conversion left, but none that is being converted now.
    everything
        All of them.

    Raises
    ------
    StoreError
        If a name is of none.
    """
    wanted = {name: {name, str(Path(name).expanduser().absolute())} if "/" in name else {name} for name in names}
    known = set().union(*map(_names, kept.stores))
    for name, ways in wanted.items():
        if not known & ways:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "airllm-nb cache lists what is there"
            raise StoreError(f"there is no store {name!r} in {kept.folder}; {hint}")
    given = set().union(*wanted.values())
    return [
        store
        for store in kept.stores
        if everything or given & _names(store) or (unfinished and store.state in ("unfinished", "half removed"))
    ]


def _names(store: CachedStore) -> set[str]:
    """What a store may be called by; of one that was made from a file on the Hub, its repository too."""
    repo = store.made_from.partition(":")[0] if store.made_from != store.origin else ""
    return {store.name, store.model, store.origin, store.made_from, repo} - {""}


def source_is_here(store: CachedStore) -> bool | None:
    """Whether what a store was made from is still on this machine; ``None`` where its origin is not known."""
    if not store.origin:
        return None
    path = Path(store.origin)
    if path.is_absolute():
        return path.exists()
    blobs = cache_folder() / f"models--{store.origin.replace('/', '--')}" / "blobs"
    return blobs.is_dir() and any(os.scandir(blobs))
