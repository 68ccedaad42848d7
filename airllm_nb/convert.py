"""Stores: when one is needed, where it is, and writing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.codec import Codec
from .checkpoint.index import CheckpointIndex
from .checkpoint.source import Source
from .config import LoadOptions
from .trace import ProgressCallback

if TYPE_CHECKING:
    import torch


def find_store(source: Source, codec: Codec, dtype: torch.dtype, options: LoadOptions) -> Path | None:
    """The finished store for these options, if there is one and one is needed."""
    return None


def plain_folder(source: Source, dtype: torch.dtype, options: LoadOptions, progress: ProgressCallback) -> Path:
    """A folder of plain safetensors for ``source``: its own, or a store written once from ``.bin`` or GGUF."""
    return source.folder


def write_compressed(
    source: Source, folder: Path, index: CheckpointIndex, skeleton: Any, codec: Codec, dtype: torch.dtype,
    options: LoadOptions, device: torch.device, progress: ProgressCallback,
) -> Path:  # fmt: skip
    """Encode the checkpoint into its store; returns the store's folder."""
    raise NotImplementedError
