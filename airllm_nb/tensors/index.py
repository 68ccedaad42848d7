"""Tensor name → where its bytes lie. Every header is checked before anything is allocated or read by it.

A safetensors file is: 8 bytes little-endian header length, a JSON header, the data
(format: https://github.com/huggingface/safetensors#format). Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..disk import UNMAPPABLE, is_file, open_file, read_json, status, told
from ..errors import CheckpointError, FileError
from .inside import inside

# Every dtype of the format; which of them can be computed with is asked when a tensor is needed.
BITS = {
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
ITEMSIZE = {dtype: bits // 8 for dtype, bits in BITS.items() if bits % 8 == 0}

# The limit of the reference implementation; a larger header is a damaged length field.
MAX_HEADER = 100_000_000

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
# How the names of tensors that only fill holes begin, in files of ours.
PAD = "__pad."


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

    def apart(self) -> list[TensorInfo]:
        """What lies below one another along dim 0, each by itself."""
        count, at = self.shape[0], 0
        width, extents = self.nbytes // max(count, 1), [list[Extent]() for _ in range(count)]
        for extent in self.extents:
            first, last = at, at + extent.nbytes
            while at < last:
                taken = min(last, (at // width + 1) * width) - at
                extents[at // width].append(Extent(extent.path, extent.offset + at - first, taken))
                at += taken
        return [TensorInfo(self.name, self.dtype, self.shape[1:], tuple(each)) for each in extents]


class CheckpointIndex(dict[str, TensorInfo]):
    """The tensors of a checkpoint by name, which lie in ``files``; holds no weights."""

    def __init__(self, tensors: Mapping[str, TensorInfo], files: Iterable[Path]):
        super().__init__(tensors)
        self.files = tuple(files)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.values())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises
    ------
    CheckpointError
        If the file is truncated or its header is damaged; the message names the file and what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    size = status(path).st_size
    with open_file(path) as file:
        tensors = parse_header(path, file.read(header_length(path, file.read(8), size)), size)
    try:  # the reference has the last word: what it refuses is refused, such as a field that is there twice
        with told(path), safe_open(path, "np"):
            return tensors
    except SafetensorError as error:
        raise _damaged(path, " ".join(str(error).split())[:200]) from None
    except FileError as error:
        if error.errno not in UNMAPPABLE:  # the reference maps what it looks at; we can do without
            raise
        return tensors


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
        If the header is damaged, or the tensors do not fill the rest of the file to the byte: a length that is wrong
        by the padding would shift all of them. The message names the file and what is wrong.
    """
    try:
        header = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + len(data), size) for name, entry in header.items()}
    _check_tiles(path, tensors, 8 + len(data), size)
    return tensors


def read_index(folder: Path) -> CheckpointIndex:
    """Index a folder of safetensors: ``model.safetensors``, the shards of ``model.safetensors.index.json``, or all.

    The first that is there, as transformers does: the index of an earlier save may be left over.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged, or does not hold a tensor that the index promises.
    """
    single, index_file = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        files: tuple[Path, ...] = (single,)
    elif index_file.is_file():
        files = tuple(inside(folder, name) for name in shard_names(index_file))
        for file in files:
            if not is_file(file):
                raise CheckpointError(f"{folder}: shard {file.name[:80]} is named by {INDEX_FILE} but is missing; "
                                      f"download it again ({len(files)} shards in all)")  # fmt: skip
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file; name a folder with model.safetensors or its shards")
    return join_headers(folder, {file: read_header(file) for file in files})


def join_headers(folder: Path, headers: Mapping[Path, Mapping[str, TensorInfo]]) -> CheckpointIndex:
    """One index of the headers of all files of a checkpoint.

    Where an index file names the files, its word on who holds what is not needed, and transformers does not ask for it:
    all tensors of all shards are there, and where two shards hold the same one it is the last one's.

    Raises
    ------
    CheckpointError
        If no file holds a tensor that the index promises, or without an index two files hold the same one.
    """
    index_file, tensors = folder / INDEX_FILE, dict[str, TensorInfo]()
    promised = {} if folder / SINGLE_FILE in headers or not index_file.is_file() else weight_map(index_file)
    for file, found in headers.items():
        for name, info in found.items():
            if name in tensors and not promised:
                other = tensors[name].extents[0].path.name
                raise CheckpointError(f"{folder}: tensor {name!r} is in both {other} and {file.name}; "
                                      f"add {INDEX_FILE} or remove the file that does not belong")  # fmt: skip
            if not name.startswith(PAD):
                tensors[name] = info
    for name, shard in promised.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard}: tensor {name!r} is missing; the shard is of another "
                                  "checkpoint or damaged, download it again")  # fmt: skip
    return CheckpointIndex(tensors, headers)


def weight_map(index_file: Path) -> dict[str, str]:
    """Tensor name → shard, as an index JSON says.

    Raises
    ------
    CheckpointError
        If the file is damaged or names a file outside its own folder.
    """
    try:
        found: dict[str, str] = dict(read_json(index_file)["weight_map"].items())
        shards = sorted(set(found.values()))
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index_file} is damaged ({type(error).__name__}); download it again") from None
    for shard in shards:
        # No file system takes a longer name: asking for such a file is an error of its own.
        if not isinstance(shard, str) or max(map(len, shard.encode("utf-8", "replace").split(b"/"))) > 255:
            raise CheckpointError(f"{index_file} is damaged (a shard is {shard!r:.80}); download it again")
        try:
            inside(index_file.parent, shard)
        except CheckpointError:
            raise CheckpointError(f"{index_file} is damaged, or meant to do harm: {shard[:80]!r} points outside of its "
                                  "folder; download it again, from somebody you trust") from None  # fmt: skip
    return found


def shard_names(index_file: Path) -> tuple[str, ...]:
    """The shards that an index JSON names, each once, in order.

    Raises
    ------
    CheckpointError
        As :func:`weight_map`, and if it names none.
    """
    names = tuple(sorted(set(weight_map(index_file).values())))
    if not names:
        raise CheckpointError(f"{index_file} is damaged (it names no shard); download it again")
    return names


def _tensor(path: Path, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the entry of tensor {name!r} cannot be read") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if any(not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 64 for number in numbers):
        raise _damaged(path, f"tensor {name!r} has a shape or an offset that is no whole number")
    bits = BITS[dtype]
    for number in shape:  # not of thousands of large numbers before it is known that they make sense
        if (bits := bits * number) >= 1 << 67:
            raise _damaged(path, f"tensor {name!r} of shape {str(shape)[:80]} is larger than any file")
    if bits % 8 or end - begin != bits // 8:
        raise _damaged(path, f"tensor {name!r} of shape {shape} should take {-(-bits // 8):,} bytes, the header says "
                             f"{end - begin:,}")  # fmt: skip
    if data_start + end > size:
        raise _damaged(path, f"tensor {name!r} ends at byte {data_start + end:,} but the file has {size:,}")
    return TensorInfo(name, dtype, tuple(shape), (Extent(path, data_start + begin, end - begin),))


def _check_tiles(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    reached, previous = start, "its header"
    for info in sorted(tensors.values(), key=lambda info: (info.extents[0].offset, info.nbytes)):
        gap = info.extents[0].offset - reached
        if gap:
            how = f"are {gap:,} bytes apart" if gap > 0 else "share bytes"
            raise _damaged(path, f"{previous} and tensor {info.name!r} {how}")
        reached, previous = reached + info.nbytes, f"tensor {info.name!r}"
    if reached != size:
        raise _damaged(path, f"{previous} ends at byte {reached:,} but the file has {size:,}")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{os.fspath(path)} is truncated or damaged: {what}; download the file again")
