"""Rows of GGML blocks, and what their types share: integers on the left of their bytes, scales of few bits.

An integer of ``b`` bits is unpacked to the uppermost bits of a byte, and the scale is divided by ``2 ** (8 - b)``,
which is exact. Flipping the uppermost bit then makes an unsigned integer with its offset (``q - 8`` of ``Q4_0``) a
signed one, and what has no further bits elsewhere needs a mask at most. Where the bits of one integer are put together,
shifts and masks run over words of eight bytes: what crosses from one byte to the next falls under the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Encoding, Parts, affine, row_chunks
from .kernels import launch

# By ggml's number of the type.
TYPES: dict[int, Blocks] = {}


@dataclass(frozen=True)
class Blocks(Encoding):
    """Rows of whole blocks; their one part ``"weight"`` is uint8 ``[rows, blocks of a row · nbytes]``.

    Each type is a subclass that says its ``number``.

    Attributes
    ----------
    values, nbytes
        Of one block.
    group
        Values that share a scale; more than 32 are taken apart.
    """

    values: ClassVar[int]
    nbytes: ClassVar[int]
    group: ClassVar[int] = 32
    spare = 6.0  # no type takes more
    kernel: ClassVar[str] = "blocks"

    def __init_subclass__(cls, number: int | None = None) -> None:
        super().__init_subclass__()
        if number is not None:
            TYPES[number] = cls()

    def row_steps(self, columns: int) -> dict[str, int]:
        return {"weight": 1}

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        rows, columns = out.shape
        count = columns // self.values
        if not count or launch.unpack(self, parts, out):
            return
        for chunk in row_chunks(rows, columns, out.device, spare=self.spare):
            packed = parts["weight"][chunk]
            # float16 fields are read where they lie, which only even addresses allow
            packed = packed.clone() if packed.storage_offset() % 2 else packed
            self.fill(packed.unflatten(1, (count, self.nbytes)), out[chunk].unflatten(1, (count, self.values)))

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Dequantise ``blocks`` ``[rows, count, nbytes]`` into ``out`` ``[rows, count, values]``."""
        raise NotImplementedError

    def table(self, device: torch.device) -> torch.Tensor | None:
        """What a kernel looks up: the coordinates of points in int8, one after the other, or scales in float32."""
        return None


# ---- fields ----------------------------------------------------------------------------------------------------------


def halves(blocks: torch.Tensor, start: int, count: int = 1) -> torch.Tensor:
    """``count`` float16 numbers of each block, as float32."""
    return blocks[..., start : start + 2 * count].view(torch.float16).to(torch.float32)


def words(field: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Bytes as integers of several, which a copy aligns. The shifts of a signed one fill in its sign: mask them."""
    return field.clone(memory_format=torch.contiguous_format).view(dtype)


def each(byte: int) -> int:
    """The word that has ``byte`` eight times."""
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


@functools.cache
def constant(device: torch.device, dtype: torch.dtype, *numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def bit_fields(field: torch.Tensor, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """``[..., n]`` → ``[..., n · len(shifts)]``: several fields of each integer, of which the first is the lowest."""
    return ((field.unsqueeze(-1) >> constant(field.device, field.dtype, *shifts)) & mask).flatten(-2)


def lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``[..., n]`` → int8 ``[..., n · bytes of an entry]``."""
    return table.index_select(0, index.reshape(-1).to(torch.int32)).view(index.shape).view(torch.int8)


# ---- integers --------------------------------------------------------------------------------------------------------


@functools.cache
def _fields(device: torch.device, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks and factors ``[8 // bits, 4]`` that take the fields of words and move them to the left of their bytes."""
    starts = range(0, 8, bits)
    masks = torch.tensor([each(((1 << bits) - 1) << start) for start in starts], device=device)
    factors = torch.tensor([1 << (8 - bits - start) for start in starts], device=device)
    return masks.unsqueeze(-1).repeat(1, 4), factors.unsqueeze(-1).repeat(1, 4)


def add_fields(integers: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Words ``[..., 8 // bits, 4]`` gain the fields of ``high`` ``[..., 4]``, the first those of the lowest bits."""
    masks, factors = _fields(high.device, bits)
    return integers.addcmul_(high.unsqueeze(-2) & masks, factors)


def nibbles(field: torch.Tensor, bits: int) -> torch.Tensor:
    """Words ``[..., n]`` → ``[..., 2, n]``: the lower and upper halves of the bytes, ``bits`` from the left end."""
    out = field.new_empty((*field.shape[:-1], 2, field.shape[-1]))
    torch.bitwise_left_shift(field, 4 - bits, out=out[..., 0, :])
    torch.bitwise_right_shift(field, bits, out=out[..., 1, :])
    return out.bitwise_and_(each(0xF0 >> bits))


def two_bits(field: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Four planes of integers where they lie in their bytes, and the scales ``[4, 1, 1]`` that this gives them."""
    scales = constant(field.device, torch.float32, 1, 1 / 4, 1 / 16, 1 / 64)
    return [field & mask for mask in (0x03, 0x0C, 0x30, 0xC0)], scales[:, None, None]


def interleave(
    planes: Sequence[torch.Tensor], scale: torch.Tensor, minimum: torch.Tensor | None, out: torch.Tensor
) -> None:
    """:func:`affine` of planes ``[rows, blocks, a, ...]``, stacked to ``[rows, blocks, a, planes, ...]``.

    They are never put together as integers: on a processor they are as float32, on a device ``out`` itself is.
    """
    shape = planes[0].shape
    view = out.unflatten(2, (shape[2], len(planes), *shape[3:]))
    if out.device.type == "cpu":
        direct = out.dtype == torch.float32 and out.is_contiguous()
        values = view if direct else torch.empty(view.shape, dtype=torch.float32, device=out.device)
        for number, plane in enumerate(planes):
            values.select(3, number).copy_(plane)
        affine(values, scale, minimum, view)
        return
    full = (*view.shape[:-1], 1)
    scale, minimum = scale.expand(full), None if minimum is None else minimum.expand(full)
    for number, plane in enumerate(planes):
        least = None if minimum is None else minimum.select(3, number)
        affine(plane, scale.select(3, number), least, view.select(3, number))
