"""Safetensors, in one file or several: what was saved is streamed as it lies."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.hub.headers import Headers
from ...checkpoint.legacy.families import normalised
from ...checkpoint.legacy.normalised import write_normalised
from ...checkpoint.sizes import Holds
from ...checkpoint.source import Source, read_config
from ...disk import read_json
from ...encoding import formats
from ...progress import ProgressCallback
from ...store.manifest import StoreMeta
from ...tensors.dtypes import TORCH_DTYPES
from ...tensors.index import CheckpointIndex, TensorInfo, read_header, read_index
from ..native import native_weights
from .container import ToWrite, Weights, dtype_name

log = logging.getLogger(__name__)


class Safetensors:
    """A folder of safetensors, or a repository of which only headers are here.

    Parameters
    ----------
    headers
        Asked where the files are not here.
    """

    repacks = False

    def __init__(self, source: Source, headers: Headers):
        self.source, self.headers = source, headers

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """``config.json``, with what a file beside it says of how its weights are packed, if they are."""
        config, folder = read_config(self.source), self.source.folder
        file = next((name for name in formats.BESIDE if (folder / name).is_file()), None)
        if file is None or formats.quantisation(config):
            return config
        index = self.index()
        if index is not None and not formats.look_packed(index):
            log.info("%s is left aside: no weight is packed", folder / file)
            return config
        return {**config, "quantization_config": formats.beside(file, read_json(folder / file))}

    @property
    def packed_as(self) -> str:
        return str(formats.quantisation(self.config).get("quant_method", ""))

    def index(self, dtype: torch.dtype | None = None) -> CheckpointIndex | None:
        """What can be read where it lies, for computing in ``dtype``, by the names that the files have for it."""
        return read_index(self.source.folder) if self.source.files else self.headers.index

    def stored_dtype(self) -> torch.dtype | None:
        source, by_file = self.source, None if self.source.files else self.headers.by_file
        if source.files:
            first = read_header(source.files[0])
        else:
            first = dict(by_file[source.folder / source.wanted[0]]) if by_file else {}
        dtypes = (TORCH_DTYPES[info.dtype] for info in first.values() if info.dtype in TORCH_DTYPES)
        # One byte is how a weight is packed, not what to compute in.
        return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), None)

    def holds(self) -> Holds | None:
        index = self.index()
        return None if index is None else Holds.of(index.values())

    def in_place(self, skeleton: Any) -> Weights | None:
        index = self.index(skeleton.dtype)
        return None if index is None else self.native(index, skeleton)

    def written_once(self, dtype: torch.dtype) -> tuple[str, ...]:
        return normalised(read_config(self.source))

    def to_write(self, dtype: torch.dtype, encoded: bool) -> ToWrite:
        return ToWrite(False, self.written_once(dtype), encoded)

    def rewrite(
        self, folder: Path, names: tuple[str, ...], plain: Mapping[str, TensorInfo], dtype: torch.dtype,
        progress: ProgressCallback,
    ) -> None:  # fmt: skip
        """Matrices whose rows are brought to length 1 are all that there can be to write."""
        meta = StoreMeta("none", dtype_name(dtype), self.source.fingerprint)
        write_normalised(folder, plain, names, dtype, meta, progress)

    def native(self, index: Mapping[str, TensorInfo], skeleton: Any) -> Weights | None:
        try:
            plain, packed = native_weights(index, self.config, self.source, skeleton)
        except formats.UnknownShapeError as error:
            self.headers.why_not = str(error)
            return None
        return Weights(self.source.folder, plain, packed)
