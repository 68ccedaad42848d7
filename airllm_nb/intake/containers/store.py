"""A compressed store of ours: what it holds is what computes."""

from __future__ import annotations

from typing import Any

import torch

from ...checkpoint.source import Source
from ...store.manifest import Store
from ...tensors.index import CheckpointIndex
from .container import ToWrite, Weights
from .safetensors import Safetensors


class StoreContainer(Safetensors):
    """The store itself was named, or a folder whose weights it replaced."""

    packed_as = ""

    def __init__(self, store: Store):
        self._store, folder = store, store.folder
        self.source = Source(folder.name, folder, "safetensors", store.files, store.nbytes, store.meta.source)

    def index(self, dtype: torch.dtype | None = None) -> CheckpointIndex:
        return self._store.index

    def in_place(self, skeleton: Any) -> Weights:
        return Weights(self._store.folder, self._store.index)

    def written_once(self, dtype: torch.dtype) -> tuple[str, ...]:
        return ()

    def to_write(self, dtype: torch.dtype, encoded: bool) -> ToWrite:
        return ToWrite()
