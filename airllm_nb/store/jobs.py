"""Source weights → the jobs that write a store: read in chunks of rows, cast, encode."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch

from ..disk import open_file, status
from ..encoding.ours import Codec
from ..errors import CheckpointError
from ..tensors.dtypes import TORCH_DTYPES
from ..tensors.index import TensorInfo
from ..tensors.rows import RowWorkers
from .shard import Chunk, Item, ShardJob

log = logging.getLogger(__name__)

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
CASTABLE = ("F64", "F32", "F16", "BF16")

SAMPLES, SAMPLE_BYTES = 16, 4096


def encode_jobs(
    index: Mapping[str, TensorInfo],
    codec: Codec,
    compressed: Collection[str],
    dtype: torch.dtype,
    *,
    keep: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> list[ShardJob]:
    """The shards of a store of ``index``: one a layer, and one of the rest.

    Parameters
    ----------
    index
        Parameter name → bytes, under the names that the model uses.
    compressed
        Names of the parameters that ``codec`` encodes; the others are stored as they are.
    dtype
        What matrices of floating point are cast to, before they are encoded too. Vectors keep their dtype: they are
        few bytes, and some must not be rounded.
    keep
        Names of further parameters that keep their dtype.
    device
        Where to encode.
    """
    workers = RowWorkers(torch.device(device))
    missing = [name for name in compressed if name not in index]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {missing[0]} ({len(missing)} of the weights to compress)")
    shards: dict[str, list[Item]] = {}
    for name, info in index.items():
        target = _target(info, dtype) if name not in keep else info.dtype
        encoder = codec if name in compressed else Codec()
        shards.setdefault(shard_name(name), []).append(_item(info, name, encoder, target, workers))
    return [ShardJob(name, tuple(items), concurrent=True) for name, items in sorted(shards.items())]


def shard_name(parameter: str) -> str:
    """``"model.layers.3.mlp.up_proj.weight"`` → ``"layer-00003"``; without a number ``"rest"``."""
    number = next((word for word in parameter.split(".") if word.isdecimal()), None)
    return "rest" if number is None else f"layer-{int(number):05d}"


def fingerprint(files: Iterable[Path]) -> str:
    """What tells source files from others: names, sizes, and samples of their content; cheap at any size."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size = status(path).st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with open_file(path) as file:
            for sample in range(SAMPLES):
                file.seek((size - min(size, SAMPLE_BYTES)) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _target(info: TensorInfo, dtype: torch.dtype) -> str:
    return DTYPE_NAMES[dtype] if info.dtype in CASTABLE and len(info.shape) > 1 else info.dtype


def _item(info: TensorInfo, name: str, codec: Codec, target: str, workers: RowWorkers) -> Item:
    parts = codec.parts(info.shape, target)
    if codec.name == "none":
        return Item(name, target, info.shape, parts, lambda: _cast(info, TORCH_DTYPES[target], workers))
    return Item(name, target, info.shape, parts, lambda: _encode(info, codec, TORCH_DTYPES[target], workers))


def _cast(info: TensorInfo, dtype: torch.dtype, workers: RowWorkers) -> Iterator[Chunk]:
    return workers.map(info, 1, lambda rows: rows.to(dtype, copy=True))


def _encode(info: TensorInfo, codec: Codec, dtype: torch.dtype, workers: RowWorkers) -> Iterator[Chunk]:
    """The first part goes out chunk by chunk; the others, a few percent of it, wait until it is complete."""
    # In one piece each: many small tensors between large temporaries would fragment the heap.
    waiting = [
        torch.empty(math.prod(part.shape), dtype=TORCH_DTYPES[part.dtype])
        for part in codec.parts(info.shape, DTYPE_NAMES[dtype])[1:]
    ]
    filled = [0] * len(waiting)

    def encode(rows: torch.Tensor) -> list[torch.Tensor]:
        return [part.cpu() for part in codec.encode(rows.to(workers.device).to(dtype)).values()]

    with closing(workers.map(info, codec.row_step(info.shape), encode)) as chunks:
        for first, *others in chunks:
            yield first
            for number, part in enumerate(others):
                waiting[number][filled[number] : filled[number] + part.numel()] = part.reshape(-1)
                filled[number] += part.numel()
    yield from waiting
