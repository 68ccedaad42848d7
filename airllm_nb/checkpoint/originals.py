"""Deleting the weight files that a store replaces: those of a folder, and of the Hub's cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from ..store.manifest import Store

log = logging.getLogger(__name__)


def delete_original(
    store: Store, files: Iterable[Path], cache_root: Path | None = None, before: Callable[[], None] = lambda: None
) -> list[Path]:
    """Delete the source's weight files once every byte of the store is verified; returns what was deleted.

    Parameters
    ----------
    files
        The weight files, and nothing else.
    cache_root
        When given, links are only followed in folders below it.
    before
        Called once the store is verified, and nothing is deleted yet.

    Raises
    ------
    StoreError
        If the store is damaged; then nothing is deleted.
    """
    store.verify()
    before()
    own = {path.resolve() for path in store.files}
    return [gone for path in files if path.resolve() not in own for gone in remove(path, cache_root)]


def is_own(path: Path) -> bool:
    """Whether deleting ``path`` deletes a file of its own folder, and not just a link, or what that points to."""
    return path.is_file() and (not path.is_symlink() or _blob_of(path, None) is not None)


def remove(path: Path, cache_root: Path | None = None) -> list[Path]:
    """Delete one weight file; returns what was deleted.

    A file of the Hub's cache is a link into ``blobs`` of the same repository's folder: both are deleted, the blob only
    where no other revision has it too. A link to anywhere else is left alone, as is what it points to, and logged.
    """
    if not path.is_symlink():
        if not path.is_file():
            return []
        path.unlink()
        return [path]
    blob = _blob_of(path, cache_root)
    if blob is None:
        log.warning("%s is a link to %s, outside of its repository's cache: not deleted", path, path.resolve())
        return []
    path.unlink()
    links = (other for other in blob.parents[1].glob("snapshots/**/*") if other.is_symlink())
    if any(other.resolve() == blob for other in links):
        return [path]
    blob.unlink()
    return [path, blob]


def _blob_of(link: Path, cache_root: Path | None) -> Path | None:
    """What a link in ``<repository>/snapshots/…`` points to, if that is a file in ``<repository>/blobs``."""
    snapshots = next((parent for parent in link.absolute().parents if parent.name == "snapshots"), None)
    if snapshots is None:
        return None
    repository, blob = snapshots.parent.resolve(), link.resolve()
    if cache_root is not None and cache_root.resolve() not in repository.parents:
        return None
    return blob if blob.parent == repository / "blobs" and blob.is_file() else None
