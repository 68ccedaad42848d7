"""Products with integers in 32-bit words, packed along the input (GPTQ) or the output (AWQ), for tiles of runs.

A run is inputs that share a scale: its integers are multiplied as they are, and scale and zero point are applied once.
Each program has a few runs; what they sum up to is added in an order that is always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_units import as_float


@triton.jit
def multiply_gptq(
    x, words, zeros, scale, slots, sums, runs, columns, x_stride, group, power,
    BITS: tl.constexpr, OFFSET: tl.constexpr, RUN: tl.constexpr, HAS_SLOTS: tl.constexpr,
    RUNS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``sums[n, share, columns]``: ``x[n] @ weight[slots[n]]`` over ``RUNS`` runs of ``RUN`` inputs each.

    ``power`` is what :func:`.triton_units.as_float` needs. Slot -1 gives zeros.
    """
    share, n = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    run = share * RUNS + tl.arange(0, RUNS)
    is_run, is_column = run < runs, column < columns
    run = tl.where(is_run, run, 0)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    total = tl.zeros((RUNS, COLUMNS), tl.float32)
    if slot >= 0:
        COUNT: tl.constexpr = 32 // BITS  # of a word
        MASK: tl.constexpr = (1 << BITS) - 1
        at = words + (slot * runs + run[:, None].to(tl.int64)) * (RUN // COUNT) * columns + column
        vector = x + n * x_stride + run * RUN
        for k in tl.static_range(RUN // COUNT):
            word = tl.load(at + k * columns, mask=is_column, other=0)
            for i in tl.static_range(COUNT):
                value = tl.load(vector + k * COUNT + i).to(tl.float32)
                field = as_float(word >> i * BITS // 16 * 16 & MASK << i * BITS % 16 | power)
                total += field * (value * (1 / (1 << i * BITS % 16)))[:, None]
        of_run = slot * ((runs * RUN + group - 1) // group) + (run * RUN // group)[:, None]
        carry: tl.constexpr = OFFSET * (0xFFFFFFFF // MASK)  # whole words, as in `_tile` of :mod:`.triton_words`
        zero = tl.load(zeros + of_run * (columns // COUNT) + column // COUNT, mask=is_column, other=0)
        zero = (zero.to(tl.uint32, bitcast=True) + carry >> (column % COUNT * BITS).to(tl.uint32) & MASK).to(tl.float32)
        factor = tl.load(scale + of_run * columns + column, mask=is_column, other=0).to(tl.float32)
        total = tl.where(is_run[:, None], (total - zero * _sum(vector, RUN)) * factor, 0)
    to = sums + (n * tl.num_programs(1) + share) * columns + column
    tl.store(to, tl.sum(total, 0)[None, :], mask=is_column)


@triton.jit
def multiply_awq(
    x, words, zeros, scale, slots, sums, runs, columns, x_stride, group, power,
    RUN: tl.constexpr, HAS_SLOTS: tl.constexpr, RUNS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same with words of eight outputs, ``COLUMNS`` words."""
    share, n = tl.program_id(1), tl.program_id(2)
    column, wide = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :], columns // 8
    run = share * RUNS + tl.arange(0, RUNS)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    inside = (run < runs)[:, None] & (column < wide) & (slot >= 0)
    at = words + (slot * runs + run[:, None].to(tl.int64)) * RUN * wide + column
    none = tl.zeros((RUNS, COLUMNS), tl.float32)
    total = none, none, none, none, none, none, none, none
    for k in tl.static_range(RUN):
        word = tl.load(at + k * wide, mask=inside, other=0)
        value = tl.load(x + n * x_stride + run * RUN + k, mask=run < runs, other=0).to(tl.float32)
        total = _add_eight(total, word, value[:, None], power)
    vectors = _sum(x + n * x_stride + tl.where(run < runs, run, 0) * RUN, RUN)
    of_run = slot * ((runs * RUN + group - 1) // group) + (run * RUN // group)[:, None]
    zero = tl.load(zeros + of_run * wide + column, mask=inside, other=0)
    to = sums + (n * tl.num_programs(1) + share) * columns + column * 8
    for i in tl.static_range(8):  # outputs 0, 2, 4, 6, 1, 3, 5, 7
        factor = tl.load(scale + of_run * columns + column * 8 + i % 4 * 2 + i // 4, mask=inside, other=0)
        value = total[i] * (1 / (1 << i % 4 * 4)) - (zero >> i * 4 & 15).to(tl.float32) * vectors
        value = tl.where(inside, value * factor.to(tl.float32), 0)
        tl.store(to + i % 4 * 2 + i // 4, tl.sum(value, 0)[None, :], mask=column < wide)


@triton.jit
def _sum(vector, RUN: tl.constexpr):
    """Of each run, ``[RUNS, 1]``."""
    return tl.sum(tl.load(vector[:, None] + tl.arange(0, RUN)[None, :]).to(tl.float32), 1)[:, None]


@triton.jit
def _add_eight(total, w, x, power):
    """Products with four bits each, those from bit 4, 8 or 12 of a half word on that many powers of two too large."""
    v = w >> 16
    return (
        total[0] + as_float(w & 0x000F | power) * x, total[1] + as_float(w & 0x00F0 | power) * x,
        total[2] + as_float(w & 0x0F00 | power) * x, total[3] + as_float(w & 0xF000 | power) * x,
        total[4] + as_float(v & 0x000F | power) * x, total[5] + as_float(v & 0x00F0 | power) * x,
        total[6] + as_float(v & 0x0F00 | power) * x, total[7] + as_float(v & 0xF000 | power) * x,
    )  # fmt: skip


@triton.jit
def add_shares(
    sums, bias, out, shares, columns, out_stride, HAS_BIAS: tl.constexpr, SHARES: tl.constexpr, COLUMNS: tl.constexpr
):
    """``out[n, columns]`` of ``sums[n, shares, columns]``, ``SHARES`` at once."""
    column, n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    inside = column < columns
    total = tl.zeros((SHARES, COLUMNS), tl.float32)
    for first in range(0, shares, SHARES):
        share = first + tl.arange(0, SHARES)[:, None]
        at = sums + (n * shares + share) * columns + column[None, :]
        total += tl.load(at, mask=(share < shares) & inside[None, :], other=0)
    product = tl.sum(total, 0)
    if HAS_BIAS:
        product += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + n * out_stride + column, product.to(out.dtype.element_ty), mask=inside)
