"""The one writer of stores. Whatever moment it is killed at, starting it again completes the store: the same bytes.

What is written is cut into portions. Where all source files are here, there is one; where they come one after the
other, each has a portion of its own, and is deleted once what was written of it is verified.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import format_bytes
from ..disk import open_file, status
from ..errors import AirLLMError, CheckpointError, StoreError
from ..progress import Progress, ProgressCallback, silent
from ..tensors.files import Unchanged
from ..tensors.inside import inside
from .atomic import sweep, unfinished_shards, write_atomically
from .locks import locked
from .manifest import FORMAT, Store, StoreMeta, damaged, finished_store, open_store, read_manifest
from .names import JOURNAL, MANIFEST, is_shard, parse_expert
from .portions import Portion, WeightFile, bytes_needed
from .shard import ShardJob, write_shards
from .space import OVERHEAD, check_space, explain

log = logging.getLogger(__name__)


def write_store(folder: Path, jobs: Iterable[ShardJob], meta: StoreMeta, **how: Any) -> Store:
    """Write a store whose source files are all here, and open it; ``how`` are the other attributes of a Writer."""
    return Writer(folder, meta, **how).write([Portion(tuple(jobs))])


@dataclass
class Writer:
    """Writes one store, or what an earlier start left to write.

    Attributes
    ----------
    folder
        Made if it is not there. One process writes at a time; a second one waits and finds the store done.
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
        The files that the data comes from, where portions name none: what was made of one that changes meanwhile is not
        kept.
    bring, remove
        Makes a portion's file be here, and deletes it.
    """

    folder: Path
    meta: StoreMeta
    progress: ProgressCallback = silent
    should_stop: Callable[[], bool] = lambda: False
    beside: Callable[[Path], None] | None = None
    origin: str = ""
    revision: str = ""
    unchanged: Unchanged = Unchanged(())  # noqa: RUF009 - of no files
    bring: Callable[[WeightFile], None] = lambda file: None
    remove: Callable[[WeightFile], None] = lambda file: None
    _total: int = field(default=0, init=False)
    _reached: int = field(default=0, init=False)

    def write(self, portions: Sequence[Portion]) -> Store:
        """Write what is missing, and open the store.

        Parameters
        ----------
        portions
            Their shards' data is asked for in order, that of a few at once where they allow it.

        Raises
        ------
        StoreError
            If the disk has no room (both sizes are named), a shard is damaged before its source is deleted, the folder
            holds a finished store of something else, or ``should_stop`` said so.
        """
        jobs = [job for portion in portions for job in portion.jobs]
        if (done := finished_store(self.folder, self.meta, jobs)) is not None:
            return done
        try:
            with locked(self.folder, self.progress, self.should_stop, sum(job.nbytes for job in jobs)):
                return finished_store(self.folder, self.meta, jobs) or self._write(portions, jobs)
        except AirLLMError:
            raise
        except OSError as error:
            raise explain(error, self.folder) from error

    def _write(self, portions: Sequence[Portion], jobs: list[ShardJob]) -> Store:
        sweep(self.folder)
        # Shards with other names were cut in another way.
        others = {path.name for path in self.folder.glob("*.safetensors") if is_shard(path.name)}
        others -= {job.file for portion in portions for job in portion.writes}
        for leftover in unfinished_shards(self.folder):
            leftover.unlink(missing_ok=True)
        journal = Journal(self.folder, self.meta.key, self._of_manifest())
        done = self._done(portions, journal)
        self._check_space(portions, done)
        journal.start()
        for name in others:
            (self.folder / name).unlink(missing_ok=True)
        if any(portion.file is not None for portion in portions):
            # Of a damaged store: what is true in it, the journal has, and soon the weight files are not all here.
            (self.folder / MANIFEST).unlink(missing_ok=True)
        self._total = sum(job.nbytes for portion in portions for job in portion.writes)
        self._reached = sum(done.values())
        for portion in portions:
            self._run(portion, [job for job in portion.writes if job.file not in done], journal)
        if self.beside is not None:
            self.beside(self.folder)
        write_atomically(self.folder / MANIFEST, self._manifest(jobs, journal.records))
        journal.remove()
        store = open_store(self.folder)
        assert store is not None
        return store

    def _of_manifest(self) -> dict[str, dict[str, Any]]:
        """The shards of a store that was finished and damaged since."""
        with suppress(StoreError):
            store = read_manifest(self.folder)
            if store is not None and store.meta == self.meta:
                return {shard["file"]: shard for shard in store.shards}
        return {}

    def _done(self, portions: Sequence[Portion], journal: Journal) -> dict[str, int]:
        """Bytes by file of the shards that are written, and of the carried ones that were used already."""
        done: dict[str, int] = {}
        for portion in reversed(portions):  # whether a carried shard is needed, later portions say
            done |= {job.file: job.nbytes for job in portion.writes
                     if journal.has(job.file, self.meta.key_of(job), job.nbytes)}  # fmt: skip
            if all(job.file in done for job in portion.jobs):
                done |= {job.file: job.nbytes for job in portion.used}
        return done

    def _check_space(self, portions: Sequence[Portion], done: Collection[str]) -> None:
        who, more, remedy = f"the store in {self.folder}", " more", ""
        if files := [portion.file.nbytes for portion in portions if portion.file is not None and portion.writes]:
            store = sum(job.nbytes for portion in portions for job in portion.jobs if job.file not in done)
            who, remedy = self.origin, "free some, or "
            more = (" more on disk though its weight files are deleted one by one (the store "
                    f"{format_bytes(store)}, the largest of them {format_bytes(max(files))})")  # fmt: skip
        need = bytes_needed(portions, self.folder, lambda job: job.file in done) + OVERHEAD
        remedy += "name a folder on a larger disk with layer_shards_saving_path=…"
        check_space(self.folder, need, who, more, remedy)

    def _run(self, portion: Portion, todo: list[ShardJob], journal: Journal) -> None:
        file = portion.file
        if todo and file is not None:
            self.bring(file)
        sources = self.unchanged if file is None else Unchanged([file.path])

        def wrote(name: str, nbytes: int) -> None:
            self._reached += nbytes
            sources.check_pages()
            self.progress(Progress("convert", self._reached, self._total, detail=name))
            if self.should_stop():
                raise StoreError(f"the conversion into {self.folder} was stopped; start it again to go on from there")

        def finished(job: ShardJob, sha256: str) -> None:
            sources.check()  # at every step only what costs nothing
            key = self.meta.key_of(job)
            journal.add({"file": job.file, "key": key, "bytes": job.nbytes, "sha256": sha256})

        write_shards(self.folder, todo, wrote, finished)
        if file is not None and file.goes and file.path.is_file():
            records = [journal.records[job.file] for job in portion.writes if (self.folder / job.file).is_file()]
            for path, *_ in damaged(self.folder, records, self.progress):
                path.unlink()
                raise StoreError(f"{path} was not what was written, and is deleted; check the disk, then start again: "
                                 "what is finished is kept")  # fmt: skip
            self.remove(file)
        for job in portion.used:
            (self.folder / job.file).unlink(missing_ok=True)

    def _manifest(self, jobs: list[ShardJob], records: Mapping[str, dict[str, Any]]) -> bytes:
        apart = {item.name: parse_expert(item.name) for job in jobs for item in job.items}
        parameters = {
            item.name: {"dtype": item.dtype, "shape": list(item.shape), "parts": [asdict(part) for part in item.parts]}
            for job in jobs
            for item in job.items
            if (expert := apart[item.name]) is None or expert[1] == 0  # the others are as the first
        }
        said = {"origin": self.origin, "revision": self.revision}
        version = FORMAT if any(apart.values()) else 1
        manifest = {**asdict(self.meta), "format": version, "shards": [records[job.file] for job in jobs],
                    "parameters": parameters, **{key: value for key, value in said.items() if value}}  # fmt: skip
        return json.dumps(manifest, indent=1, sort_keys=True).encode()


class Journal:
    """The finished shards of an unfinished store, one line each, synced before the next shard begins.

    A line that a kill cut short is ignored, and so is a journal of another configuration, whose shards are removed.

    Parameters
    ----------
    folder
        The store's.
    key
        Identifies source, codec, dtype and format.
    known
        Records that are true already, from the manifest of a damaged store.
    """

    def __init__(self, folder: Path, key: str, known: Mapping[str, dict[str, Any]]):
        self._path, self._key = folder / JOURNAL, key
        self.records: dict[str, dict[str, Any]] = {**known, **self._read()}

    def start(self) -> None:
        """Write it anew, so that a line cut short is never continued."""
        write_atomically(self._path, b"".join(_line(r) for r in [{"key": self._key}, *self.records.values()]))

    def add(self, record: dict[str, Any]) -> None:
        """Record a shard that is on the disk."""
        with self._path.open("ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self.records[record["file"]] = record

    def has(self, file: str, key: str, nbytes: int) -> bool:
        """Whether a shard is recorded so, and there."""
        record, path = self.records.get(file), self._path.parent / file
        return (record is not None and record["key"] == key
                and path.is_file() and status(path).st_size == record["bytes"] == nbytes)  # fmt: skip

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        with suppress(FileNotFoundError), open_file(self._path) as file:
            for line in file:
                with suppress(ValueError):
                    value = json.loads(line)
                    lines += [value] if isinstance(value, dict) else []
        if lines and lines[0].get("key") != self._key:
            log.warning("%s: the unfinished conversion there had another configuration; starting anew", self._path)
            for name in (str(line.get("file", "")) for line in lines[1:]):
                if name.endswith(".safetensors") and "/" not in name:
                    with suppress(FileNotFoundError, CheckpointError):
                        inside(self._path.parent, name).unlink()
            return {}
        return {line["file"]: line for line in lines[1:] if {"file", "key", "bytes", "sha256"} <= line.keys()}


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode() + b"\n"
