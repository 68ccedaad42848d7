"""One kernel for every type of GGUF files: a value at a time, straight from the bytes of its block.

The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). Each function takes
pointers to the blocks of some values and their numbers in them, and gives the values in float32. Fields are read byte
by byte: blocks of 18 or 210 bytes are aligned to nothing, and neighbours find theirs in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack_blocks(
    packed, table, out, columns, packed_stride, row_stride, column_stride,
    KIND: tl.constexpr, VALUES: tl.constexpr, NBYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[row, columns]`` for one row and ``BLOCK`` columns; strides are in elements."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    v = tl.where(inside, column, 0)
    block = packed + row * packed_stride + (v // VALUES) * NBYTES
    value = _value(block, table, v % VALUES, KIND)
    to = out + row * row_stride + column.to(tl.int64) * column_stride
    tl.store(to, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _value(block, table, v, KIND: tl.constexpr):
    if KIND == "Q4_0":
        return _half(block) * (_nibble(block + 2, v) - 8)
    elif KIND == "Q4_1":
        return _half(block) * _nibble(block + 4, v) + _half(block + 2)
    elif KIND == "Q5_0":
        return _half(block) * ((_nibble(block + 6, v) | _bit(block + 2, v) << 4) - 16)
    elif KIND == "Q5_1":
        return _half(block) * (_nibble(block + 8, v) | _bit(block + 4, v) << 4) + _half(block + 2)
    elif KIND == "Q8_0":
        return _half(block) * _signed(block + 2 + v)
    elif KIND == "Q2_K":
        scale = _byte(block + v // 16)
        return _half(block + 80) * (scale & 15) * _two_bits(block + 16, v) - _half(block + 82) * (scale >> 4)
    elif KIND == "Q3_K":
        return _half(block + 108) * _scale_of_q3(block + 96, v // 16) * _three_bits(block, v)
    elif KIND == "Q4_K":
        return _scaled(block, v // 32, _byte(block + 16 + v // 64 * 32 + v % 32) >> (v // 32 % 2 * 4) & 15)
    elif KIND == "Q5_K":
        low = _byte(block + 48 + v // 64 * 32 + v % 32) >> (v // 32 % 2 * 4) & 15
        return _scaled(block, v // 32, low | (_byte(block + 16 + v % 32) >> v // 32 & 1) << 4)
    elif KIND == "Q6_K":
        low = _byte(block + v // 128 * 64 + v % 64) >> (v // 64 % 2 * 4) & 15
        return _half(block + 208) * _signed(block + 192 + v // 16) * ((low | _two_bits(block + 128, v) << 4) - 32)
    elif KIND == "TQ1_0":
        return _half(block + 52) * _trit(block, v)
    elif KIND == "TQ2_0":
        return _half(block + 64) * (_two_bits(block, v) - 1)
    else:
        return _of_table(block, table, v, KIND)


@triton.jit
def _of_table(block, table, v, KIND: tl.constexpr):
    """Of types with a codebook: int8 points, or float32 scales of the types that are floats of 4 bits."""
    if KIND == "IQ4_NL":
        return _half(block) * tl.load(table + _nibble(block + 2, v)).to(tl.int32)
    elif KIND == "IQ4_XS":
        low = _byte(block + 4 + v // 64) >> (v // 32 % 2 * 4) & 15
        scale = (low | (_short(block + 2) >> (v // 32 * 2) & 3) << 4) - 32
        return _half(block) * scale * tl.load(table + _nibble(block + 8 + v // 32 * 16, v % 32)).to(tl.int32)
    elif KIND == "MXFP4":
        return tl.load(table + _byte(block)) * _e2m1(_nibble(block + 1, v))
    elif KIND == "NVFP4":
        half = _byte(block + 4 + v // 16 * 8 + v % 8) >> (v // 8 % 2 * 4) & 15
        return tl.load(table + _byte(block + v // 16)) * _e2m1(half)
    elif KIND == "IQ2_XXS":
        group = block + 2 + v // 32 * 8
        fields = _word(group + 4)
        point = tl.load(table + _byte(group + v % 32 // 8) * 8 + v % 8).to(tl.int32)
        return _half(block) * (0.5 + (fields >> 28 & 15)) * 0.25 * _sign(_even(fields >> (v % 32 // 8 * 7)), v, point)
    elif KIND == "IQ2_XS":
        fields = _short(block + 2 + v // 8 * 2)
        point = tl.load(table + (fields & 511) * 8 + v % 8).to(tl.int32)
        return _scale_of_iq2(block, 66, v) * _sign(_even(fields >> 9), v, point)
    elif KIND == "IQ2_S":
        index = _byte(block + 2 + v // 8) | (_byte(block + 66 + v // 32) >> (v % 32 // 8 * 2) & 3) << 8
        point = tl.load(table + index * 8 + v % 8).to(tl.int32)
        return _scale_of_iq2(block, 74, v) * _sign(_byte(block + 34 + v // 8), v, point)
    elif KIND == "IQ3_XXS":
        fields = _word(block + 66 + v // 32 * 4)
        point = tl.load(table + _byte(block + 2 + v // 4) * 4 + v % 4).to(tl.int32)
        return _half(block) * (0.5 + (fields >> 28 & 15)) * 0.5 * _sign(_even(fields >> (v % 32 // 8 * 7)), v, point)
    elif KIND == "IQ3_S":
        index = _byte(block + 2 + v // 4) | (_byte(block + 66 + v // 32) >> (v % 32 // 4) & 1) << 8
        scale = 1 + 2 * (_byte(block + 106 + v // 64) >> (v // 32 % 2 * 4) & 15)
        point = tl.load(table + index * 4 + v % 4).to(tl.int32)
        return _half(block) * scale * _sign(_byte(block + 74 + v // 8), v, point)
    elif KIND == "IQ1_S":
        fields = _short(block + 34 + v // 32 * 2)
        index = _byte(block + 2 + v // 8) | (fields >> (v % 32 // 8 * 3) & 7) << 8
        return _half(block) * (2 * (fields >> 12 & 7) + 1) * _moved(table, index, v, fields >> 15)
    else:
        tl.static_assert(KIND == "IQ1_M")
        high = _byte(block + 32 + v // 16) >> (v // 8 % 2 * 4)
        scale = 2 * (_short(block + 48 + v // 64 * 2) >> (v // 16 % 4 * 3) & 7) + 1
        return _scale_of_iq1(block + 48) * scale * _moved(table, _byte(block + v // 8) | (high & 7) << 8, v, high >> 3)


# ---- fields ----------------------------------------------------------------------------------------------------------


@triton.jit
def _byte(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def _signed(at):
    return tl.load(at).to(tl.int8, bitcast=True).to(tl.int32)


@triton.jit
def _short(at):
    return _byte(at) | _byte(at + 1) << 8


@triton.jit
def _word(at):
    return _short(at) | _short(at + 2) << 16


@triton.jit
def _half(at):
    return _short(at).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(field, v):
    """Of a block of 32: the lower halves of 16 bytes, then the upper ones."""
    return _byte(field + v % 16) >> (v // 16 * 4) & 15


@triton.jit
def _bit(field, v):
    return _byte(field + v // 8) >> (v % 8) & 1


@triton.jit
def _two_bits(field, v):
    """Of a block of 256: four fields of 32 bytes, then those of the next 32."""
    return _byte(field + v // 128 * 32 + v % 32) >> (v // 32 % 4 * 2) & 3


@triton.jit
def _three_bits(block, v):
    """Of ``Q3_K``: 4 is taken away where the third bit is not set."""
    return _two_bits(block + 32, v) + 4 * (_byte(block + v % 32) >> v // 32 & 1) - 4


@triton.jit
def _scale_of_q3(field, group):
    """Four bits of each of 16 scales in the halves of eight bytes, then two of each in four bytes."""
    low = _byte(field + group % 8) >> (group // 8 * 4) & 15
    return (low | (_byte(field + 8 + group % 4) >> (group // 4 * 2) & 3) << 4) - 32


@triton.jit
def _scaled(block, group, integer):
    """Of ``Q4_K`` and ``Q5_K``: scales and minimums of six bits for eight groups."""
    first, field = group < 4, block + 4 + group % 4
    scales, minimums, rest = _byte(field), _byte(field + 4), _byte(field + 8)
    scale = tl.where(first, scales & 63, rest & 15 | scales >> 6 << 4)
    minimum = tl.where(first, minimums & 63, rest >> 4 | minimums >> 6 << 4)
    return _half(block) * scale * integer - _half(block + 2) * minimum


@triton.jit
def _trit(block, v):
    """Of ``TQ1_0``: five digits to the base of 3 in each of 32 and of 16 bytes, four in each of the last 4."""
    run = tl.where(v < 160, 32, tl.where(v < 240, 16, 4))
    start = tl.where(v < 160, 0, tl.where(v < 240, 160, 240))
    digit, field = (v - start) // run, tl.where(v < 160, 0, tl.where(v < 240, 32, 48)) + (v - start) % run
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    return ((_byte(block + field) * power & 255) * 3 >> 8) - 1


@triton.jit
def _e2m1(half):
    """Twice a float of 4 bits."""
    size = half & 7
    size = tl.where(size < 2, size, (2 | size & 1) << (size >> 1) >> 1)
    return tl.where(half > 7, -size, size)


@triton.jit
def _even(bits):
    """Seven signs, and the eighth that makes the number of negative ones even."""
    bits = bits & 127
    parity = bits ^ bits >> 4
    parity = parity ^ parity >> 2
    return bits | (parity ^ parity >> 1) << 7


@triton.jit
def _sign(signs, v, value):
    return tl.where((signs >> (v % 8) & 1) == 1, -value, value)


@triton.jit
def _scale_of_iq2(block, at, v):
    return _half(block) * (0.5 + (_byte(block + at + v // 32) >> (v // 16 % 2 * 4) & 15)) * 0.25


@triton.jit
def _scale_of_iq1(field):
    """A float16 in the uppermost four bits of four fields."""
    bits = (
        _byte(field + 1) >> 4 | _byte(field + 3) & 240 | (_byte(field + 5) & 240) << 4 | (_byte(field + 7) & 240) << 8
    )
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _moved(table, index, v, down):
    """A coordinate of a point (the table has eight times as much), and an eighth more or less."""
    return (tl.load(table + index * 8 + v % 8).to(tl.int32) + 1 - 2 * (down & 1)) * 0.125
