"""What the weight files of a repository on the Hub hold, by ranged requests and without their weights.

A safetensors file takes two requests, one for the length of its header and one for the header; a .bin file one for each
of its ends and a small one for each tensor. Files are asked in parallel.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO, cast

from ...config import LoadOptions
from ...disk import open_file, status
from ...progress import Progress, ProgressCallback
from ...tensors.index import CheckpointIndex, TensorInfo, header_length, join_headers, parse_header, read_header
from ...tensors.inside import inside
from ..bin.in_place import tensors_in_place
from ..source import Source
from .errors import unreachable
from .ranges import NoRanges, Ranges
from .remote import RemoteFile
from .repository import offline

log = logging.getLogger(__name__)

AT_ONCE = 8


class Headers:
    """What the weight files of a source hold, where they are not here; asked for on first use.

    Attributes
    ----------
    why_not
        Why there are none, once they were asked for; empty where there are.
    """

    def __init__(self, source: Source, options: LoadOptions, progress: ProgressCallback):
        self._source, self._options, self._progress = source, options, progress
        self.why_not = ""

    @functools.cached_property
    def by_file(self) -> Mapping[Path, Mapping[str, TensorInfo]] | None:
        """The tensors of each file, at the offsets they will have; ``None`` where headers cannot be had.

        Raises
        ------
        CheckpointError
            If a header is damaged.
        """
        return None if self._heads is None else {path: tensors for path, (tensors, _) in self._heads.items()}

    @property
    def sizes(self) -> Mapping[Path, int]:
        """The bytes of each file; empty where headers cannot be had."""
        return {path: size for path, (_, size) in (self._heads or {}).items()}

    @functools.cached_property
    def _heads(self) -> dict[Path, _Head] | None:
        source = self._source
        if source.files or source.repo_id is None or source.revision is None:
            return None
        if source.format == "gguf":
            self.why_not = f"{source.format} files have no header that can be read apart"
        elif self._options.local_files_only or offline():
            self.why_not = "the Hub is not asked for headers (local_files_only=True or HF_HUB_OFFLINE)"
        else:
            return self._asked(source.repo_id, source.revision)
        return None

    @functools.cached_property
    def index(self) -> CheckpointIndex | None:
        """The whole checkpoint, as :func:`~airllm_nb.tensors.index.read_index` gives it once it is here."""
        return None if self.by_file is None else join_headers(self._source.folder, self.by_file)

    def _asked(self, repo_id: str, commit: str) -> dict[Path, _Head] | None:
        key = repo_id, commit, self._source.wanted
        failures: tuple[type[BaseException], ...] = (NoRanges, _NotInPlace, OSError, *unreachable())
        try:
            found = _latest.get(key) or self._all(functools.partial(Ranges, repo_id, commit, self._options.hf_token))
        except failures as error:
            self.why_not = str(error) if isinstance(error, NoRanges | _NotInPlace) else (
                f"the Hub does not give its headers ({type(error).__name__})")  # fmt: skip
            log.info("no headers of %s: %s", repo_id, error)
            return None
        _latest.clear()  # one is enough: it is for the plans of one model under several budgets
        _latest[key] = found
        return found

    def _all(self, ranges: Callable[[str], Ranges]) -> dict[Path, _Head]:
        folder, names = self._source.folder, self._source.wanted
        self._progress(Progress("headers", 0, len(names), "files", repo := str(self._source.repo_id)))
        with ThreadPoolExecutor(AT_ONCE, "headers") as pool:
            running = {pool.submit(_header, inside(folder, name), ranges, name): name for name in names}
            try:
                for done, future in enumerate(as_completed(running), 1):
                    future.result()
                    self._progress(Progress("headers", done, len(names), "files", repo))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return {inside(folder, name): future.result() for future, name in running.items()}


# The tensors of a file, and its bytes.
_Head = tuple[Mapping[str, TensorInfo], int]
# Headers of one commit never change.
_latest: dict[tuple[str, str, tuple[str, ...]], dict[Path, _Head]] = {}


class _NotInPlace(Exception):
    """Its tensors are no plain runs of bytes."""


def _header(path: Path, ranges: Callable[[str], Ranges], name: str) -> _Head:
    if name.endswith(".bin"):
        return _pickled(path, ranges, name)
    if path.is_file():  # an interrupted download left it
        return read_header(path), status(path).st_size
    file = ranges(name)
    start = file.read(0, 8)
    length = header_length(path, start, file.size)
    return parse_header(path, file.read(8, length), file.size), file.size


def _pickled(path: Path, ranges: Callable[[str], Ranges], name: str) -> _Head:
    file = None if path.is_file() else RemoteFile(ranges(name))
    with open_file(path) if file is None else file as opened:
        found = tensors_in_place(path, cast(BinaryIO, opened))
    if found is None and file is not None and file.failure is not None:
        raise file.failure
    if found is None:
        raise _NotInPlace(f"{name} is rewritten once, because its weights cannot be read as they lie")
    return found, status(path).st_size if file is None else file.size
