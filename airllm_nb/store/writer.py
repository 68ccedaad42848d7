"""The store: a folder of safetensors shards and ``manifest.json``, written last. Resumable, atomic, checksummed.

Whatever moment a conversion is killed at, starting it again completes it, and the result is the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..disk import open_file, read_json, status
from ..encoding.linear import Part
from ..errors import AirLLMError, FileError, StoreError
from ..tensors.files import Unchanged
from ..tensors.index import CheckpointIndex, TensorInfo, read_header
from ..tensors.inside import inside
from ..trace import Progress, ProgressCallback, silent
from .journal import Journal, write_atomically
from .leftovers import refuse_damaged, sweep_shards
from .locks import MANIFEST, locked, sweep_small, tidy
from .meta import FORMAT, StoreMeta, job_key
from .shard import PAD, Item, ShardJob, plain, write_shards
from .space import OVERHEAD, check_space, explain

__all__ = [
    "MANIFEST", "OVERHEAD", "Item", "ShardJob", "Store", "StoreMeta", "open_store", "plain", "write_store",
]  # fmt: skip

_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors \d+ [0-9a-f]{64}")


class Store:
    """A finished store; holds no weights.

    Attributes
    ----------
    folder
        Where it is.
    meta
        What it is of.
    parts
        Parameter name → the parts that it became.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder = folder
        self.meta = StoreMeta(manifest["codec"], manifest["dtype"], manifest["source"])
        self.shards: list[dict[str, Any]] = manifest["shards"]
        said = (f"{inside(folder, s['file']).relative_to(folder)} {s['bytes']!r} {s['sha256']}" for s in self.shards)
        if not all(map(_SHARD.fullmatch, said)):
            raise ValueError("a shard's entry makes no sense")
        self.parts: dict[str, tuple[Part, ...]] = {
            name: tuple(Part(p["attribute"], p["dtype"], tuple(p["shape"])) for p in parameter["parts"])
            for name, parameter in manifest["parameters"].items()
        }

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.folder / shard["file"] for shard in self.shards)

    @property
    def nbytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    @functools.cached_property
    def index(self) -> CheckpointIndex:
        """The stored tensors by name, the parts of encoded parameters included, padding left out."""
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            tensors |= {name: info for name, info in read_header(file).items() if not name.startswith(PAD)}
        return CheckpointIndex(self.folder, tensors, self.files)

    def verify(self, progress: ProgressCallback = silent) -> None:
        """Read every byte and compare it with what was written.

        Raises
        ------
        StoreError
            If a shard is not what it was; the message names it.
        """
        self.check()
        done = 0
        for shard in self.shards:
            path, digest = self.folder / shard["file"], hashlib.sha256()
            with open_file(path) as file:
                while block := file.read(8 << 20):
                    digest.update(block)
                    done += len(block)
                    progress(Progress("verify", done, self.nbytes, detail=shard["file"]))
            if digest.hexdigest() != shard["sha256"]:
                raise StoreError(f"{path} is not what was written (its sha256 begins {digest.hexdigest()[:12]}, the "
                                 f"manifest has {shard['sha256'][:12]}); delete it and convert again")  # fmt: skip

    def check(self) -> None:
        """Raise :class:`StoreError` if a shard is missing or has another size."""
        for shard in self.shards:
            path = self.folder / shard["file"]
            size = status(path).st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
                raise StoreError(f"{path} {found}; convert again, the other shards are kept")


def open_store(folder: Path) -> Store | None:
    """The finished store in ``folder``, or ``None`` when there is none; sizes are checked, sums are not.

    Raises
    ------
    StoreError
        If the manifest or a shard is damaged, or was written by a newer version.
    """
    store = read_manifest(folder)
    if store is not None:
        store.check()
        tidy(folder)
    return store


def write_store(
    folder: Path,
    jobs: Iterable[ShardJob],
    meta: StoreMeta,
    *,
    progress: ProgressCallback = silent,
    should_stop: Callable[[], bool] | None = None,
    beside: Callable[[Path], None] | None = None,
    origin: str = "",
    revision: str = "",
    unchanged: Unchanged = Unchanged(()),  # noqa: B008 - of no files
) -> Store:
    """Write a store, or what an earlier start left to write, and open it.

    Parameters
    ----------
    folder
        Made if it is not there. One process writes at a time; a second one waits and finds the store done.
    jobs
        The shards; their data is asked for in order, that of a few at once where they allow it.
    meta
        What the store is of. Shards of an unfinished store with another meta are discarded.
    should_stop
        Asked at every step; what is finished then stays.
    beside
        Writes config and tokenizer into the folder: after the weights, before the manifest, so that what has a manifest
        is complete.
    origin
        Hub id or path of the source.
    revision
        Of a Hub id, the commit.
    unchanged
        The files that the data comes from: what was made of one that changes meanwhile is not kept.

    Raises
    ------
    StoreError
        If the disk has no room (both sizes are named), the folder holds a finished store of something else, or
        ``should_stop`` said so.
    """
    jobs, stop = list(jobs), should_stop or (lambda: False)
    if (done := finished_store(folder, meta, jobs)) is not None:
        return done
    if not folder.exists():
        check_space(folder, jobs, {})
    try:
        with locked(folder, progress, stop, sum(job.nbytes for job in jobs)):
            if (done := finished_store(folder, meta, jobs)) is not None:
                return done
            writing = _Writing(folder, jobs, meta, progress, stop, unchanged)
            return writing.run(beside, {"origin": origin, "revision": revision})
    except AirLLMError:
        raise
    except OSError as error:
        raise explain(error, folder) from error


class _Writing:
    def __init__(
        self, folder: Path, jobs: list[ShardJob], meta: StoreMeta, progress: ProgressCallback,
        stop: Callable[[], bool], sources: Unchanged,
    ):  # fmt: skip
        self._folder, self._jobs, self._meta = folder, jobs, meta
        self._progress, self._stop, self._sources = progress, stop, sources
        self._total, self._done = sum(job.nbytes for job in jobs), 0

    def run(self, beside: Callable[[Path], None] | None, where_from: Mapping[str, str]) -> Store:
        sweep_small(self._folder)
        sweep_shards(self._folder)
        journal = Journal(self._folder, self._meta.key, self._known())
        done = [job for job in self._jobs if journal.has(job.file, job_key(job, self._meta), job.nbytes)]
        kept = {job.file: journal.records[job.file] for job in done}
        check_space(self._folder, self._jobs, kept)
        self._done = sum(record["bytes"] for record in kept.values())

        def finished(job: ShardJob, sha256: str) -> None:
            self._sources.check()  # at every step only what costs nothing
            journal.add({"file": job.file, "key": job_key(job, self._meta), "bytes": job.nbytes, "sha256": sha256})

        write_shards(self._folder, [job for job in self._jobs if job.file not in kept], self._wrote, finished)
        if beside is not None:
            beside(self._folder)
        manifest = self._manifest(journal.records) | {key: said for key, said in where_from.items() if said}
        write_atomically(self._folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
        journal.remove()
        store = open_store(self._folder)
        assert store is not None
        return store

    def _wrote(self, file: str, nbytes: int) -> None:
        self._done += nbytes
        self._sources.check_pages()
        self._progress(Progress("convert", self._done, self._total, detail=file))
        if self._stop():
            raise StoreError(f"the conversion into {self._folder} was stopped; start it again to go on from there")

    def _known(self) -> dict[str, dict[str, Any]]:
        with suppress(StoreError):
            store = read_manifest(self._folder)
            if store is not None and store.meta == self._meta:
                return {shard["file"]: shard for shard in store.shards}
        return {}

    def _manifest(self, records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        parameters = {
            item.name: {"dtype": item.dtype, "shape": list(item.shape), "parts": [asdict(part) for part in item.parts]}
            for job in self._jobs
            for item in job.items
        }
        shards = [records[job.file] for job in self._jobs]
        return {**asdict(self._meta), "format": FORMAT, "shards": shards, "parameters": parameters}


def finished_store(folder: Path, meta: StoreMeta, jobs: list[ShardJob]) -> Store | None:
    """The finished store, if it is this one; ``None`` if there is work to do, damage to repair included."""
    try:
        store = open_store(folder)
    except StoreError:
        if _is_newer(folder):
            raise
        return None
    if store is None:
        return None
    if store.meta != meta or [shard.get("key") for shard in store.shards] != [job_key(job, meta) for job in jobs]:
        raise StoreError(f"{folder} holds a store of other weights or with other options ({store.meta.codec}, "
                         f"{store.meta.dtype}); name another folder or delete this one")  # fmt: skip
    return store


def read_manifest(folder: Path) -> Store | None:
    """What a finished store says of itself, its files not looked at; ``None`` where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    if _is_newer(folder):
        raise StoreError(f"{path} was written by a newer version of airllm_nb; update it, or delete {folder}")
    try:
        return Store(folder, read_json(path))
    except FileError:
        raise  # the disk's fault: the store may be whole
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return refuse_damaged(path, error)


def _is_newer(folder: Path) -> bool:
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return int(read_json(folder / MANIFEST).get("format", 0)) > FORMAT
    return False
