"""Straight from download to store: each weight file is downloaded, encoded and deleted before the next one arrives.

The disk holds the store and one weight file at a time; and, where a parameter is merged of tensors in several files,
what :mod:`~airllm_nb.store.portions` carries from one to the next. What is downloaded goes into the store's own folder,
not into the Hub's cache, so that nothing there has to be deleted that another program may want. The journal of the
store knows which files are not needed any more: whatever moment this is killed at, starting it again goes on from
there. (How much of a file that was cut short is kept is the Hub's library's to say; later ones begin it anew.)
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ..checkpoint.bin.in_place import tensors_in_place
from ..checkpoint.hub.errors import explained
from ..checkpoint.hub.headers import Headers
from ..checkpoint.hub.repository import cache_folder, reporting_bars
from ..checkpoint.originals import remove
from ..checkpoint.source import Source
from ..config import LoadOptions, format_bytes
from ..disk import free_disk, nearest, open_file, status
from ..errors import CheckpointError, SourceError
from ..progress import Progress, ProgressCallback
from ..store.locks import exclusively, locked
from ..store.manifest import Store, StoreMeta
from ..store.names import DOWNLOAD, MANIFEST
from ..store.portions import Jobs, Portion, WeightFile, bytes_needed, plan_portions
from ..store.space import FULL, OVERHEAD, explain
from ..store.writer import Writer
from ..tensors.index import TensorInfo
from ..tensors.inside import inside

log = logging.getLogger(__name__)

# What later versions of the Hub's library leave of a download that was killed, and never use again.
_CUT_SHORT = re.compile(r"\.[0-9a-f]{8}\.incomplete")


def is_piecewise(folder: Path) -> bool:
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
        self._source, self._tensors, self._headers = source, tensors, headers
        self._folder, self._jobs_of, self._meta = folder, jobs_of, meta
        self._options, self._progress = options, progress

    @property
    def nbytes(self) -> int:
        """How much fuller than now the disk becomes at most while the store is written."""
        return bytes_needed(self._portions(), self._folder, lambda job: False) + OVERHEAD

    def is_better(self) -> bool:
        """Whether it was begun so, was asked for, or the disk has no room for both download and store."""
        if is_piecewise(self._folder):
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
        store = sum(job.nbytes for portion in self._portions() for job in portion.jobs)
        return download, max(store - sum(status(path).st_size for path in self._folder.glob("*.safetensors")), 0)

    def _portions(self) -> list[Portion]:
        """A portion for each weight file: where it is if it is here, else where it is downloaded to."""
        files, source = [], self._source
        for named in [inside(source.folder, name) for name in source.wanted] or source.files:
            is_here = named.is_file()
            nbytes = status(named).st_size if is_here else self._headers.sizes.get(named, 0)
            path = named if is_here else inside(self._folder / DOWNLOAD, self._name(named))
            files.append(WeightFile(named, path, nbytes, goes=self._options.delete_original or not is_here))
        return plan_portions(self._tensors, files, self._folder, self._jobs_of)

    def _name(self, named: Path) -> str:
        return named.relative_to(self._source.folder).as_posix()

    def write(self, beside: Callable[[Path], None]) -> Store:
        """Write the store, or what an earlier start left to write, and open it.

        Parameters
        ----------
        beside
            As of :class:`~airllm_nb.store.writer.Writer`.

        Raises
        ------
        StoreError
            If the disk has no room for the store and one weight file, both named; or a shard does not hold what was
            written.
        SourceError
            If a weight file cannot be downloaded. What is finished stays.
        """
        if not self._options.delete_original and not is_piecewise(self._folder):
            log.warning(
                "%s: the disk has no room for the download (%s) beside the store (%s): each weight file is encoded and "
                "deleted before the next one is downloaded", self._source.repo_id, *map(format_bytes, self._both),
            )  # fmt: skip

        def last(folder: Path) -> None:
            beside(folder)
            shutil.rmtree(folder / DOWNLOAD, ignore_errors=True)

        with locked(self._folder, self._progress):  # what is here already, the one who has the lock sees
            for leftover in (self._folder / DOWNLOAD).rglob("*.incomplete"):
                if _CUT_SHORT.search(leftover.name):
                    leftover.unlink(missing_ok=True)
            portions = self._portions()
            files = [portion.file for portion in portions if portion.file is not None and portion.writes]
            total = sum(file.nbytes for file in files)

            def bring(file: WeightFile) -> None:
                self._bring(file, sum(before.nbytes for before in files[: files.index(file)]), total)

            return Writer(
                self._folder, self._meta, self._progress, beside=last, origin=self._source.origin,
                revision=self._source.revision or "", bring=bring, remove=_remove,
            ).write(portions)  # fmt: skip

    def _bring(self, file: WeightFile, arrived: int, total: int) -> None:
        """Download a weight file, if it is not here."""
        from huggingface_hub import hf_hub_download

        repo, path, target = str(self._source.repo_id), file.path, self._folder / DOWNLOAD
        target.mkdir(exist_ok=True)  # also where nothing is downloaded: it says how the store was begun
        is_whole = path.is_file() and status(path).st_size == file.nbytes
        if path != file.named and not is_whole:
            path.unlink(missing_ok=True)
            bars = reporting_bars(self._progress, arrived, total, repo)
            try:
                with explained(repo, self._options):
                    hf_hub_download(repo, self._name(file.named), revision=self._source.revision, local_dir=target,
                                    token=self._options.hf_token, tqdm_class=bars)  # fmt: skip
            except SourceError as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and cause.errno in FULL:
                    raise explain(cause, self._folder) from cause
                raise
            _check_arrived(path, file.nbytes, (self._headers.by_file or {}).get(file.named, {}))
        self._progress(Progress("download", arrived + file.nbytes, total, detail=repo))


def _check_arrived(path: Path, nbytes: int, said: Mapping[str, TensorInfo]) -> None:
    """Raise ``CheckpointError`` if a file that was downloaded has not the tensors of its header on the Hub."""
    if status(path).st_size != nbytes:
        raise CheckpointError(f"{path} has {status(path).st_size:,} bytes, its header asks for {nbytes:,}; load again "
                              "to download it once more")  # fmt: skip
    if path.suffix != ".bin":
        return
    with open_file(path) as opened:
        found = tensors_in_place(path, opened) or {}
    if any(name not in found or _lies(info) != _lies(found[name]) for name, info in said.items()):
        raise CheckpointError(f"{path} is not the file that its header on the Hub is of; delete it and load again")


def _lies(info: TensorInfo) -> tuple[object, ...]:
    return info.dtype, info.shape, [(extent.offset, extent.nbytes) for extent in info.extents]


def _remove(file: WeightFile) -> None:
    """Delete a weight file; one that was here before, unless somebody reads it."""
    if file.path != file.named:
        file.path.unlink()
        return
    with exclusively(file.path.parent) as is_free:
        if is_free:
            remove(file.path)
        else:
            log.warning("%s is read by another process or model: it stays", file.path)


def _fits(cache: Path, download: int, folder: Path, store: int) -> bool:
    """Whether the disk, or the two disks, have room for both."""
    if status(nearest(cache)).st_dev == status(nearest(folder)).st_dev:
        download = store = download + store
    return all((free := free_disk(path)) is None or need <= free for path, need in ((cache, download), (folder, store)))
