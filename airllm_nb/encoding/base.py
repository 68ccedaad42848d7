"""What an encoding is: how the values of a matrix lie in bytes, are unpacked and, where we write it, are packed.

An :class:`Encoding` is what a format adds: pure functions over the tensors of one matrix, in plain PyTorch for every
device, and by a kernel where one runs. Nothing here knows names of checkpoints; nothing outside of this folder knows a
format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ..disk import open_file
from ..tensors.index import ITEMSIZE, TensorInfo
from .kernels import launch

Parts = Mapping[str, torch.Tensor]
# What is unpacked at once: as many values as stay in a processor's cache, or bytes that a device has for what unpacking
# makes beside the matrix. Fewer would cost more launches than they save.
HOST_VALUES, DEVICE_BYTES = 1 << 18, 96 << 20
# Between the name of a weight and that of its part, in modules whose own code reads the weight.
PART = "__"


@dataclass(frozen=True)
class Part:
    """One of the tensors that a weight becomes; ``attribute`` is its name in the module."""

    attribute: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Encoding:
    """How one matrix ``[rows, columns]`` lies in bytes. Equal encodings compare equal.

    A format that we only read has :meth:`unpack`, and :meth:`row_steps` where it can be cut; one that we write has
    :meth:`parts` and :meth:`encode` too.

    Attributes
    ----------
    name
        For people, as in ``"nf4"`` or ``"Q4_K"``.
    compression
        What the option of that name and stores call it, where we write it; else empty.
    spare
        Device memory that each value of a chunk takes while it is unpacked, beside its place in the matrix: bytes that
        PyTorch's allocator reserves, which are more than there are at once.
    kernel
        Those of :mod:`.kernels` that unpack it, with no memory beside the matrix, or multiply it; empty if there is
        none.
    transposed
        Whether the columns lie one after the other: :meth:`unpack` then fills ``[columns, rows]``.
    """

    name: ClassVar[str] = ""
    compression: ClassVar[str] = ""
    spare: ClassVar[float] = 4.0
    kernel: ClassVar[str] = ""
    transposed: bool = field(default=False, kw_only=True)

    # --- reading

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """Dequantise a matrix.

        Parameters
        ----------
        parts
            Its parts by attribute, on any device, as they lie in the file.
        out
            ``[rows, columns]`` (``[columns, rows]`` if transposed) of a floating dtype on the same device, perhaps with
            strides. Values are computed in float32 and rounded to its dtype once. Beside it no more memory is used than
            :meth:`temporary_bytes`.
        """
        raise NotImplementedError

    def multiply(
        self, x: torch.Tensor, parts: Parts, shape: tuple[int, int], bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """``x @ weight.T + bias`` by a kernel that reads packed bytes; ``None`` where there is none for this case."""
        return launch.multiply(self, x, parts, shape[0], bias)

    def row_steps(self, columns: int) -> Mapping[str, int] | None:
        """Part → rows of the matrix for each row of the part; ``None`` where the matrix cannot be cut by rows."""
        return None

    def temporary_bytes(self, values: int, device: torch.device) -> int:
        """Memory that :meth:`unpack` takes at most beside a matrix of so many ``values``."""
        if device.type == "cpu":
            return 4 * min(values, HOST_VALUES)
        if launch.unpacks(self, device):
            return 0
        return math.ceil(min(self.spare * values, DEVICE_BYTES)) + self.whole_bytes(values)

    def whole_bytes(self, values: int) -> int:
        """Of those, what is made for a whole matrix at once on a device."""
        return 0

    # --- writing

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        """What a weight of this shape becomes; pure, so that plans and disk checks need no weight.

        ``dtype`` is the safetensors name of the dtype that the weight has before it is encoded.
        """
        raise NotImplementedError

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode a weight, or some of its rows, where it lies. The parts are keyed by attribute, on its device."""
        raise NotImplementedError

    def encodable_rows(self, shape: tuple[int, ...]) -> int:
        """Rows can be encoded in chunks of a multiple of this; the parts' bytes, joined, are the same."""
        return 1

    def require(self, device: torch.device | str = "cpu") -> None:
        """Check now that this encoding can be written and read on ``device``.

        Raises
        ------
        OptionError
            If a library is needed and is missing or broken; the message says how to install it.
        """


class Plain(Encoding):
    """Values as they are, of any dtype: what is not compressed, and rows that only lie in another order."""

    name = "plain"
    compression = "none"
    spare = 0.0

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        out.copy_(parts["weight"])

    def row_steps(self, columns: int) -> Mapping[str, int]:
        return {"weight": 1}

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return (Part("weight", dtype, tuple(shape)),)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight.contiguous()}


@dataclass(frozen=True)
class Stacked(Encoding):
    """Matrices below one another, as many rows each, in different encodings, which lie in parts of their own.

    Attributes
    ----------
    encodings
        By the names of the parts, from the uppermost on.
    """

    encodings: tuple[tuple[str, Encoding], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", " + ".join(encoding.name for _, encoding in self.encodings))

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        for below, (part, encoding) in zip(out.chunk(len(self.encodings)), self.encodings, strict=True):
            encoding.unpack({"weight": parts[part]}, below)

    def temporary_bytes(self, values: int, device: torch.device) -> int:
        values //= len(self.encodings)
        return max(encoding.temporary_bytes(values, device) for _, encoding in self.encodings)


@dataclass(frozen=True)
class Encoded:
    """One weight as it lies in files.

    Attributes
    ----------
    shape
        Of the weight: ``[rows, columns]``, or ``[matrices, rows, columns]``.
    encodings
        One for all pieces, or one for each.
    parts
        Attribute → where it is. Of several pieces the parts are stacked: ``[pieces, *shape of one]``.
    pieces
        Packed matrices below one another that make up one matrix; ``None`` for a 2-dimensional weight in one piece,
        whose parts are not stacked.
    order
        Where rows lie in another order: row ``i`` of the weight is the ``order[i]``-th that lies there.
    """

    shape: tuple[int, ...]
    encodings: tuple[Encoding, ...]
    parts: Mapping[str, TensorInfo]
    pieces: int | None = None
    order: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())

    def encoding(self, piece: int = 0) -> Encoding:
        return self.encodings[piece if len(self.encodings) > 1 else 0]

    def part(self, attribute: str, piece: int) -> TensorInfo:
        """Where a part of one of the pieces is."""
        info = self.parts[attribute]
        return info if self.pieces is None else info.rows(info.name, [(piece, piece + 1)])

    def row_steps(self) -> Mapping[str, int] | None:
        """As of its encoding; ``None`` where it is in several pieces, or its rows are in another order."""
        is_whole = self.pieces is None and self.order is None
        return self.encodings[0].row_steps(self.shape[-1]) if is_whole else None

    def cut(self, rows: int) -> Encoded:
        """A weight of ``rows`` of its rows, as :meth:`row_steps` allow; it lies nowhere yet."""
        steps = self.row_steps() or {}
        parts = {
            attribute: replace(info, shape=(-(-rows // steps[attribute]), *info.shape[1:]), extents=())
            for attribute, info in self.parts.items()
        }
        return Encoded((rows, self.shape[1]), self.encodings, parts)


def encoded(encoding: Encoding, shape: tuple[int, ...]) -> Encoded:
    """What ``encoding`` writes of a weight of this shape, of each matrix by itself; it lies nowhere yet."""
    stack, parts = shape[:-2], encoding.parts(shape[-2:], "F32")
    infos = {part.attribute: TensorInfo(part.attribute, part.dtype, (*stack, *part.shape), ()) for part in parts}
    return Encoded(shape, (encoding,), infos, 1 if stack else None)


def grid(shape: tuple[int, ...], block: int) -> tuple[int, int]:
    """One entry for every ``block`` values; rows are kept where blocks do not cross them. Always two dimensions."""
    columns = math.prod(shape[1:])
    if columns and columns % block == 0:
        return shape[0], columns // block
    return -(-math.prod(shape) // block), 1


def stored(info: TensorInfo) -> bytes | None:
    """The bytes of a small tensor, which say how others are to be read; ``None`` if its file is not here."""
    if not info.extents or not all(extent.path.is_file() for extent in info.extents):
        return None
    data = b""
    for extent in info.extents:
        with open_file(extent.path) as file:
            file.seek(extent.offset)
            data += file.read(extent.nbytes)
    return data


def row_chunks(
    rows: int, columns: int, device: torch.device, step: int = 1, spare: float = Encoding.spare
) -> Iterator[slice]:
    """Rows to unpack at once, each slice but the last a multiple of ``step``; ``spare`` is the :class:`Encoding`'s."""
    values = HOST_VALUES if device.type == "cpu" else int(DEVICE_BYTES / spare)
    count = max(values // max(columns, 1) // step, 1) * step
    for first in range(0, rows, count):
        yield slice(first, min(first + count, rows))


def affine(integers: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, out: torch.Tensor) -> None:
    """``out = integers · scale + minimum`` in float32, one kernel on a device; shapes broadcast to that of ``out``."""
    if out.device.type == "cpu":
        # Step by step: torch does not vectorise addcmul where shapes broadcast.
        direct = out.dtype == torch.float32 and out.is_contiguous()
        values = out if direct else torch.empty(out.shape, dtype=torch.float32, device=out.device)
        values.copy_(integers).mul_(scale)
        if minimum is not None:
            values.add_(minimum)
        if not direct:
            out.copy_(values)
    elif minimum is None:
        torch.mul(integers, scale, out=out)
    else:
        torch.addcmul(minimum, integers, scale, out=out)
