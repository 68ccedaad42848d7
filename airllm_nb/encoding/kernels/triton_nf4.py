"""The product with matrices of 4 bits and a table of 16 values (nf4, fp4), one vector for each matrix.

A program is one warp: its threads have the table between them and ask each other, which takes an instruction a value
and no memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


# What is known of the address of weights would make a thread read several words: it has the vector's values of one.
@triton.jit(do_not_specialize_on_alignment=["weight"])
def multiply_nf4(
    x, weight, absmax, nested_absmax, quant_map, code, slots, bias, out, rows, blocks, x_stride, out_stride, offset,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """``out[n, row] = weight[slots[n], row] @ x[n] + bias[row]`` for ``ROWS`` rows; sums are in float32.

    A row is ``blocks`` of ``BLOCK`` values, which share an absmax; a word is eight. ``STEPS`` of 32 words are under way
    at once; whole rows are such turns if it ``IS_EVEN``. Slot -1 gives zeros.
    """
    PER_BLOCK: tl.constexpr = BLOCK // 8
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    total = tl.zeros((ROWS, 32), tl.float32)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    if slot >= 0:
        values = tl.load(code + tl.arange(0, 16))
        at = tl.minimum(row, rows - 1)[:, None].to(tl.int64) * blocks  # the first block of each row in its matrix
        words = weight.to(tl.pointer_type(tl.int32)) + slot * rows * blocks * PER_BLOCK + at * PER_BLOCK
        absmax += slot * rows * blocks
        for begin in range(0, blocks * PER_BLOCK, 32 * STEPS):
            for step in tl.static_range(STEPS):
                first = begin + step * 32
                word = first + tl.arange(0, 32)[None, :]
                inside = None if IS_EVEN else word < blocks * PER_BLOCK
                packed = tl.load(words + word, mask=inside).to(tl.uint32, bitcast=True)
                block = at + word // PER_BLOCK
                scale = tl.load(absmax + block, mask=inside)
                if NESTED:
                    group = slot * ((rows * blocks + NESTED - 1) // NESTED) + block // NESTED
                    scale = tl.load(quant_map + slot * 256 + scale.to(tl.int32), mask=inside).to(tl.float32)
                    scale = scale * tl.load(nested_absmax + group, mask=inside).to(tl.float32) + offset
                x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x + n * x_stride, first, blocks * BLOCK, IS_EVEN)
                # of each byte, the high half comes first
                products = _value(values, packed >> 4) * x0
                products += _value(values, packed) * x1
                products += _value(values, packed >> 12) * x2
                products += _value(values, packed >> 8) * x3
                products += _value(values, packed >> 20) * x4
                products += _value(values, packed >> 16) * x5
                products += _value(values, packed >> 28) * x6
                products += _value(values, packed >> 24) * x7
                products *= scale.to(tl.float32)
                total += products if IS_EVEN else tl.where(inside, products, 0)
    product = tl.sum(total, 1)
    if HAS_BIAS:
        product += tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)
    tl.store(out + n * out_stride + row, product.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _value(values, words):
    """What the last four bits of each word stand for."""
    number = (words & 15).to(tl.int32)
    return tl.reshape(tl.gather(values, tl.reshape(number, (number.numel,)), 0), number.shape)


@triton.jit
def _eight(x, first, columns, IS_EVEN: tl.constexpr):
    """The values of a vector that meet those of each of 32 words, ``[1, 32]`` each."""
    at = first * 8 + tl.arange(0, 256)
    values = tl.load(x + at, mask=None if IS_EVEN else at < columns).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (1, 32, 2, 2, 2)))
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    x0, x4 = tl.split(even_low)
    x2, x6 = tl.split(even_high)
    x1, x5 = tl.split(odd_low)
    x3, x7 = tl.split(odd_high)
    return x0, x1, x2, x3, x4, x5, x6, x7
