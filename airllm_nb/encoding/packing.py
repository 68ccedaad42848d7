"""Weights that a checkpoint holds packed: what they consist of, and how one matrix is unpacked.

A :class:`Packing` is what a format adds: pure functions over the tensors of one matrix, in plain PyTorch for every
device, and by a kernel where one runs. Nothing here knows names of checkpoints; nothing outside of this folder knows a
format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..disk import open_file
from ..tensors.index import TensorInfo
from .kernels import launch

Parts = Mapping[str, torch.Tensor]
# What is unpacked at once: as many values as stay in a processor's cache, or bytes that a device has for what unpacking
# makes beside the matrix. Fewer would cost more launches than they save.
HOST_VALUES, DEVICE_BYTES = 1 << 18, 96 << 20


class Packing:
    """How one matrix ``[rows, columns]`` is packed. Equal packings compare equal.

    Attributes
    ----------
    name
        For people, as in ``"nf4"`` or ``"Q4_K"``.
    transposed
        Whether the columns lie one after the other: :meth:`unpack` then fills ``[columns, rows]``.
    row_steps
        Part → rows of the matrix for each row of the part, where the matrix can be cut by rows; ``None`` where it
        cannot.
    spare
        Device memory that each value of a chunk takes while it is unpacked, beside its place in the matrix: bytes that
        PyTorch's allocator reserves, which are more than there are at once.
    kernel
        The one of :mod:`.kernels` that unpacks it, with no memory beside the matrix; empty if there is none.
    """

    name: ClassVar[str] = ""
    transposed: ClassVar[bool] = False
    row_steps: Mapping[str, int] | None = None
    spare: float = 4.0
    kernel: ClassVar[str] = ""

    def unpack(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
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

    def multiply(
        self, x: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """``x @ weight.T + bias`` by a kernel that reads packed bytes; ``None`` where there is none for this case."""
        return launch.multiply(self, x, parts, shape[0], bias)


@dataclass(frozen=True)
class Packed:
    """One weight as it lies in a checkpoint.

    Attributes
    ----------
    shape
        Of the weight: ``[rows, columns]``, or ``[matrices, rows, columns]``.
    packing
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
    packing: tuple[Packing, ...]
    parts: Mapping[str, TensorInfo]
    pieces: int | None = None
    order: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())


class Plain(Packing):
    """Values as they are, of any floating dtype: for rows that only lie in another order."""

    name = "plain"
    spare = 0.0
    row_steps: Mapping[str, int] = {"weight": 1}

    def unpack(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        out.copy_(parts["weight"])


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
    rows: int, columns: int, device: torch.device, step: int = 1, spare: float = Packing.spare
) -> Iterator[slice]:
    """Rows to unpack at once, each slice but the last a multiple of ``step``; ``spare`` is the :class:`Packing`'s."""
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
