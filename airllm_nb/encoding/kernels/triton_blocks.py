"""Kernels for every type of GGUF files: ``scale · integer + minimum``, straight from the bytes of the blocks.

The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). A tile is some groups of
values that share a scale: what belongs to a group is read once. Fields are read byte by byte: blocks of 18 or 210 bytes
are aligned to nothing, and neighbours find theirs in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack_blocks(
    packed, table, out, columns, packed_stride, row_stride, column_stride,
    KIND: tl.constexpr, VALUES: tl.constexpr, NBYTES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``out[row, columns]`` for one row and ``GROUPS`` groups; strides are in elements."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUPS * GROUP
    weight, column = _tile(packed + row * packed_stride, table, first, columns, KIND, VALUES, NBYTES, GROUP, GROUPS)
    to = out + row * row_stride + column.to(tl.int64) * column_stride
    tl.store(to, weight.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def multiply_blocks(
    x, packed, table, slots, bias, out, rows, columns, packed_stride, x_stride, out_stride,
    HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr, VALUES: tl.constexpr, NBYTES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``out[n, row] = weight[slots[n], row] @ x[n] + bias[row]`` for one row, in float32. Slot -1 gives zeros."""
    row, n = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    total = tl.zeros((GROUPS, GROUP), tl.float32)
    if slot >= 0:
        packed += (slot * rows + row.to(tl.int64)) * packed_stride
        for first in range(0, columns, GROUPS * GROUP):
            weight, column = _tile(packed, table, first, columns, KIND, VALUES, NBYTES, GROUP, GROUPS)
            vector = tl.load(x + n * x_stride + column, mask=column < columns, other=0)
            total += weight * vector.to(tl.float32)
    product = tl.sum(tl.sum(total, 1), 0)
    if HAS_BIAS and slot >= 0:
        product += tl.load(bias + row).to(tl.float32)
    tl.store(out + n * out_stride + row, product.to(out.dtype.element_ty))


@triton.jit
def _tile(
    packed, table, first, columns,
    KIND: tl.constexpr, VALUES: tl.constexpr, NBYTES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The values of a row from the ``first`` column on, ``[GROUPS, GROUP]``, and their columns."""
    start = first + tl.arange(0, GROUPS)[:, None] * GROUP
    column = start + tl.arange(0, GROUP)[None, :]
    start = tl.where(start < columns, start, 0)  # rows are whole blocks, hence whole groups
    block, v = packed + start // VALUES * NBYTES, start % VALUES
    weight = _scale(block, table, v, KIND) * _integer(block, table, v + tl.arange(0, GROUP)[None, :], KIND)
    if KIND == "Q4_1" or KIND == "Q5_1":
        weight += _half(block + 2)
    elif KIND == "Q2_K":
        weight -= _half(block + 82) * (_byte(block + v // 16) >> 4)
    elif KIND == "Q4_K" or KIND == "Q5_K":
        weight -= _half(block + 2) * _six_bits(block + 8, v, _byte(block + 12 + v // 32 % 4) >> 4)
    return weight, column


@triton.jit
def _scale(block, table, v, KIND: tl.constexpr):
    """Of the group that begins with value ``v`` of its block."""
    if KIND == "Q2_K":
        return _half(block + 80) * (_byte(block + v // 16) & 15)
    elif KIND == "Q3_K":  # four bits of each of 16 scales in the halves of eight bytes, then two of each in four bytes
        group = v // 16
        low = _byte(block + 96 + group % 8) >> (group // 8 * 4) & 15
        return _half(block + 108) * ((low | (_byte(block + 104 + group % 4) >> (group // 4 * 2) & 3) << 4) - 32)
    elif KIND == "Q4_K" or KIND == "Q5_K":
        return _half(block) * _six_bits(block + 4, v, _byte(block + 12 + v // 32 % 4) & 15)
    elif KIND == "Q6_K":
        return _half(block + 208) * _signed(block + 192 + v // 16)
    elif KIND == "TQ1_0":
        return _half(block + 52)
    elif KIND == "TQ2_0":
        return _half(block + 64)
    elif KIND == "IQ4_XS":
        return _half(block) * ((_half_byte(block + 4, v // 32) | (_short(block + 2) >> (v // 32 * 2) & 3) << 4) - 32)
    elif KIND == "MXFP4":
        return tl.load(table + _byte(block))
    elif KIND == "NVFP4":
        return tl.load(table + _byte(block + v // 16))
    elif KIND == "IQ2_XXS":
        return _half(block) * (0.5 + (_byte(block + 9 + v // 32 * 8) >> 4)) * 0.25
    elif KIND == "IQ2_XS":
        return _half(block) * (0.5 + _half_byte(block + 66, v // 16)) * 0.25
    elif KIND == "IQ2_S":
        return _half(block) * (0.5 + _half_byte(block + 74, v // 16)) * 0.25
    elif KIND == "IQ3_XXS":
        return _half(block) * (0.5 + (_byte(block + 69 + v // 32 * 4) >> 4)) * 0.5
    elif KIND == "IQ3_S":
        return _half(block) * (1 + 2 * _half_byte(block + 106, v // 32))
    elif KIND == "IQ1_S":
        return _half(block) * (2 * (_byte(block + 35 + v // 32 * 2) >> 4 & 7) + 1) * 0.125
    elif KIND == "IQ1_M":  # the float16 lies in the uppermost four bits of four fields
        low = _byte(block + 49) >> 4 | _byte(block + 51) & 240
        bits = low | (_byte(block + 53) & 240) << 4 | (_byte(block + 55) & 240) << 8
        scale = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return scale * (2 * (_short(block + 48 + v // 64 * 2) >> (v // 16 % 4 * 3) & 7) + 1) * 0.125
    else:  # a block of 32
        return _half(block)


@triton.jit
def _integer(block, table, v, KIND: tl.constexpr):
    if KIND == "Q4_0":
        return _nibble(block + 2, v) - 8
    elif KIND == "Q4_1":
        return _nibble(block + 4, v)
    elif KIND == "Q5_0":
        return (_nibble(block + 6, v) | _bit(block + 2, v) << 4) - 16
    elif KIND == "Q5_1":
        return _nibble(block + 8, v) | _bit(block + 4, v) << 4
    elif KIND == "Q8_0":
        return _signed(block + 2 + v)
    elif KIND == "Q2_K":
        return _two_bits(block + 16, v)
    elif KIND == "Q3_K":  # 4 is taken away where the third bit is not set
        return _two_bits(block + 32, v) + 4 * (_byte(block + v % 32) >> v // 32 & 1) - 4
    elif KIND == "Q4_K":
        return _byte(block + 16 + v // 64 * 32 + v % 32) >> (v // 32 % 2 * 4) & 15
    elif KIND == "Q5_K":
        low = _byte(block + 48 + v // 64 * 32 + v % 32) >> (v // 32 % 2 * 4) & 15
        return low | (_byte(block + 16 + v % 32) >> v // 32 & 1) << 4
    elif KIND == "Q6_K":
        low = _byte(block + v // 128 * 64 + v % 64) >> (v // 64 % 2 * 4) & 15
        return (low | _two_bits(block + 128, v) << 4) - 32
    elif KIND == "TQ1_0":
        return _trit(block, v)
    elif KIND == "TQ2_0":
        return _two_bits(block, v) - 1
    elif KIND == "MXFP4":
        return e2m1(_nibble(block + 1, v))
    elif KIND == "NVFP4":
        return e2m1(_byte(block + 4 + v // 16 * 8 + v % 8) >> (v // 8 % 2 * 4) & 15)
    else:
        return _point(block, table, v, KIND)


@triton.jit
def _point(block, table, v, KIND: tl.constexpr):
    """A coordinate of a point of the codebook, with its sign."""
    if KIND == "IQ4_NL":
        return tl.load(table + _nibble(block + 2, v)).to(tl.int32)
    elif KIND == "IQ4_XS":
        return tl.load(table + _nibble(block + 8 + v // 32 * 16, v % 32)).to(tl.int32)
    elif KIND == "IQ2_XXS":
        group = block + 2 + v // 32 * 8
        point = tl.load(table + _byte(group + v % 32 // 8) * 8 + v % 8).to(tl.int32)
        return _sign(_even(_word(group + 4) >> (v % 32 // 8 * 7)), v, point)
    elif KIND == "IQ2_XS":
        fields = _short(block + 2 + v // 8 * 2)
        return _sign(_even(fields >> 9), v, tl.load(table + (fields & 511) * 8 + v % 8).to(tl.int32))
    elif KIND == "IQ2_S":
        index = _byte(block + 2 + v // 8) | (_byte(block + 66 + v // 32) >> (v % 32 // 8 * 2) & 3) << 8
        return _sign(_byte(block + 34 + v // 8), v, tl.load(table + index * 8 + v % 8).to(tl.int32))
    elif KIND == "IQ3_XXS":
        point = tl.load(table + _byte(block + 2 + v // 4) * 4 + v % 4).to(tl.int32)
        return _sign(_even(_word(block + 66 + v // 32 * 4) >> (v % 32 // 8 * 7)), v, point)
    elif KIND == "IQ3_S":
        index = _byte(block + 2 + v // 4) | (_byte(block + 66 + v // 32) >> (v % 32 // 4) & 1) << 8
        return _sign(_byte(block + 74 + v // 8), v, tl.load(table + index * 4 + v % 4).to(tl.int32))
    elif KIND == "IQ1_S":
        fields = _short(block + 34 + v // 32 * 2)
        return _moved(table, _byte(block + 2 + v // 8) | (fields >> (v % 32 // 8 * 3) & 7) << 8, v, fields >> 15)
    else:
        tl.static_assert(KIND == "IQ1_M")
        high = _half_byte(block + 32, v // 8)
        return _moved(table, _byte(block + v // 8) | (high & 7) << 8, v, high >> 3)


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
def _half_byte(field, number):
    """Two in each byte, the lower half first."""
    return _byte(field + number // 2) >> (number % 2 * 4) & 15


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
def _trit(block, v):
    """Of ``TQ1_0``: five digits to the base of 3 in each of 32 and of 16 bytes, four in each of the last 4."""
    run = tl.where(v < 160, 32, tl.where(v < 240, 16, 4))
    start = tl.where(v < 160, 0, tl.where(v < 240, 160, 240))
    digit, field = (v - start) // run, tl.where(v < 160, 0, tl.where(v < 240, 32, 48)) + (v - start) % run
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    return ((_byte(block + field) * power & 255) * 3 >> 8) - 1


@triton.jit
def e2m1(half):
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
def _six_bits(field, v, low):
    """Of ``Q4_K`` and ``Q5_K``: of eight numbers four are in four bytes, under the upper two bits of the others."""
    byte = _byte(field + v // 32 % 4)
    return tl.where(v < 128, byte & 63, low | byte >> 6 << 4)


@triton.jit
def _moved(table, index, v, down):
    """Eight times a coordinate (so the table has it), and one more or less."""
    return tl.load(table + index * 8 + v % 8).to(tl.int32) + 1 - 2 * (down & 1)
