"""What says that weights are the same: fingerprints, by which a store is found again, its source gone or not."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ...checkpoint.hub.repository import cached_commit, cached_contents, repository_folder
from ...config import LoadOptions, cache_dir
from ...disk import status
from ...errors import AirLLMError, CheckpointError
from ...store.listing import CachedStore, cached_stores
from ...store.names import StoreName
from ...tensors.index import SINGLE_FILE, shard_names
from .layout import choose
from .local import clean_name, digest, local_source
from .picks import Room

_SHA256 = re.compile(r"[0-9a-f]{64}")


def by_contents(repo_id: str, contents: Mapping[str, str], weights: Collection[str]) -> str:
    """The fingerprint of a repository: that of the weight files and of config.json, as the Hub names what is in them.

    A commit that changes other files changes nothing. Empty where the sums of the weight files are not known.
    """
    if not weights or not all(_SHA256.fullmatch(contents.get(name, "")) for name in weights):
        return ""
    return digest([repo_id, *(f"{name} {contents.get(name, '')}" for name in ("config.json", *weights))])


def by_commit(repo_id: str, commit: str, weights: Collection[str]) -> str:
    """The fingerprint of a repository where its contents are not known, and in stores of earlier versions."""
    return digest([repo_id, commit, *weights])


def fingerprint(
    name: str, repo_id: str, commit: str, weights: Collection[str], contents: Mapping[str, str], options: LoadOptions
) -> str:
    """By what is in the files, unless a store of an earlier version is there, which has the commit's."""
    base = Path(options.layer_shards_saving_path or cache_dir())
    old, new = by_commit(repo_id, commit, weights), by_contents(repo_id, contents, weights)
    if not new:  # a cache without links does not say it, but a store may know its commit
        finished = (store for store in cached_stores(base.absolute()) if store.state == "finished")
        same = (store for store in finished if store.source.isalnum())  # it becomes part of a path
        named = repo_id, commit, name
        return next((store.source for store in same if (store.origin, store.revision, store.model) == named), old)
    # Without compression the store is called none or normalised.
    of_this = f"{glob.escape(name)}--{options.compression or 'no*'}--*--"
    has_old, has_new = (any(base.glob(of_this + said[:8])) for said in (old, new))
    return old if has_old and not has_new else new


def fingerprints_at(origin: str) -> set[str]:
    """Of the whole checkpoints that are on this machine where a store says that it was made from. The Hub is not asked.

    Parameters
    ----------
    origin
        A path, or a Hub id.
    """
    if Path(origin).is_absolute():
        with suppress(AirLLMError, OSError):
            return {source.fingerprint for source in [local_source(origin, None, Room())] if source is not None}
        return set()
    snapshots = (repository_folder(origin) / "snapshots").glob("*")
    return {print_ for snapshot in snapshots for print_ in _of_snapshot(origin, snapshot)}


def stored(
    repo_id: str, gguf: str | None, options: LoadOptions, weights: Collection[str] = (SINGLE_FILE,)
) -> CachedStore | None:
    """The finished store of a repository whose weights are not here, compressed as ``options`` ask.

    Parameters
    ----------
    gguf
        The GGUF file that is meant, where one is named.
    weights
        The names of the weight files, by which a store of an earlier version tells its commit.
    """
    if options.compression is None:
        return None
    base, commit = Path(options.layer_shards_saving_path or cache_dir()), cached_commit(repo_id, options.revision)
    old = by_commit(repo_id, commit, weights)
    found = [
        store
        for store in cached_stores(base.absolute())
        if (store.origin, store.codec, store.state) == (repo_id, options.compression, "finished")
        and options.dtype in (None, store.dtype)
        and (gguf is None or store.model == clean_name(Path(gguf).stem))
        and store.name == str(StoreName(store.model, store.codec, store.dtype, store.source[:8]))
        and (store.folder / "config.json").is_file()
    ]
    exact = [store for store in found if store.revision == commit or store.source == old]
    if len({store.model for store in exact or found}) > 1:  # of several GGUF files; nobody said which
        return None
    return max(exact or ([] if options.revision else found), key=lambda store: store.used, default=None)


def _of_snapshot(repo_id: str, snapshot: Path) -> Iterator[str]:
    sizes = {path.relative_to(snapshot).as_posix(): status(path).st_size
             for path in snapshot.rglob("*") if path.is_file()}  # fmt: skip
    contents = cached_contents(snapshot)
    for gguf in (None, *(name for name in sizes if name.endswith(".gguf"))):
        with suppress(CheckpointError):
            choice = choose(sizes, repo_id, gguf)
            names = shard_names(snapshot / choice.index) if choice.index else choice.weights
            if all(name in sizes for name in names):
                yield from {by_contents(repo_id, contents, names), by_commit(repo_id, snapshot.name, names)} - {""}
