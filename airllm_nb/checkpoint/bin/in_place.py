"""Where the tensors of ``.bin`` files lie, so that they are read in place.

What torch has saved since 1.6 is an uncompressed zip archive in which every storage is one run of bytes
(format: https://pytorch.org/docs/stable/notes/serialization.html). Where each run begins, torch itself says when it
loads without data.
"""

from __future__ import annotations

import functools
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from ...disk import open_file, status
from ...errors import CheckpointError
from ...tensors.dtypes import CASTABLE, DTYPE_NAMES
from ...tensors.index import ITEMSIZE, CheckpointIndex, Extent, TensorInfo
from .pickles import has_index, load_without_data, place, plain_runs

log = logging.getLogger(__name__)


def pickle_index(files: tuple[Path, ...], itemsize: int) -> CheckpointIndex | None:
    """The tensors of a checkpoint, where all can be read where they lie; ``None`` where they must be rewritten once.

    That is so for files of the old format, for tensors that are no plain run of bytes (transposed ones), and for
    matrices that are wider than ``itemsize``.

    Raises
    ------
    CheckpointError
        If a file was cut short.
    """
    tensors: dict[str, TensorInfo] = {}
    is_indexed = has_index(files)
    for file in files:
        stat = status(file)
        found = _of_file(file, stat.st_size, stat.st_mtime_ns)
        if found is None or not (is_indexed or tensors.keys().isdisjoint(found)):
            return None
        tensors |= found
    return None if not tensors or is_wide(tensors, itemsize) else CheckpointIndex(tensors, files)


def is_wide(tensors: Mapping[str, TensorInfo], itemsize: int) -> bool:
    """Whether a matrix has more than ``itemsize`` bytes a value: each sweep would read bytes that are cast away."""
    matrices = (info for info in tensors.values() if len(info.shape) > 1)
    return any(info.dtype in CASTABLE and ITEMSIZE[info.dtype] > itemsize for info in matrices)


def tensors_in_place(file: Path, opened: BinaryIO) -> dict[str, TensorInfo] | None:
    """What is in a .bin file, which need not be here but in ``opened``; ``None`` where its bytes do not lie plainly.

    Neither is there an answer for a damaged file: loading it says what is wrong.
    """
    runs = plain_runs(opened)
    if runs is None:
        return None
    try:
        tensors = load_without_data(file, opened)
    except CheckpointError as error:
        log.info("%s is not read in place: %s", file, error)
        return None
    found = {name: _tensor(file, name, tensor, runs) for name, tensor in tensors.items()}
    lies = {name: info for name, info in found.items() if info is not None}
    return lies if len(lies) == len(found) else None


def _tensor(file: Path, name: str, tensor: torch.Tensor, runs: Mapping[int, int]) -> TensorInfo | None:
    dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))  # another one may be of a tensor that nobody needs
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        return None
    if tensor.is_neg() or tensor.is_conj():  # a bit beside the bytes
        return None
    storage, start = tensor.untyped_storage(), place(tensor, runs)
    if start is None:
        return None
    offset, nbytes = tensor.storage_offset() * tensor.element_size(), tensor.numel() * tensor.element_size()
    if offset + nbytes > storage.nbytes():
        return None
    return TensorInfo(name, dtype, tuple(tensor.shape), (Extent(file, start + offset, nbytes),))


@functools.lru_cache(maxsize=64)
def _of_file(file: Path, nbytes: int, changed: int) -> dict[str, TensorInfo] | None:
    """A plan and a load after it ask several times."""
    with open_file(file) as opened:
        if opened.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(opened):
            raise CheckpointError(f"{file} is truncated or damaged (the archive has no end); download the file again")
        return tensors_in_place(file, opened)
