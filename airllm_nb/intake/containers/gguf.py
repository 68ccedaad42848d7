"""A GGUF file: its blocks stream as they lie, only vectors and what must be computed is written once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.gguf.header import read_gguf
from ...checkpoint.gguf.in_place import InPlace, in_place
from ...checkpoint.gguf.weights import GGUFWeights, convert_gguf, gguf_config
from ...checkpoint.hub.headers import Headers
from ...checkpoint.mapping import map_checkpoint
from ...checkpoint.sizes import Holds
from ...checkpoint.source import Source
from ...disk import status
from ...progress import ProgressCallback
from ...tensors.index import TensorInfo
from .container import ToWrite, Weights, dtype_name


class GGUF:
    """A GGUF file, or of one on the Hub the header alone: its table and the length of the file are the real ones."""

    packed_as, repacks = "GGUF", True

    def __init__(self, source: Source, headers: Headers):
        self.source, self._path = source, source.gguf_file or source.header

    def stored_dtype(self) -> None:
        """Nothing that says what to compute in."""

    def holds(self) -> Holds | None:
        return read_gguf(self._path).holds if self._path else None

    def in_place(self, skeleton: Any) -> Weights | None:
        if self._path is None:
            return None
        found = sorted_weights(self._path, dtype_name(skeleton.dtype))
        return Weights(self.source.folder, map_checkpoint(found.tensors, skeleton), found.packed)

    def written_once(self, dtype: torch.dtype) -> tuple[str, ...]:
        return sorted_weights(self._path, dtype_name(dtype)).rest if self._path else ()

    def to_write(self, dtype: torch.dtype, encoded: bool) -> ToWrite:
        """Blocks are no rows that can be encoded: to compress them, all is unpacked first."""
        is_whole = encoded or self._path is None
        return ToWrite(is_whole, () if is_whole else self.written_once(dtype), encoded)

    def rewrite(
        self, folder: Path, names: tuple[str, ...], plain: Mapping[str, TensorInfo], dtype: torch.dtype,
        progress: ProgressCallback,
    ) -> None:  # fmt: skip
        convert_gguf(self.source, folder, dtype_name(dtype), names, progress=progress)

    def native(self, index: Mapping[str, TensorInfo], skeleton: Any) -> Weights:
        return Weights(self.source.folder, map_checkpoint(index, skeleton))


def sorted_weights(path: Path, dtype: str) -> InPlace:
    """What of a file is streamed as it lies, and what is written once."""
    stat = status(path)
    return _sorted_weights(path, stat.st_size, stat.st_mtime_ns, dtype)


@functools.lru_cache(maxsize=4)
def _sorted_weights(path: Path, nbytes: int, changed: int, dtype: str) -> InPlace:
    """Seconds for a large model: a plan and a load after it ask several times."""
    file = read_gguf(path)
    return in_place(GGUFWeights(file, gguf_config(file), dtype))
