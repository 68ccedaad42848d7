"""The product with MXFP4 whose scales lie apart: 16 bytes a block of 32 values, and a byte for its power of two."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_units import eight, four, half


@triton.jit
def multiply_mxfp4(
    x, weight, scale, slots, bias, out, rows, blocks, x_stride, out_stride,
    HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """``out[n, row] = weight[slots[n], row] @ x[n] + bias[row]`` for ``ROWS`` rows; sums are in float32.

    A row is ``blocks``, ``UNITS`` of them at once. Slot -1 gives zeros.
    """
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    sums = tl.zeros((ROWS, UNITS), tl.float32)
    if slot >= 0:
        words = weight.to(tl.pointer_type(tl.uint32))
        for first in range(0, blocks, UNITS):
            u = first + tl.arange(0, UNITS)
            inside = u < blocks
            u = tl.where(inside, u, 0)
            vector = x + n * x_stride + u * 32
            a, b = eight(vector, UNITS), eight(vector + 8, UNITS)
            c, d = eight(vector + 16, UNITS), eight(vector + 24, UNITS)
            for i in tl.static_range(ROWS):
                at = (slot * rows + tl.minimum(tl.program_id(0) * ROWS + i, rows - 1).to(tl.int64)) * blocks + u
                w = four(words + at * 4, UNITS)
                # Halves are 2 ** 14 too small.
                part = (_dot(w[0], a) + _dot(w[1], b) + _dot(w[2], c) + _dot(w[3], d)) * 16384
                exponent = tl.load(scale + at).to(tl.int32)
                power = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
                part *= tl.where(exponent == 255, float("nan"), power)
                sums += tl.where((tl.arange(0, ROWS)[:, None] == i) & inside[None, :], part[None, :], 0)
    product = tl.sum(sums, 1)
    if HAS_BIAS and slot >= 0:
        product += tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)
    tl.store(out + n * out_stride + row, product.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _dot(w, x):
    """With eight values in a word, the lowest four bits first: sign, exponent and mantissa as a float16 has them."""
    a = (w & 0x00080008) << 12 | (w & 0x00070007) << 9
    b = (w & 0x00800080) << 8 | (w & 0x00700070) << 5
    c = (w & 0x08000800) << 4 | (w & 0x07000700) << 1
    d = w & 0x80008000 | w >> 3 & 0x0E000E00
    lower = half(a) * x[0] + half(b) * x[1] + half(c) * x[2] + half(d) * x[3]
    return lower + half(a >> 16) * x[4] + half(b >> 16) * x[5] + half(c >> 16) * x[6] + half(d >> 16) * x[7]
