"""Straight from download to store: each weight file is downloaded, encoded and deleted before the next one arrives.

The disk holds the store and one weight file at a time; and, where a parameter is merged of tensors in several files,
what :mod:`~airllm_nb.intake.piecewise_plan` carries from one to the next. What is downloaded goes into the store's
own folder, not into the Hub's cache, so that nothing there has to be deleted that another program may want. The journal
of the store knows which files are not needed any more: whatever moment this is killed at, starting it again goes on
from there. (How much of a file that was cut short is kept is the Hub's library's to say; later ones begin it anew.)
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.hub.errors import explained
from ..checkpoint.hub.headers import Headers
from ..checkpoint.hub.repository import cache_folder, reporting_bars
from ..checkpoint.originals import remove
from ..checkpoint.source import Source
from ..config import LoadOptions, format_bytes
from ..disk import free_disk, nearest, open_file, status
from ..errors import CheckpointError, SourceError, StoreError
from ..store.journal import Journal
from ..store.leftovers import is_shard, sweep_shards
from ..store.locks import JOURNAL, MANIFEST, exclusively, locked, sweep_small
from ..store.meta import job_key
from ..store.shard import ShardJob, write_shards
from ..store.space import OVERHEAD, explain
from ..store.writer import Store, StoreMeta, finished_store, read_manifest, write_store
from ..tensors.files import Unchanged
from ..tensors.index import TensorInfo
from ..tensors.inside import inside
from ..trace import Progress, ProgressCallback
from .piecewise_files import check_arrived, weight_sizes
from .piecewise_plan import Jobs, Stage, WeightFile, bytes_needed, plan_stages

log = logging.getLogger(__name__)

# In the store's folder; it goes when only the manifest is left to write.
DOWNLOAD = "download"
# What later versions of the Hub's library leave of a download that was killed, and never use again.
_CUT_SHORT = re.compile(r"\.[0-9a-f]{8}\.incomplete")


def begun(folder: Path) -> bool:
    """Whether an unfinished or a damaged store is there that was begun in this way."""
    return (folder / DOWNLOAD).is_dir() or any(folder.glob("rest-*.safetensors"))


class Piecewise:
    """A store of a checkpoint on the Hub that is written as its weight files are downloaded.

    Parameters
    ----------
    source
        Its weights may be here, in part or as a whole; files of the Hub's cache are read there.
    tensors
        Parameter name → bytes in the files of ``source``, which need not be here.
    folder
        The store's.
    jobs_of
        Makes the shards of tensors.
    """

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, TensorInfo],
        headers: Headers,
        folder: Path,
        jobs_of: Jobs,
        meta: StoreMeta,
        options: LoadOptions,
        progress: ProgressCallback,
    ):
        self._source, self._tensors, self._sizes = source, tensors, weight_sizes(source, headers)
        self._headers, self._folder, self._jobs_of, self._meta = headers, folder, jobs_of, meta
        self._options, self._progress = options, progress
        self._written = self._total = 0

    @property
    def nbytes(self) -> int:
        """How much fuller than now the disk becomes at most while the store is written."""
        return self._need(self._plan(), {})

    def is_better(self) -> bool:
        """Whether it was begun so, was asked for, or the disk has no room for both download and store."""
        if begun(self._folder):
            return True
        if self._source.files or (self._folder / MANIFEST).is_file():  # a damaged store is repaired as it was written
            return False
        if self._options.delete_original:
            return True
        download, store = self._both
        return not _fits(cache_folder(), download, self._folder, store + OVERHEAD)

    @property
    def _both(self) -> tuple[int, int]:
        """Bytes of the download and of the store that would lie beside each other otherwise."""
        download = self._source.missing if self._source.missing is not None else self._source.nbytes
        store = sum(job.nbytes for stage in self._plan() for job in stage.jobs)
        return download, max(store - sum(status(path).st_size for path in self._folder.glob("*.safetensors")), 0)

    def write(self, beside: Callable[[Path], None]) -> Store:
        """Write the store, or what an earlier start left to write, and open it.

        Parameters
        ----------
        beside
            As of :func:`~airllm_nb.store.writer.write_store`.

        Raises
        ------
        StoreError
            If the disk has no room for the store and one weight file, both named; or a shard does not hold what was
            written.
        SourceError
            If a weight file cannot be downloaded. What is finished stays.
        """
        if not self._options.delete_original and not begun(self._folder):
            log.warning(
                "%s: the disk has no room for the download (%s) beside the store (%s): each weight file is encoded and "
                "deleted before the next one is downloaded", self._source.repo_id, *map(format_bytes, self._both),
            )  # fmt: skip
        try:
            with locked(self._folder, self._progress):
                stages = self._plan()
                jobs = [job for stage in stages for job in stage.jobs]
                return finished_store(self._folder, self._meta, jobs) or self._run(stages, jobs, beside)
        except (StoreError, CheckpointError, SourceError):
            raise
        except OSError as error:
            raise explain(error, self._folder) from error

    def _plan(self) -> list[Stage]:
        files, delete = [], self._options.delete_original
        for named, nbytes in self._sizes.items():
            here = named.is_file()
            name = named.relative_to(self._source.folder).as_posix()
            path = named if here else inside(self._folder / DOWNLOAD, name)
            files.append(WeightFile(named, path, nbytes, goes=delete or not here))
        return plan_stages(self._tensors, files, self._folder, self._jobs_of)

    def _run(self, stages: list[Stage], jobs: list[ShardJob], beside: Callable[[Path], None]) -> Store:
        if not (self._folder / JOURNAL).is_file() and not (self._folder / MANIFEST).is_file():
            self._check_space(stages, {})
        sweep_small(self._folder)
        sweep_shards(self._folder)
        for leftover in (self._folder / DOWNLOAD).rglob("*.incomplete"):
            if _CUT_SHORT.search(leftover.name):
                leftover.unlink()
        journal = Journal(self._folder, self._meta.key, self._known())
        (self._folder / MANIFEST).unlink(missing_ok=True)  # of a damaged store; the journal has what is true in it
        wanted = {job.file for stage in stages for job in stage.writes}
        for other in self._folder.glob("*.safetensors"):
            if other.name not in wanted and is_shard(other.name):  # begun in the usual way, whose shards are others
                other.unlink()
        done = self._done(stages, journal)
        self._check_space(stages, done)
        (self._folder / DOWNLOAD).mkdir(exist_ok=True)
        self._total = sum(job.nbytes for stage in stages for job in stage.writes)
        self._written = sum(done.values())
        needed = [stage for stage in stages if stage.writes]
        arrived, total = 0, sum(stage.file.nbytes for stage in needed)
        for stage in stages:
            todo = [job for job in stage.writes if job.file not in done]
            if todo:
                self._bring(stage.file, arrived, total)
            arrived += stage.file.nbytes if stage in needed else 0
            self._write(todo, journal, Unchanged([stage.file.path]))
            if stage.file.goes and stage.file.path.is_file():
                self._verify([job for job in stage.writes if (self._folder / job.file).is_file()], journal)
                self._remove(stage.file)
            for job in stage.used:
                (self._folder / job.file).unlink(missing_ok=True)

        def last(folder: Path) -> None:
            beside(folder)
            shutil.rmtree(folder / DOWNLOAD, ignore_errors=True)

        return write_store(self._folder, jobs, self._meta, beside=last, origin=self._source.origin,
                           revision=self._source.revision or "")  # fmt: skip

    def _known(self) -> dict[str, dict[str, Any]]:
        """The shards of a store that was finished and damaged since."""
        with suppress(StoreError):
            store = read_manifest(self._folder)
            if store is not None and store.meta == self._meta:
                return {shard["file"]: shard for shard in store.shards}
        return {}

    def _write(self, todo: list[ShardJob], journal: Journal, sources: Unchanged) -> None:
        def wrote(file: str, nbytes: int) -> None:
            self._written += nbytes
            sources.check_pages()
            self._progress(Progress("convert", self._written, self._total, detail=file))

        def finished(job: ShardJob, sha256: str) -> None:
            sources.check()
            journal.add({"file": job.file, "key": job_key(job, self._meta), "bytes": job.nbytes, "sha256": sha256})

        write_shards(self._folder, todo, wrote, finished)

    def _done(self, stages: list[Stage], journal: Journal) -> dict[str, int]:
        """Bytes by file of the shards that are written, and of the carried ones that were used already."""

        def is_written(job: ShardJob) -> bool:
            return journal.has(job.file, job_key(job, self._meta), job.nbytes)

        done: dict[str, int] = {}
        for stage in reversed(stages):  # whether a carried shard is needed, later stages say
            done |= {job.file: job.nbytes for job in stage.writes if is_written(job)}
            if all(job.file in done for job in stage.jobs):
                done |= {job.file: job.nbytes for job in stage.used}
        return done

    def _check_space(self, stages: list[Stage], done: Mapping[str, int]) -> None:
        need, folder = self._need(stages, done), nearest(self._folder)
        free = free_disk(folder)
        if free is not None and need > free:
            store = sum(job.nbytes for stage in stages for job in stage.jobs if job.file not in done)
            file = max((stage.file.nbytes for stage in stages if stage.writes), default=0)
            raise StoreError(f"{self._source.repo_id} needs {format_bytes(need)} more on disk though its weight files "
                             f"are deleted one by one (the store {format_bytes(store)}, the largest of them "
                             f"{format_bytes(file)}) but {folder} has {format_bytes(free)} free; free some, or name a "
                             "folder on a larger disk with layer_shards_saving_path=…")  # fmt: skip

    def _need(self, stages: list[Stage], done: Mapping[str, int]) -> int:
        return bytes_needed(stages, nearest(self._folder), lambda job: job.file in done) + OVERHEAD

    def _bring(self, file: WeightFile, arrived: int, total: int) -> None:
        """Download a weight file, if it is not here."""
        from huggingface_hub import hf_hub_download

        repo, path = str(self._source.repo_id), file.path
        is_whole = path.is_file() and status(path).st_size == file.nbytes
        if path != file.named and not is_whole:
            path.unlink(missing_ok=True)
            bars = reporting_bars(self._progress, arrived, total, repo)
            try:
                with explained(repo, self._options):
                    name = file.named.relative_to(self._source.folder).as_posix()
                    hf_hub_download(repo, name, revision=self._source.revision, token=self._options.hf_token,
                                    local_dir=self._folder / DOWNLOAD, tqdm_class=bars)  # fmt: skip
            except SourceError as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
                    raise explain(cause, self._folder) from cause
                raise
            check_arrived(path, file.nbytes, (self._headers.by_file or {}).get(file.named, {}))
        self._progress(Progress("download", arrived + file.nbytes, total, detail=repo))

    def _remove(self, file: WeightFile) -> None:
        """Delete a weight file; one that was here before, unless somebody reads it."""
        if file.path != file.named:
            file.path.unlink()
            return
        with exclusively(file.path.parent) as is_free:
            if is_free:
                remove(file.path)
            else:
                log.warning("%s is read by another process or model: it stays", file.path)

    def _verify(self, jobs: list[ShardJob], journal: Journal) -> None:
        """Read what was written from a file, before that is deleted."""
        done, total = 0, sum(job.nbytes for job in jobs)
        for job in jobs:
            path, digest = self._folder / job.file, hashlib.sha256()
            with open_file(path) as file:
                while block := file.read(8 << 20):
                    digest.update(block)
                    done += len(block)
                    self._progress(Progress("verify", done, total, detail=job.file))
            if digest.hexdigest() != journal.records[job.file]["sha256"]:
                path.unlink()
                raise StoreError(f"{path} was not what was written, and is deleted; check the disk, then start again: "
                                 "what is finished is kept")  # fmt: skip


def _fits(cache: Path, download: int, folder: Path, store: int) -> bool:
    """Whether the disk, or the two disks, have room for both."""
    if status(nearest(cache)).st_dev == status(nearest(folder)).st_dev:
        download = store = download + store
    return all((free := free_disk(path)) is None or need <= free for path, need in ((cache, download), (folder, store)))
