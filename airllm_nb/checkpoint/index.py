"""Tensor name → where its bytes lie. Every header is checked before anything is allocated or read by it.

A safetensors file is: 8 bytes little-endian header length, a JSON header, the data
(format: https://github.com/huggingface/safetensors#format). Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..disk import open_file, read_json, status
from ..errors import CheckpointError

ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# The limit of the reference implementation; a larger header is a damaged length field.
MAX_HEADER = 100_000_000

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Extent:
    """A run of bytes in a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor at rest: its bytes are its extents, one after the other (row-major, little-endian).

    ``dtype`` is the safetensors name (``"BF16"``). Several extents are a concatenation along dim 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)

    def rows(self, name: str, ranges: Iterable[tuple[int, int]]) -> TensorInfo:
        """The rows ``[first, last)`` of each range, one range after the other, as a tensor that lies where they lie."""
        width, count, extents = self.nbytes // max(self.shape[0], 1), 0, []
        for first, last in ranges:
            at, count = 0, count + last - first
            for extent in self.extents:
                low, high = max(first * width, at), min(last * width, at + extent.nbytes)
                if low < high:
                    extents.append(Extent(extent.path, extent.offset + low - at, high - low))
                at += extent.nbytes
        return TensorInfo(name, self.dtype, (count, *self.shape[1:]), tuple(extents))


class CheckpointIndex(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint by name; holds no weights.

    Attributes
    ----------
    folder
        Where the files are.
    files
        The safetensors files, in order.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo], files: tuple[Path, ...]):
        self.folder, self.files = folder, files
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self._tensors.values())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises
    ------
    CheckpointError
        If the file is truncated or its header is damaged; the message names the file and what is wrong.
    """
    size = status(path).st_size
    with open_file(path) as file:
        return parse_header(path, file.read(header_length(path, file.read(8), size)), size)


def header_length(path: Path, start: bytes, size: int) -> int:
    """The length of the JSON header, from the first 8 bytes of a file of ``size`` bytes.

    Raises
    ------
    CheckpointError
        If the file cannot have a header of that length.
    """
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER, size - 8):
        raise _damaged(path, f"its header should take {length:,} bytes but the file has {size:,}")
    return length


def parse_header(path: Path, data: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file of ``size`` bytes whose JSON header is ``data``; ``path`` need not exist yet.

    Raises
    ------
    CheckpointError
        If the header is damaged; the message names the file and what is wrong.
    """
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + len(data), size) for name, entry in header.items()}
    _check_overlaps(path, tensors)
    return tensors


def read_index(folder: Path) -> CheckpointIndex:
    """Index a folder of safetensors: ``model.safetensors.index.json``, ``model.safetensors``, or every file there.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged, or does not hold a tensor that the index promises.
    """
    index_file = folder / INDEX_FILE
    if index_file.is_file():
        files = tuple(folder / name for name in sorted(set(_weight_map(index_file).values())))
        for file in files:
            if file.parent != folder or not _is_file(file):
                raise CheckpointError(f"{folder}: shard {file.name[:80]} is named by {INDEX_FILE} but is missing; "
                                      f"download it again ({len(files)} shards in all)")  # fmt: skip
    else:
        single = folder / SINGLE_FILE
        files = (single,) if single.is_file() else tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file; name a folder with model.safetensors or its shards")
    return join_headers(folder, {file: read_header(file) for file in files})


def join_headers(folder: Path, headers: Mapping[Path, Mapping[str, TensorInfo]]) -> CheckpointIndex:
    """One index of the headers of all files; where ``folder`` has an index file, of the tensors that it names.

    Raises
    ------
    CheckpointError
        If a file does not hold a tensor that the index promises, or two files hold the same one.
    """
    files, index_file, tensors = tuple(headers), folder / INDEX_FILE, {}
    if index_file.is_file():
        for name, shard in _weight_map(index_file).items():
            if name not in headers.get(folder / shard, ()):
                raise CheckpointError(f"{folder / shard}: tensor {name!r} is missing; the shard is of another "
                                      "checkpoint or damaged, download it again")  # fmt: skip
            tensors[name] = headers[folder / shard][name]
        return CheckpointIndex(folder, tensors, files)
    for file, found in headers.items():
        for name, info in found.items():
            if name in tensors:
                other = tensors[name].extents[0].path.name
                raise CheckpointError(f"{folder}: tensor {name!r} is in both {other} and {file.name}; "
                                      f"add {INDEX_FILE} or remove the file that does not belong")  # fmt: skip
            tensors[name] = info
    return CheckpointIndex(folder, tensors, files)


def _weight_map(index_file: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index_file)["weight_map"]
        for shard in weight_map.values():
            index_file.parent / shard
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index_file} is damaged ({type(error).__name__}); download it again") from None
    return dict(weight_map)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _tensor(path: Path, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the entry of tensor {name!r} cannot be read") from None
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
        raise _damaged(path, f"tensor {name!r} has a shape or an offset that is no whole number")
    if end - begin != math.prod(shape) * ITEMSIZE[dtype]:
        raise _damaged(
            path,
            f"tensor {name!r} of shape {shape} should take "
            f"{math.prod(shape) * ITEMSIZE[dtype]:,} bytes, the header says {end - begin:,}",
        )
    if data_start + end > size:
        raise _damaged(path, f"tensor {name!r} ends at byte {data_start + end:,} but the file has {size:,}")
    return TensorInfo(name, dtype, tuple(shape), (Extent(path, data_start + begin, end - begin),))


def _check_overlaps(path: Path, tensors: dict[str, TensorInfo]) -> None:
    reached, previous = 0, ""
    for info in sorted(tensors.values(), key=lambda info: (info.extents[0].offset, info.nbytes)):
        if info.extents[0].offset < reached and info.nbytes:
            raise _damaged(path, f"tensors {previous!r} and {info.name!r} share bytes")
        reached, previous = info.extents[0].offset + info.nbytes, info.name


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{os.fspath(path)} is truncated or damaged: {what}; download the file again")
