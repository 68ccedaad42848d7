"""The stores that are kept on this machine: what there is, which are meant by a name, and removing them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.hub.repository import repository_folder
from ..config import cache_dir
from ..disk import expanded, free_disk, told
from ..errors import SourceError, StoreError
from ..intake.find.identity import fingerprints_at
from ..store.listing import CachedStore, cached_stores, remove_store
from ..store.names import ADAPTER, BESIDE, POINTER

__all__ = ["CachedStore", "Kept", "choose", "is_only_copy", "kept_stores", "remove_store", "source_is_here"]


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


@told()
def kept_stores(folder: str | Path | None = None) -> Kept:
    """The stores in ``folder``; default: where stores go when no folder is named.

    Raises
    ------
    SourceError
        If a folder is named that is not there.
    """
    base = cache_dir() if folder is None else expanded(folder)
    if folder is not None and not base.is_dir():
        raise SourceError(f"there is no folder {base.absolute()}; check the path")
    return Kept(base, tuple(cached_stores(base, strict=True)), free_disk(base))


def choose(
    kept: Kept, names: Sequence[str] = (), *, unfinished: bool = False, everything: bool = False
) -> list[CachedStore]:
    """The stores that are meant.

    Parameters
    ----------
    names
        Of stores; or what stores were made from, or of models: then all stores of each.
    unfinished
        Those that a conversion left, but none that is being converted now.
    everything
        All of them.

    Raises
    ------
    StoreError
        If a name is of none, or of several models.
    """
    named = [store for name in names for store in _meant(name, kept)]
    return [
        store
        for store in kept.stores
        if everything or store in named or (unfinished and store.state in ("unfinished", "half removed"))
    ]


def _meant(name: str, kept: Kept) -> list[CachedStore]:
    ways = {name, str(expanded(name).absolute())} if "/" in name else {name}
    if exact := [store for store in kept.stores if ways & _names(store)]:
        return exact
    found = [store for store in kept.stores if store.model == name]
    # What is unfinished knows no origin, and is no loss.
    models = {store.made_from: store for store in found if store.state in ("finished", "damaged")}
    if len(models) > 1:
        known = sorted(made_from or store.name for made_from, store in models.items())
        raise StoreError(f"{name} is the name of {len(models)} models in {kept.folder}; name what the stores were made "
                         f"from, or a store: {', '.join(known)}")  # fmt: skip
    if not found:
        known = sorted(set().union(*({store.model} | _names(store) for store in kept.stores)) - {""})
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "airllm-nb cache lists what is there"
        raise StoreError(f"there is no store {name!r} in {kept.folder}; {hint}")
    return found


def _names(store: CachedStore) -> set[str]:
    """What a store alone may be called by; of one that was made from a file on the Hub, its repository too."""
    repo = store.made_from.partition(":")[0] if store.made_from != store.origin else ""
    return {store.name, store.origin, store.made_from, repo} - {""}


def source_is_here(store: CachedStore) -> bool | None:
    """Whether what a store was made from is still on this machine; ``None`` where that is not known.

    Of a model that is all of its weights. Other weights in their place say nothing.
    """
    if not store.origin:
        return None
    with suppress(OSError, ValueError):
        return _is_here(store)
    return False  # it cannot be the name of a file, or not of one that this user may see


def _is_here(store: CachedStore) -> bool | None:
    if not _is_model(store):
        path = Path(store.origin)
        blobs = repository_folder(store.origin) / "blobs"
        return path.exists() if path.is_absolute() else blobs.is_dir() and any(os.scandir(blobs))
    found = fingerprints_at(store.origin)
    if store.source in found:
        return True
    # Where a deletion was cut short, what is left may look like a checkpoint.
    return False if not found or (Path(store.origin) / POINTER).is_file() else None


def is_only_copy(store: CachedStore) -> bool:
    """Whether a model's weights are in this store and, on this machine, nowhere else."""
    return store.state == "finished" and _is_model(store) and source_is_here(store) is False


def _is_model(store: CachedStore) -> bool:
    """Whether the store could be loaded without what it was made from."""
    return store.codec not in (BESIDE, ADAPTER)
