"""``pytorch_model*.bin``: read in place where every tensor is a plain run of bytes that is no wider than needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...checkpoint.bin.in_place import is_wide, pickle_index
from ...checkpoint.bin.pickles import convert_pickles, load_pickle
from ...progress import ProgressCallback
from ...tensors.index import CheckpointIndex, TensorInfo
from .container import ToWrite, dtype_name
from .safetensors import Safetensors

WIDEST = 8  # bytes of a value


class Bin(Safetensors):
    """A folder of pickles, or a repository of which only their ends are here."""

    def index(self, dtype: torch.dtype | None = None) -> CheckpointIndex | None:
        widest = dtype.itemsize if dtype else WIDEST
        if self.source.files:
            return pickle_index(self.source.files, widest)
        found = self.headers.index
        if dtype is not None and found is not None and is_wide(found, widest):
            self.headers.why_not = f"its weights are rewritten once, as {dtype_name(dtype)}"
            return None
        return found

    def stored_dtype(self) -> torch.dtype | None:
        if not self.source.files:
            return super().stored_dtype()
        return next((t.dtype for t in load_pickle(self.source.files[0]).values() if t.is_floating_point()), None)

    def to_write(self, dtype: torch.dtype, encoded: bool) -> ToWrite:
        return ToWrite(self.index(dtype) is None, self.written_once(dtype), encoded)

    def rewrite(
        self, folder: Path, names: tuple[str, ...], plain: Mapping[str, TensorInfo], dtype: torch.dtype,
        progress: ProgressCallback,
    ) -> None:  # fmt: skip
        if names:
            super().rewrite(folder, names, plain, dtype, progress)
        else:
            convert_pickles(self.source, folder, dtype_name(dtype), progress=progress)
