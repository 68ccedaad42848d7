"""The product with matrices of 4 bits and a table of 16 values (nf4, fp4), one vector for each matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_nf4(
    x, weight, absmax, nested_absmax, quant_map, code, slots, bias, out, rows, blocks, x_stride, out_stride, offset,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out[n, row] = weight[slots[n], row] @ x[n] + bias[row]`` for ``ROWS`` rows; sums are in float32.

    A row is ``blocks`` of ``BLOCK`` values, ``BLOCKS`` of them at once. ``x`` begins at an aligned address, as weights
    do: they are read in words of eight values, four of them by a thread. Slot -1 gives zeros.
    """
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    total = tl.zeros((ROWS,), tl.float32)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    if slot >= 0:
        WORDS: tl.constexpr = BLOCK // 8
        at = tl.minimum(row, rows - 1)[:, None].to(tl.int64) * blocks  # the first block of each row in its matrix
        number = tl.arange(0, BLOCKS)[None, :]
        word = tl.arange(0, WORDS)
        words = weight.to(tl.pointer_type(tl.int32)) + slot * rows * blocks * WORDS + at[:, :, None] * WORDS
        absmax += slot * rows * blocks
        for first in range(0, blocks, BLOCKS):
            inside = first + number < blocks
            place = (first + number)[:, :, None] * WORDS + word[None, None, :]
            packed = tl.load(words + place, mask=inside[:, :, None], other=0)
            vector = x + n * x_stride + place * 8
            products = tl.zeros((ROWS, BLOCKS, WORDS), tl.float32)
            for i in tl.static_range(8):  # of each byte, the high half comes first
                value = tl.load(code + (packed >> (i // 2 * 8 + (1 - i % 2) * 4) & 15))
                products += value * tl.load(vector + i, mask=inside[:, :, None], other=0).to(tl.float32)
            scale = tl.load(absmax + at + first + number, mask=inside, other=0)
            if NESTED:
                groups = (rows * blocks + NESTED - 1) // NESTED
                group = slot * groups + (at + first + number) // NESTED
                scale = tl.load(quant_map + slot * 256 + scale.to(tl.int32)).to(tl.float32)
                scale = scale * tl.load(nested_absmax + group, mask=inside, other=0).to(tl.float32) + offset
            total += tl.sum(tl.sum(products, 2) * scale.to(tl.float32), 1)
        if HAS_BIAS:
            total += tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)
    tl.store(out + n * out_stride + row, total.to(out.dtype.element_ty), mask=row < rows)
