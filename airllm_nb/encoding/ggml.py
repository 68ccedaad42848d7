"""The types of GGUF files: which encoding each has, and the common ones, unpacked by few large kernels.

The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h); the values are those of
the ``gguf`` package's ``dequantize``. Types with a codebook are in :mod:`.ggml_codebooks`.
"""

from __future__ import annotations

import functools

import torch

from . import ggml_codebooks  # noqa: F401  (a type is known once its class is defined)
from .base import Encoding, affine
from .ggml_blocks import (
    TYPES,
    Blocks,
    add_fields,
    bit_fields,
    constant,
    each,
    halves,
    interleave,
    lookup,
    nibbles,
    two_bits,
    words,
)


def encoding_of(ggml_type: int) -> Encoding | None:
    """The encoding of a type, by ggml's number of it; ``None`` for plain numbers and for types without a definition."""
    return TYPES.get(ggml_type)


def packed_row_bytes(ggml_type: int, columns: int) -> int:
    """Bytes of one row.

    Raises
    ------
    ValueError
        If the type is none that :func:`encoding_of` has, or a row of it is no whole number of blocks.
    """
    blocks = TYPES.get(ggml_type)
    if blocks is None or columns % blocks.values:
        name = "not packed" if blocks is None else f"{blocks.name}, packed in blocks of {blocks.values}"
        raise ValueError(f"a row of {columns} values of the GGML type {ggml_type}, which is {name}")
    return columns // blocks.values * blocks.nbytes


# ---- blocks of 32 values with one float16 scale ----------------------------------------------------------------------


class Q4_0(Blocks, number=2):
    name, values, nbytes = "Q4_0", 32, 18
    spare = 2.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        # the scales' bytes go through as well: whole rows are quicker than every block without its first bytes
        signed = blocks ^ 0x88
        planes = [plane[..., None, 2:].view(torch.int8) for plane in (signed << 4, signed & 0xF0)]
        interleave(planes, _alone(halves(blocks, 0).mul_(1 / 16)), None, out)


class Q4_1(Blocks, number=3):
    name, values, nbytes = "Q4_1", 32, 20
    spare = 2.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        planes = [plane[..., None, 4:] for plane in (blocks << 4, blocks & 0xF0)]
        interleave(planes, _alone(halves(blocks, 0).mul_(1 / 16)), _alone(halves(blocks, 2)), out)


class Q5_0(Blocks, number=6):
    name, values, nbytes = "Q5_0", 32, 22
    spare = 3.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        integers = _fives(~blocks[..., 2:6], blocks[..., 6:]).view(torch.int8)
        affine(integers, halves(blocks, 0).mul_(1 / 8), None, out)


class Q5_1(Blocks, number=7):
    name, values, nbytes = "Q5_1", 32, 24
    spare = 3.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        integers = _fives(blocks[..., 4:8], blocks[..., 8:]).view(torch.uint8)
        affine(integers, halves(blocks, 0).mul_(1 / 8), halves(blocks, 2), out)


class Q8_0(Blocks, number=8):
    name, values, nbytes = "Q8_0", 32, 34
    spare = 1.5

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        affine(blocks[..., 2:].view(torch.int8), halves(blocks, 0), None, out)


def _alone(scale: torch.Tensor) -> torch.Tensor:
    """The scale of a whole block, for :func:`interleave`."""
    return scale[..., None, None]


@functools.cache
def _fifth_bits(device: torch.device) -> torch.Tensor:
    """Byte → the eight bytes whose uppermost bits are its bits."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return (bits * 0x80).to(torch.uint8).view(torch.int64).squeeze(1)


def _fives(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Four and sixteen bytes of each block → words of its 32 integers, of five bits."""
    integers = nibbles(words(low), 1).flatten(-2)
    return integers.bitwise_or_(lookup(_fifth_bits(high.device), high).view(torch.int64))


# ---- blocks of 256 values, whose groups have integer scales ----------------------------------------------------------


class Q2_K(Blocks, number=10):
    name, values, nbytes = "Q2_K", 256, 84
    group = 16
    spare = 2.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        planes, scales = two_bits(blocks)
        shape = (2, 4, 2, 1)  # halves of a block, planes, groups of 16
        scale = (halves(blocks, 80) * (blocks[..., :16] & 15)).unflatten(-1, shape) * scales
        minimum = (halves(blocks, 82) * (blocks[..., :16] >> 4)).neg_().unflatten(-1, shape)
        interleave([plane[..., 16:80].unflatten(-1, (2, 2, 16)) for plane in planes], scale, minimum, out)


class Q3_K(Blocks, number=11):
    name, values, nbytes = "Q3_K", 256, 110
    group = 16
    spare = 3.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        low = words(blocks[..., 32:96]).unflatten(-1, (2, 4))
        integers = low.new_empty((*low.shape[:-1], 4, 4))
        shifts = constant(low.device, low.dtype, 5, 3, 1).unsqueeze(-1)
        torch.bitwise_left_shift(low.unsqueeze(-2), shifts, out=integers[..., :3, :])
        torch.bitwise_right_shift(low, 1, out=integers[..., 3, :])
        integers = integers.bitwise_and_(each(0x60)).flatten(-3, -2)
        add_fields(integers, ~words(blocks[..., :32]), 1)
        # bits 0 to 3 of 16 scales, eight in the lower halves of the bytes, eight in the upper ones; then bits 4 and 5
        fields = words(blocks[..., 96:108], torch.int32)
        scales = torch.cat([fields[..., :2], fields[..., :2] >> 4], -1).bitwise_and_(0x0F0F0F0F)
        upper = bit_fields(fields[..., 2:], (0, 2, 4, 6), 0x03030303)
        scales = scales.bitwise_or_(upper << 4).view(torch.int8) - 32
        _groups(integers.view(torch.int8), halves(blocks, 108).mul_(1 / 32) * scales, None, out)


class Q4_K(Blocks, number=12):
    name, values, nbytes = "Q4_K", 256, 144
    spare = 2.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        scale, minimum = _six_bit_scales(blocks, 1 / 16)
        planes = [plane[..., 16:].unflatten(-1, (4, 32)) for plane in (blocks << 4, blocks & 0xF0)]
        interleave(planes, scale.unflatten(-1, (4, 2, 1)), minimum.unflatten(-1, (4, 2, 1)), out)


class Q5_K(Blocks, number=13):
    name, values, nbytes = "Q5_K", 256, 176
    spare = 3.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        scale, minimum = _six_bit_scales(blocks, 1 / 8)
        integers = nibbles(words(blocks[..., 48:]).unflatten(-1, (4, 4)), 1).flatten(-3, -2)
        add_fields(integers, words(blocks[..., 16:48]), 1)
        _groups(integers.view(torch.uint8), scale, minimum, out)


class Q6_K(Blocks, number=14):
    name, values, nbytes = "Q6_K", 256, 210
    group = 16
    spare = 3.75

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        high = (words(blocks[..., 128:192]) ^ each(0xAA)).unflatten(-1, (2, 4))
        integers = nibbles(words(blocks[..., :128]).unflatten(-1, (2, 8)), 2).flatten(-2).unflatten(-1, (4, 4))
        add_fields(integers, high, 2)
        scale = halves(blocks, 208).mul_(1 / 4) * blocks[..., 192:208].view(torch.int8)
        _groups(integers.view(torch.int8), scale, None, out)


def _six_bit_scales(blocks: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``Q4_K`` and ``Q5_K``: eight scales times ``factor`` and eight minimums a block."""
    # 4 bytes with the first scales, 4 with the first minimums, each under 2 bits of a last one; 4 with other 4 bits
    fields = words(blocks[..., 4:16], torch.int32)
    first = fields[..., :2] & 0x3F3F3F3F
    last = bit_fields(fields[..., 2:], (0, 4), 0x0F0F0F0F).bitwise_or_((fields[..., :2] >> 2) & 0x30303030)
    integers = torch.stack((first, last), -1).view(torch.uint8)
    pair = halves(blocks, 0, 2) * constant(blocks.device, torch.float32, factor, -1)
    scaled = pair.unsqueeze(-1) * integers
    return scaled[..., 0, :], scaled[..., 1, :]


def _groups(integers: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, out: torch.Tensor) -> None:
    """:func:`affine` with scales ``[rows, blocks, groups]``, for integers in the order of the values."""
    shape = (scale.shape[-1], 256 // scale.shape[-1])
    minimum = None if minimum is None else minimum.unsqueeze(-1)
    affine(integers.flatten(2).unflatten(2, shape), scale.unsqueeze(-1), minimum, out.unflatten(2, shape))
