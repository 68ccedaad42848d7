"""The product with matrices of a byte a value: ``byte · scale + minimum``, each for a run of values or a whole row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_bytes(
    x, weight, scale, minimum, slots, bias, out, rows, columns, x_stride, out_stride, factor,
    BLOCK: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out[n, row] = weight[slots[n], row] @ x[n] + bias[row]`` for ``ROWS`` rows; sums are in float32.

    ``BLOCK`` values share a minimum and a scale, which is to be multiplied by ``factor``; 0: a row shares a scale. So
    many ``BLOCKS`` (of 32 values then) are read at once. Slot -1 gives zeros.
    """
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    total = tl.zeros((ROWS,), tl.float32)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    if slot >= 0:
        SIZE: tl.constexpr = BLOCK if BLOCK else 32
        at = slot * rows + tl.minimum(row, rows - 1)[:, None].to(tl.int64)
        number, byte = tl.arange(0, BLOCKS)[None, :], tl.arange(0, SIZE)[None, None, :]
        for first in range(0, columns, BLOCKS * SIZE):
            place = first + number[:, :, None] * SIZE + byte
            inside = place < columns
            value = tl.load(weight + at[:, :, None] * columns + place, mask=inside, other=0).to(tl.float32)
            vector = tl.load(x + n * x_stride + place, mask=inside, other=0).to(tl.float32)
            if BLOCK:
                group = at * (columns // SIZE) + first // SIZE + number
                whole = first // SIZE + number < columns // SIZE
                low = tl.load(minimum + group, mask=whole, other=0).to(tl.float32)
                step = tl.load(scale + group, mask=whole, other=0).to(tl.float32) * factor
                total += tl.sum(tl.sum(value * vector, 2) * step + tl.sum(vector, 2) * low, 1)
            else:
                total += tl.sum(tl.sum(value * vector, 2), 1)
        if not BLOCK:
            total *= tl.load(scale + slot * rows + tl.minimum(row, rows - 1)).to(tl.float32) * factor
        if HAS_BIAS:
            total += tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)
    tl.store(out + n * out_stride + row, total.to(out.dtype.element_ty), mask=row < rows)
