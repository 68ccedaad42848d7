"""Matrices whose rows are brought to length 1: the only weights of these families that are written anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...progress import ProgressCallback
from ...store.jobs import RowWorkers
from ...store.manifest import Store, StoreMeta
from ...store.shard import Chunk, Item, ShardJob, plain
from ...store.writer import write_store
from ...tensors.dtypes import DTYPE_NAMES
from ...tensors.files import Unchanged
from ...tensors.index import TensorInfo

if TYPE_CHECKING:
    import torch


def write_normalised(
    folder: Path, tensors: Mapping[str, TensorInfo], names: tuple[str, ...], dtype: torch.dtype, meta: StoreMeta,
    progress: ProgressCallback,
) -> Store:  # fmt: skip
    """Write the matrices ``names`` with rows of length 1, computed in float32, as ``dtype``.

    Raises
    ------
    CheckpointError
        If the checkpoint lacks one.
    StoreError
        If the folder cannot be written.
    """
    import torch

    if lacking := [name for name in names if name not in tensors]:
        raise CheckpointError(f"the checkpoint lacks {lacking[0]}; a shard may be missing, download it again")
    workers = RowWorkers(torch.device("cpu"))
    items = tuple(_item(name, tensors[name], dtype, workers) for name in names)
    sources = Unchanged(extent.path for name in names for extent in tensors[name].extents)
    return write_store(folder, [ShardJob("normalised", items)], meta, progress=progress, unchanged=sources)


def _item(name: str, info: TensorInfo, dtype: torch.dtype, workers: RowWorkers) -> Item:
    from torch.nn.functional import normalize

    def produce() -> Iterator[Chunk]:
        return workers.map(info, 1, lambda rows: normalize(rows.float(), dim=1).to(dtype, copy=True))

    return plain(name, DTYPE_NAMES[dtype], info.shape, produce)
