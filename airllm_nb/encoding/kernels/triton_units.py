"""Products of vectors with rows that are read 16 bytes at a time: GGUF's Q4_K, Q5_K and Q6_K.

A thread has one such unit of each of a few rows: what it needs of the vector is read once for all of them, and the
scales of a unit are decoded once. The layouts are those of ggml (see :mod:`.triton_blocks`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_units(
    x, packed, slots, bias, out, rows, blocks, x_stride, out_stride, power,
    KIND: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """``out[n, row] = weight[slots[n], row] @ x[n] + bias[row]`` for ``ROWS`` rows; sums are in float32.

    A row is ``blocks`` of 256 values, ``UNITS`` units of 32 values at once. ``power`` is what :func:`add_word` needs.
    Slot -1 gives zeros.
    """
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    sums = tl.zeros((ROWS, UNITS), tl.float32)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    if slot >= 0:
        for first in range(0, blocks * 8, UNITS):
            u = first + tl.arange(0, UNITS)
            inside = u < blocks * 8
            u = tl.where(inside, u, 0)
            number, u = u // 8, u % 8
            vector = x + n * x_stride + number * 256
            if KIND == "Q6_K":
                vector += u // 4 * 128 + u % 4 * 8
                v, w = (
                    (eight(vector, UNITS), eight(vector + 32, UNITS)),
                    (eight(vector + 64, UNITS), eight(vector + 96, UNITS)),
                )
            else:
                vector += u // 2 * 64 + u % 2 * 16
                v, w = sixteen(vector, UNITS), sixteen(vector + 32, UNITS)
            for i in tl.static_range(ROWS):
                at = (slot * rows + tl.minimum(tl.program_id(0) * ROWS + i, rows - 1).to(tl.int64)) * blocks + number
                if KIND == "Q6_K":
                    part = _q6_k(packed + at * 210, u, v, w, power)
                else:
                    part = _q45_k(packed.to(tl.pointer_type(tl.int32)), at, u, v, w, power, KIND, UNITS)
                is_row = tl.arange(0, ROWS)[:, None] == i
                sums += tl.where(is_row & inside[None, :], part[None, :], 0)
    product = tl.sum(sums, 1)
    if HAS_BIAS and slot >= 0:
        product += tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)
    tl.store(out + n * out_stride + row, product.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _q45_k(words, block, u, x, y, power, KIND: tl.constexpr, UNITS: tl.constexpr):
    """Sixteen bytes of a quarter of a block: their lower halves are of one group of values, their upper of the next."""
    quarter = u // 2
    SIZE: tl.constexpr = 36 if KIND == "Q4_K" else 44  # words of a block; the integers are in its last 32
    header = words + block * SIZE
    w, s = four(header + SIZE - 32 + u * 4, UNITS), four(header, UNITS)
    if KIND == "Q4_K":
        low, high = dot(w, x, power, 0, 15), dot(w, y, power, 4, 15)
    else:  # the fifth bits of a byte are those of its two values in each quarter
        bits, shift = four(header + 4 + u % 2 * 4, UNITS), quarter * 2
        b0, b1, b2, b3 = bits[0] >> shift, bits[1] >> shift, bits[2] >> shift, bits[3] >> shift
        lower = _fives(w[0], b0), _fives(w[1], b1), _fives(w[2], b2), _fives(w[3], b3)
        upper = (_fives(w[0] >> 4, b0 >> 1), _fives(w[1] >> 4, b1 >> 1), _fives(w[2] >> 4, b2 >> 1),
                 _fives(w[3] >> 4, b3 >> 1))  # fmt: skip
        low, high = dot(lower, x, power, 0, 255), dot(upper, y, power, 0, 255)
    # Both groups' scales in two bytes of a number, and their minimums: six bits each, packed as in `_six_bits` there.
    is_first, shift = quarter < 2, quarter % 2 * 16
    a, b, c = s[1] >> shift, s[2] >> shift, s[3] >> shift
    scale = tl.where(is_first, a & 0x3F3F, c & 0x0F0F | a >> 2 & 0x3030)
    least = tl.where(is_first, b & 0x3F3F, c >> 4 & 0x0F0F | b >> 2 & 0x3030)
    part = half(s[0]) * ((scale & 255).to(tl.float32) * low + (scale >> 8).to(tl.float32) * high)
    below = (least & 255).to(tl.float32) * total(x) + (least >> 8).to(tl.float32) * total(y)
    return part - half(s[0] >> 16) * below


@triton.jit
def _fives(low, bits):
    return low & 0x0F0F0F0F | (bits & 0x01010101) << 4


@triton.jit
def _q6_k(block, u, x, y, power):
    """Eight neighbours in each quarter of half a block, which is aligned to two bytes only."""
    number, at = u // 4, u % 4 * 8
    lower = (block + number * 64 + at).to(tl.pointer_type(tl.int16))
    upper = (block + 128 + number * 32 + at).to(tl.pointer_type(tl.int16))
    scales = (block + 192 + number * 8 + at // 16).to(tl.pointer_type(tl.int8))
    h0, h1, none = _two(upper), _two(upper + 2), tl.zeros(block.shape, tl.float32)
    part = none
    for i in tl.static_range(2):
        w0, w1 = _two(lower + 16 * i), _two(lower + 16 * i + 2)
        for j in tl.static_range(2):  # the lower halves of bytes, then the upper ones
            v0 = w0 >> 4 * j & 0x0F0F0F0F | (h0 >> 2 * i + 4 * j & 0x03030303) << 4
            v1 = w1 >> 4 * j & 0x0F0F0F0F | (h1 >> 2 * i + 4 * j & 0x03030303) << 4
            z = x[i] if j == 0 else y[i]
            even, odd = add_word(none, none, v0, z[0], z[1], z[2], z[3], power, 0, 255)
            even, odd = add_word(even, odd, v1, z[4], z[5], z[6], z[7], power, 0, 255)
            scale = tl.load(scales + (i + 2 * j) * 2).to(tl.float32)
            part += scale * (even + odd * (1 / 256) - 32 * _sum(z))
    return part * tl.load((block + 208).to(tl.pointer_type(tl.float16))).to(tl.float32)


# ---- of a unit -------------------------------------------------------------------------------------------------------


@triton.jit
def four(at, UNITS: tl.constexpr):
    """Four words from each of ``[UNITS]`` addresses on, in one load where they are aligned."""
    word = tl.load(at[:, None] + tl.arange(0, 4))
    a, b = tl.split(tl.reshape(word, (UNITS, 2, 2)))
    w0, w2 = tl.split(a)
    w1, w3 = tl.split(b)
    return w0, w1, w2, w3


@triton.jit
def eight(at, UNITS: tl.constexpr):
    """Eight values from each of ``[UNITS]`` addresses on, in float32."""
    value = tl.load(at[:, None] + tl.arange(0, 8)).to(tl.float32)
    a, b = tl.split(tl.reshape(value, (UNITS, 2, 2, 2)))
    a, c = tl.split(a)
    b, d = tl.split(b)
    x0, x4 = tl.split(a)
    x1, x5 = tl.split(b)
    x2, x6 = tl.split(c)
    x3, x7 = tl.split(d)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def sixteen(at, UNITS: tl.constexpr):
    return eight(at, UNITS), eight(at + 8, UNITS)


@triton.jit
def total(x):
    """Of :func:`sixteen` values."""
    return _sum(x[0]) + _sum(x[1])


@triton.jit
def _sum(x):
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@triton.jit
def dot(w, x, power, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Of 16 integers in the bytes of four words, where ``MASK`` has them from bit ``SHIFT`` on, and :func:`sixteen`."""
    a, b = x
    none = tl.zeros(w[0].shape, tl.float32)
    even, odd = add_word(none, none, w[0], a[0], a[1], a[2], a[3], power, SHIFT, MASK)
    even, odd = add_word(even, odd, w[1], a[4], a[5], a[6], a[7], power, SHIFT, MASK)
    even, odd = add_word(even, odd, w[2], b[0], b[1], b[2], b[3], power, SHIFT, MASK)
    even, odd = add_word(even, odd, w[3], b[4], b[5], b[6], b[7], power, SHIFT, MASK)
    return even * (1 / (1 << SHIFT)) + odd * (1 / (256 << SHIFT))


@triton.jit
def add_word(even, odd, w, x0, x1, x2, x3, power, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Products with the bytes of a word: those with its odd bytes are 256 times what they should be.

    With ``power`` an "or" and a difference make a float of an integer, in half the time of a conversion. It is an
    argument since a GPU takes one constant at a time.
    """
    upper = w >> 16
    even += as_float(w & MASK << SHIFT | power) * x0
    odd += as_float(w & MASK << SHIFT + 8 | power) * x1
    even += as_float(upper & MASK << SHIFT | power) * x2
    odd += as_float(upper & MASK << SHIFT + 8 | power) * x3
    return even, odd


@triton.jit
def as_float(bits):
    """The integer under 2 ** 23 to which the bits of 2 ** 23 as a float were added by an "or"."""
    return bits.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _two(at):
    """Two numbers of 16 bits as a word."""
    return tl.load(at).to(tl.int32) & 0xFFFF | tl.load(at + 1).to(tl.int32) << 16


@triton.jit
def half(bits):
    """The lower 16 bits as a float16."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
