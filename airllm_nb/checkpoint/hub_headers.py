"""The safetensors headers of a repository on the Hub, by ranged requests: not a byte of a weight is asked for.

A file takes two requests, one for the length of its header and one for the header; files are asked in parallel.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..config import LoadOptions
from ..trace import Progress, ProgressCallback
from .hub import offline, unreachable
from .index import CheckpointIndex, TensorInfo, header_length, join_headers, parse_header, read_header
from .source import Source

log = logging.getLogger(__name__)

AT_ONCE = 8
# Seconds before another attempt.
WAITS = (0.5, 2.0)


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
        source = self._source
        if source.files or source.repo_id is None or source.revision is None:
            return None
        if source.format != "safetensors":
            self.why_not = f"{source.format} files have no header that can be read apart"
        elif self._options.local_files_only or offline():
            self.why_not = "the Hub is not asked for headers (local_files_only=True or HF_HUB_OFFLINE)"
        else:
            return self._asked(source.repo_id, source.revision)
        return None

    @functools.cached_property
    def index(self) -> CheckpointIndex | None:
        """The whole checkpoint, as :func:`~airllm_nb.checkpoint.index.read_index` gives it once it is here."""
        return None if self.by_file is None else join_headers(self._source.folder, self.by_file)

    def _asked(self, repo_id: str, commit: str) -> Mapping[Path, Mapping[str, TensorInfo]] | None:
        if found := _latest.get((repo_id, commit, self._source.wanted)):
            return found
        failures: tuple[type[BaseException], ...] = (_NoRanges, OSError, *unreachable())
        try:
            found = self._all(functools.partial(_Ranges, repo_id, commit, self._options.hf_token))
        except failures as error:
            self.why_not = str(error) if isinstance(error, _NoRanges) else (
                f"the Hub does not give its headers ({type(error).__name__})")  # fmt: skip
            log.info("no headers of %s: %s", repo_id, error)
            return None
        _latest.clear()  # one is enough: it is for the plans of one model under several budgets
        _latest[repo_id, commit, self._source.wanted] = found
        return found

    def _all(self, ranges: Callable[[str], _Ranges]) -> dict[Path, Mapping[str, TensorInfo]]:
        folder, names = self._source.folder, self._source.wanted
        self._progress(Progress("headers", 0, len(names), "files", repo := str(self._source.repo_id)))
        with ThreadPoolExecutor(AT_ONCE, "headers") as pool:
            running = {pool.submit(_header, folder / name, ranges, name): name for name in names}
            try:
                for done, future in enumerate(as_completed(running), 1):
                    future.result()
                    self._progress(Progress("headers", done, len(names), "files", repo))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return {folder / name: future.result() for future, name in running.items()}


# Headers of one commit never change.
_latest: dict[tuple[str, str, tuple[str, ...]], Mapping[Path, Mapping[str, TensorInfo]]] = {}


def _header(path: Path, ranges: Callable[[str], _Ranges], name: str) -> Mapping[str, TensorInfo]:
    if path.is_file():  # an interrupted download left it
        return read_header(path)
    file = ranges(name)
    start = file.read(0, 8)
    length = header_length(path, start, file.size)
    return parse_header(path, file.read(8, length), file.size)


class _NoRanges(Exception):
    """The server sends something else than the bytes that were asked for."""


class _Ranges:
    """One file on the Hub; ``size`` is known after the first read."""

    def __init__(self, repo_id: str, commit: str, token: str | None, name: str):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        self.size, self._name = 0, name
        self._url = hf_hub_url(repo_id, name, revision=commit)
        # Packed, a range of the file would be a range of something else.
        self._headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}

    def read(self, first: int, count: int) -> bytes:
        """Exactly these bytes; of a server that knows no ranges nothing is read beyond its head."""
        for wait in WAITS:
            try:
                return self._read(first, count)
            except unreachable() as error:
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if status < 500 and status != 429:
                    raise
                log.debug("%s once more: %s", self._name, error)
            time.sleep(wait)
        return self._read(first, count)

    def _read(self, first: int, count: int) -> bytes:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        data, timeout = bytearray(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        asked = self._headers | {"Range": f"bytes={first}-{first + count - 1}"}
        with get_session().stream("GET", self._url, headers=asked, timeout=timeout) as response:
            hf_raise_for_status(response)
            self.size = _size(response, first)
            for block in response.iter_bytes():
                data += block
                if len(data) > count:
                    break
        if len(data) != min(count, self.size - first):
            raise _NoRanges("the server does not send the ranges that it is asked for")
        return bytes(data)


def _size(response: Any, first: int) -> int:
    """The size of the whole file, from the head of a partial answer."""
    served, _, size = str(response.headers.get("Content-Range", "")).partition("/")
    if response.status_code != 206 or not served.startswith(f"bytes {first}-") or not size.isdecimal():
        raise _NoRanges("the server sends whole files only")
    return int(size)
