"""GGML types whose integers are numbers of codebook entries, and the ternary ones.

The points of a codebook are tables of words: one look-up gives four or eight int8 values. The points and their signs
are those of the ``gguf`` package (its ``quants`` classes hold ggml's tables); the formulas are its ``dequantize``'s.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch

from .base import affine
from .ggml_blocks import Blocks, bit_fields, constant, halves, interleave, lookup, two_bits, words

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values, as ggml has them


@functools.cache
def _grid(name: str, device: torch.device, factor: int = 1) -> torch.Tensor:
    """The points of a type, times ``factor``: each an integer of as many bytes as the point has coordinates."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    points = torch.from_numpy(kind.grid).reshape(kind.grid_shape) * factor
    word = {4: torch.int32, 8: torch.int64}[points.shape[1]]
    return points.to(torch.int8).view(word).squeeze(1).to(device)


@functools.cache
def _signs(device: torch.device) -> torch.Tensor:
    """Byte → eight bytes, -1 for each bit that is set and 1 for the others."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return (1 - 2 * bits).to(torch.int8).view(torch.int64).squeeze(1)


@functools.cache
def _even_signs(device: torch.device) -> torch.Tensor:
    """Seven bits → the same; the eighth sign makes the number of negative ones even."""
    from gguf import quants

    return _signs(device)[torch.tensor(list(quants.IQ2_XXS.ksigns), device=device)]


@functools.cache
def _levels(device: torch.device, *levels: int) -> torch.Tensor:
    """Byte → two bytes, the level of its lower half and that of its upper one."""
    table, byte = torch.tensor(levels, dtype=torch.int8, device=device), torch.arange(256, device=device)
    return torch.stack((table[byte & 15], table[byte >> 4]), 1).view(torch.int16).squeeze(1)


def _unsigned(field: torch.Tensor) -> torch.Tensor:
    """Fields of two bytes, as int32."""
    return words(field, torch.int16).to(torch.int32) & 0xFFFF


def _wide(field: torch.Tensor) -> torch.Tensor:
    return field.to(torch.int32)


def _scaled(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Integers in the order of the values, in as many groups as there are scales a block."""
    shape = (scale.shape[-1], out.shape[-1] // scale.shape[-1])
    affine(values.flatten(2).unflatten(2, shape), scale.unsqueeze(-1), None, out.unflatten(2, shape))


# ---- sixteen levels --------------------------------------------------------------------------------------------------


def _pairs(field: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """Bytes ``[..., n]`` → levels ``[..., 2, n]``, first those of the lower halves."""
    return lookup(_levels(field.device, *levels), field).unflatten(-1, (-1, 2)).transpose(-1, -2)


def _iq4_levels() -> tuple[int, ...]:
    from gguf import quants

    return tuple(quants.IQ4_NL.kvalues)


class IQ4_NL(Blocks, number=20):
    name, values, nbytes = "IQ4_NL", 32, 18

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        _scaled(_pairs(blocks[..., 2:], _iq4_levels()), halves(blocks, 0), out)

    def table(self, device: torch.device) -> torch.Tensor:
        return constant(device, torch.int8, *_iq4_levels())


class IQ4_XS(Blocks, number=23):
    name, values, nbytes = "IQ4_XS", 256, 136

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        low = bit_fields(_wide(blocks[..., 4:8]), (0, 4), 15)
        high = bit_fields(_unsigned(blocks[..., 2:4]), range(0, 16, 2), 3)
        values = _pairs(blocks[..., 8:].unflatten(-1, (8, 16)), _iq4_levels())
        _scaled(values, halves(blocks, 0) * ((low | high << 4) - 32), out)

    def table(self, device: torch.device) -> torch.Tensor:
        return constant(device, torch.int8, *_iq4_levels())


class MXFP4(Blocks, number=39):
    name, values, nbytes = "MXFP4", 32, 17

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        scale = self.table(blocks.device)[_wide(blocks[..., :1])]
        _scaled(_pairs(blocks[..., 1:], _E2M1), scale, out)

    def table(self, device: torch.device) -> torch.Tensor:
        return _half_powers(device)


class NVFP4(Blocks, number=40):
    name, values, nbytes = "NVFP4", 64, 36
    group = 16

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        scale = self.table(blocks.device)[_wide(blocks[..., :4])]
        _scaled(_pairs(blocks[..., 4:].unflatten(-1, (4, 8)), _E2M1), scale, out)

    def table(self, device: torch.device) -> torch.Tensor:
        return _half_e4m3(device)


@functools.cache
def _half_powers(device: torch.device) -> torch.Tensor:
    """Byte → half of the power of two that it stands for in the e8m0 format."""
    return torch.tensor([2.0 ** (byte - 128) for byte in range(256)], dtype=torch.float32, device=device)


@functools.cache
def _half_e4m3(device: torch.device) -> torch.Tensor:
    """Byte → half of the number that its lower seven bits are in the e4m3 format; what would be none of them is 0."""
    table = [(8 + byte % 8) * 2.0 ** ((byte >> 3 & 15) - 11) for byte in range(256)]
    table[0x80:0x88] = table[:8] = [byte * 2.0**-10 for byte in range(8)]
    table[0x7F] = 0.0
    return torch.tensor(table, dtype=torch.float32, device=device)


# ---- points of four or eight coordinates -----------------------------------------------------------------------------


class _Points(Blocks):
    factor: ClassVar[int] = 1

    def grid(self, device: torch.device) -> torch.Tensor:
        return _grid(self.name, device, self.factor)

    def table(self, device: torch.device) -> torch.Tensor:
        return self.grid(device).view(torch.int8)


class IQ2_XXS(_Points, number=16):
    name, values, nbytes = "IQ2_XXS", 256, 66

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        groups = blocks[..., 2:].unflatten(-1, (8, 8))
        signs, scale = _signs_and_scale(groups[..., 4:])
        values = lookup(self.grid(blocks.device), groups[..., :4]).mul_(signs)
        _scaled(values, halves(blocks, 0) * scale * 0.25, out)


class IQ2_XS(_Points, number=17):
    name, values, nbytes = "IQ2_XS", 256, 74
    group = 16

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        fields = _unsigned(blocks[..., 2:66])
        values = lookup(self.grid(blocks.device), fields & 511)
        values *= lookup(_even_signs(blocks.device), fields >> 9)
        _scaled(values, halves(blocks, 0) * (0.5 + bit_fields(blocks[..., 66:], (0, 4), 15)) * 0.25, out)


class IQ2_S(_Points, number=22):
    name, values, nbytes = "IQ2_S", 256, 82
    group = 16

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        index = _wide(blocks[..., 2:34]) | bit_fields(_wide(blocks[..., 66:74]), (0, 2, 4, 6), 3) << 8
        values = lookup(self.grid(blocks.device), index)
        values *= lookup(_signs(blocks.device), blocks[..., 34:66])
        _scaled(values, halves(blocks, 0) * (0.5 + bit_fields(blocks[..., 74:], (0, 4), 15)) * 0.25, out)


class IQ3_XXS(_Points, number=18):
    name, values, nbytes = "IQ3_XXS", 256, 98

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        signs, scale = _signs_and_scale(blocks[..., 66:].unflatten(-1, (8, 4)))
        values = lookup(self.grid(blocks.device), blocks[..., 2:66]).mul_(signs.flatten(2))
        _scaled(values, halves(blocks, 0) * scale * 0.5, out)


class IQ3_S(_Points, number=21):
    name, values, nbytes = "IQ3_S", 256, 110

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        index = _wide(blocks[..., 2:66]) | bit_fields(_wide(blocks[..., 66:74]), range(8), 1) << 8
        values = lookup(self.grid(blocks.device), index)
        values *= lookup(_signs(blocks.device), blocks[..., 74:106])
        _scaled(values, halves(blocks, 0) * (1 + 2 * bit_fields(blocks[..., 106:], (0, 4), 15)), out)


def _signs_and_scale(field: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Four bytes ``[..., 8, 4]``: seven bits of signs four times → ``[..., 8, 32]``, four of a scale → ``[..., 8]``."""
    fields = words(field, torch.int32)
    signs = lookup(_even_signs(field.device), bit_fields(fields, (0, 7, 14, 21), 127))
    return signs, 0.5 + (fields.squeeze(-1) >> 28 & 15)


class IQ1_S(_Points, number=19):
    name, values, nbytes = "IQ1_S", 256, 50
    factor = 8

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        fields = _unsigned(blocks[..., 34:])
        index = _wide(blocks[..., 2:34]) | bit_fields(fields, (0, 3, 6, 9), 7) << 8
        # [rows, blocks, 8 groups, 4 points of 8]; an eighth is added to each coordinate, or taken from it
        values = lookup(self.grid(blocks.device), index).unflatten(-1, (8, 32))
        values += (1 - (fields >> 15 << 1)).to(torch.int8).unsqueeze(-1)
        _scaled(values, halves(blocks, 0) * (2 * (fields >> 12 & 7) + 1) * 0.125, out)


class IQ1_M(_Points, number=29):
    name, values, nbytes = "IQ1_M", 256, 56
    group = 16
    factor = 8

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        fields = _unsigned(blocks[..., 48:])
        high = bit_fields(_wide(blocks[..., 32:48]), (0, 4), 15)
        values = lookup(self.grid(blocks.device), _wide(blocks[..., :32]) | (high & 7) << 8)
        values = values.unflatten(-1, (32, 8))
        values += (1 - (high >> 3 << 1)).to(torch.int8).unsqueeze(-1)
        # the float16 scale lies in the uppermost four bits of the four fields
        top = fields >> 12 << constant(blocks.device, torch.int32, 0, 4, 8, 12)
        scale = top.sum(-1, keepdim=True, dtype=torch.int32).view(torch.float16)[..., :1].to(torch.float32)
        _scaled(values, scale * (2 * bit_fields(fields, (0, 3, 6, 9), 7) + 1) * 0.125, out)


# ---- ternary ---------------------------------------------------------------------------------------------------------


class TQ1_0(Blocks, number=34):
    name, values, nbytes = "TQ1_0", 256, 54

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        powers = constant(blocks.device, torch.uint8, 1, 3, 9, 27, 81).unsqueeze(-1)
        runs = (blocks[..., :32], powers), (blocks[..., 32:48], powers), (blocks[..., 48:52], powers[:4])
        digits = torch.cat([(field.unsqueeze(-2) * power).flatten(-2) for field, power in runs], -1)
        # the uppermost digit to the base of 3 of what remains, less 1: digits · 3 // 256 - 1
        _scaled((digits > 85).to(torch.int8).add_(digits > 170).sub_(1), halves(blocks, 52), out)


class TQ2_0(Blocks, number=35):
    name, values, nbytes = "TQ2_0", 256, 66

    def fill(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        planes, scales = two_bits(blocks)
        scale = halves(blocks, 64)[..., None, None, None]
        interleave([plane[..., :64].unflatten(-1, (2, 1, 32)) for plane in planes], scale * scales, -scale, out)
