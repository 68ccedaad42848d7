"""The product with matrices of a byte a value: ``byte · scale + minimum``, each for a run of values or a whole row."""

from __future__ import annotations

import triton
import triton.language as tl


# What is known of the address of weights would make a thread read several words: it has the vector's values of one.
@triton.jit(do_not_specialize_on_alignment=["weight"])
def multiply_bytes(
    x, weight, scale, minimum, slots, bias, out, rows, columns, x_stride, out_stride, factor,
    BLOCK: tl.constexpr, IS_SIGNED: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """``out[n, row] = weight[slots[n], row] @ x[n] + bias[row]`` for ``ROWS`` rows; sums are in float32.

    ``BLOCK`` values share a minimum and a scale, which is to be multiplied by ``factor``; 0: a row shares a scale. A
    word is four values. ``STEPS`` of 32 words are under way at once; whole rows are such turns if it ``IS_EVEN``. Slot
    -1 gives zeros.
    """
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    total = tl.zeros((ROWS, 32), tl.float32)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    if slot >= 0:
        at = slot * rows + tl.minimum(row, rows - 1)[:, None].to(tl.int64)
        words = weight.to(tl.pointer_type(tl.int32)) + at * (columns // 4)
        for begin in range(0, columns // 4, 32 * STEPS):
            for step in tl.static_range(STEPS):
                first = begin + step * 32
                word = first + tl.arange(0, 32)[None, :]
                inside = None if IS_EVEN else word < columns // 4
                packed = tl.load(words + word, mask=inside)
                x0, x1, x2, x3 = _four(x + n * x_stride, first, columns, IS_EVEN)
                values = _byte(packed, 0, IS_SIGNED) * x0
                values += _byte(packed, 1, IS_SIGNED) * x1
                values += _byte(packed, 2, IS_SIGNED) * x2
                values += _byte(packed, 3, IS_SIGNED) * x3
                if BLOCK:
                    group = at * (columns // BLOCK) + word * 4 // BLOCK
                    low = tl.load(minimum + group, mask=inside).to(tl.float32)
                    spread = tl.load(scale + group, mask=inside).to(tl.float32)
                    values = values * (spread * factor) + (x0 + x1 + x2 + x3) * low
                total += values if IS_EVEN else tl.where(inside, values, 0)
    product = tl.sum(total, 1)
    if not BLOCK:
        whose = tl.maximum(slot, 0) * rows + tl.minimum(row, rows - 1)
        product *= tl.load(scale + whose).to(tl.float32) * factor
    if HAS_BIAS:
        product += tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)
    tl.store(out + n * out_stride + row, product.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _four(x, first, columns, IS_EVEN: tl.constexpr):
    """The values of a vector that meet the bytes of each of 32 words, ``[1, 32]`` each."""
    at = first * 4 + tl.arange(0, 128)
    values = tl.load(x + at, mask=None if IS_EVEN else at < columns).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (1, 32, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _byte(words, number: tl.constexpr, IS_SIGNED: tl.constexpr):
    if IS_SIGNED:
        return (words << (24 - number * 8) >> 24).to(tl.float32)
    else:
        return (words >> number * 8 & 255).to(tl.float32)
