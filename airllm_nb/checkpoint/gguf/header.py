"""What a GGUF file holds, read with distrust: its metadata is walked and its tensor table checked before use.

The readers of the `gguf` package and of transformers follow whatever lengths the header says; :func:`read_gguf` runs
before them, so that a truncated or hostile header ends in one line and not in a hang.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing here imports torch.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...disk import open_file, status
from ...errors import CheckpointError, UnsupportedModelError
from ...tensors import pages
from ..sizes import Holds, check_sizes
from .cursor import called, damaged, walk
from .split import part_names

_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor at rest. ``shape`` is in the order of PyTorch (the file has it reversed)."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class GGUFFile:
    """The checked header of one file, or those of all its parts, joined.

    Attributes
    ----------
    path
        Of several parts that of the first, which has the metadata.
    metadata
        Numbers, flags and strings; of arrays only the length.
    tensors
        By their names, each with the file that it is in.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def is_split(self) -> bool:
        return _parts(self) > 1

    @property
    def holds(self) -> Holds:
        return Holds.of(self.tensors.values())

    def check_sizes(self) -> None:
        """Refuse a model that is larger by its metadata than by its tensors."""
        own = {name: value for name, value in self.metadata.items() if name.startswith(f"{self.architecture}.")}
        check_sizes(own, lambda: self.holds, called(self.path))


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file; of any part of a split one, the headers of all its parts.

    Raises
    ------
    CheckpointError
        If the file is no GGUF file, truncated or damaged, or a part is missing; the message names it and what is wrong.
    UnsupportedModelError
        If the file is big-endian, or uses a tensor type that the `gguf` package does not know.
    """
    found = read_part(path)
    if found.is_split:
        found = _joined(path, _parts(found))
    if not isinstance(found.metadata.get("general.architecture"), str):
        raise damaged(found.path, "general.architecture is missing")
    if not found.tensors:
        raise damaged(found.path, "it holds no tensors")
    return found


def read_part(path: Path) -> GGUFFile:
    """As :func:`read_gguf`, of this file alone; only the first of several parts says the architecture."""
    size = status(path).st_size
    if size < 24:
        raise damaged(path, f"it has only {size} bytes")
    with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        metadata, table, end = walk(data, path)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"general.alignment is {alignment!r}")
    start = end + -end % alignment
    tensors = {name: _checked(path, name, *entry, start, size) for name, entry in table.items()}
    _check_tiles(path, tensors, start, alignment, size)
    return GGUFFile(path, metadata, tensors)


def _check_tiles(path: Path, tensors: dict[str, GGUFTensor], start: int, alignment: int, size: int) -> None:
    """As llama.cpp: one after the other in the order of the table, each on the next aligned byte; and nothing behind.

    A count or a length that is wrong would shift all of them, and numbers would come out all the same.
    """
    reached, end = start, start
    for tensor in tensors.values():
        if tensor.offset != reached:
            raise damaged(path, f"tensor {tensor.name!r} begins at byte {tensor.offset:,} and not at {reached:,}")
        end = reached + tensor.nbytes
        reached = end + -end % alignment
    if tensors and size - end >= alignment:
        raise damaged(path, f"{size - end:,} bytes lie behind its last tensor, {tensor.name!r}")


def _parts(file: GGUFFile) -> int:
    count = file.metadata.get("split.count", 1)
    return count if isinstance(count, int) else 1


def _joined(path: Path, count: int) -> GGUFFile:
    """All parts of a split file, whichever of them is named."""
    paths = [path.with_name(name) for name in part_names(path.name)]
    if len(paths) != count:
        raise CheckpointError(f"{called(path)} is one of {count} parts and is not named as one; give it back its name, "
                              f"NAME-00001-of-{count:05}.gguf, as all parts have it")  # fmt: skip
    if missing := [part for part in paths if not part.is_file()]:
        raise CheckpointError(f"{called(path)} is one of {count} parts, of which {missing[0].name} is missing beside "
                              f"it ({len(missing)} in all); download it too")  # fmt: skip
    parts = [read_part(part) for part in paths]
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        if _parts(part) != count or part.metadata.get("split.no", number) != number:
            raise damaged(part.path, f"its metadata does not say that it is part {number + 1} of {count}")
        tensors |= part.tensors
    said = parts[0].metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != said or len(tensors) != sum(len(part.tensors) for part in parts):
        raise damaged(parts[0].path, f"its {count} parts hold {len(tensors)} different tensors and not {said}")
    return GGUFFile(paths[0], parts[0].metadata, tensors)


def _checked(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, size: int
) -> GGUFTensor:
    offset += start
    sizes = _block_sizes()
    if kind not in sizes:
        raise UnsupportedModelError(f"{called(path)}: tensor {name!r} has the GGML type {kind}, which the installed "
                                    "gguf package does not know; pip install -U gguf")  # fmt: skip
    block, nbytes = sizes[kind]
    if shape and shape[-1] % block:
        raise damaged(path, f"the rows of tensor {name!r} ({shape[-1]} values) are no whole blocks of {block}")
    total = math.prod(shape) // block * nbytes
    if offset + total > size:
        raise damaged(path, f"tensor {name!r} ends at byte {offset + total:,} but the file has {size:,}")
    return GGUFTensor(name, shape, kind, offset, total, path)


def _block_sizes() -> dict[int, tuple[int, int]]:
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise UnsupportedModelError("reading GGUF files needs the gguf package: pip install gguf") from None
    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def dequantised(tensor: GGUFTensor) -> Any:
    """The tensor's values as a float32 array; at rest it is a whole number of blocks a row.

    Raises
    ------
    UnsupportedModelError
        If the `gguf` package cannot dequantise its type.
    """
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType(tensor.ggml_type)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.nbytes,))
    rows = (*tensor.shape[:-1], tensor.shape[-1] // block * nbytes) if tensor.shape else (nbytes,)
    try:
        with pages.watched(tensor.path, (data.ctypes.data, tensor.nbytes)):
            return gguf.dequantize(data.reshape(rows), kind)
    except NotImplementedError:
        raise UnsupportedModelError(f"{tensor.path}: tensor {tensor.name!r} is {kind.name}, which the installed gguf "
                                    "package cannot dequantise; pip install -U gguf") from None  # fmt: skip
