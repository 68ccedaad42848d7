"""Kernels for integers in 32-bit words (GPTQ, AWQ) and for MXFP4 with its scales apart."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import e2m1


@triton.jit
def unpack_words(
    words, zeros, scale, groups, out, rows, columns, words_stride, zeros_stride, scale_stride, row_stride,
    column_stride, group, BITS: tl.constexpr, OFFSET: tl.constexpr, IS_AWQ: tl.constexpr, ORDER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out[rows, columns]`` for ``ROWS`` inputs and ``COLUMNS`` outputs; ``scale`` is ``[groups, columns]``.

    ``ORDER`` is ``"listed"`` (``groups`` has the group of each input), ``"runs"`` (``group`` inputs each) or
    ``"tiles"`` (the same, and no tile has inputs of two groups).
    """
    first = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    weight = _tile(words, zeros, scale, groups, first, column, rows, columns, words_stride, zeros_stride, scale_stride,
                   group, BITS, OFFSET, IS_AWQ, ORDER, ROWS)  # fmt: skip
    row = first + tl.arange(0, ROWS)[:, None]
    to = out + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    tl.store(to, weight.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))


@triton.jit
def multiply_words(
    x, words, zeros, scale, groups, slots, out, rows, columns, x_stride, words_stride, zeros_stride, scale_stride,
    group, share, HAS_SLOTS: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, IS_AWQ: tl.constexpr,
    ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out[n, s, columns]``: ``x[n] @ weight[slots[n]]`` over the ``s``-th ``share`` of the inputs.

    A share is a multiple of ``ROWS``. Slot -1 gives zeros.
    """
    s, n = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if slot >= 0:
        words += slot * (rows if IS_AWQ else rows * BITS // 32) * words_stride
        of_matrix = slot * ((rows + group - 1) // group)
        zeros, scale = zeros + of_matrix * zeros_stride, scale + of_matrix * scale_stride
        for first in range(s * share, tl.minimum(s * share + share, rows), ROWS):
            weight = _tile(words, zeros, scale, groups, first, column, rows, columns, words_stride, zeros_stride,
                           scale_stride, group, BITS, OFFSET, IS_AWQ, ORDER, ROWS)  # fmt: skip
            row = first + tl.arange(0, ROWS)[:, None]
            total += weight * tl.load(x + n * x_stride + row, mask=row < rows, other=0).to(tl.float32)
    at = out + (n * tl.num_programs(0) + s) * columns + column
    tl.store(at, tl.sum(total, 0)[None, :], mask=column < columns)


@triton.jit
def _tile(
    words, zeros, scale, groups, first, column, rows, columns, words_stride, zeros_stride, scale_stride, group,
    BITS: tl.constexpr, OFFSET: tl.constexpr, IS_AWQ: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``[ROWS, columns]`` in float32 from the ``first`` row on."""
    i = tl.minimum(first + tl.arange(0, ROWS)[:, None], rows - 1)
    o = tl.minimum(column, columns - 1)
    if ORDER == "listed":
        of_row = tl.load(groups + i).to(tl.int32)
    elif ORDER == "runs":
        of_row = i // group
    else:
        of_row = first // group + tl.zeros((1, 1), tl.int32)
    zero_row = zeros + of_row * zeros_stride
    if IS_AWQ:
        # the nibbles of a word are the outputs 0, 2, 4, 6, 1, 3, 5, 7
        shift = (o % 2 * 4 + o % 8 // 2) * 4
        value = tl.load(words + i.to(tl.int64) * words_stride + o // 8) >> shift & 15
        zero = tl.load(zero_row + o // 8) >> shift & 15
    else:
        value = _field(words + o, i, rows, words_stride, 0, BITS)
        # Whole words, as GPTQModel took 1 away: where a zero point is 0, it has borrowed from the next one.
        carry: tl.constexpr = 0 if BITS == 3 else OFFSET * (0xFFFFFFFF // ((1 << BITS) - 1))
        zero = _field(zero_row, o, columns, 1, carry, BITS)
        if BITS == 3:
            zero = zero + OFFSET & 7
    factor = tl.load(scale + of_row.to(tl.int64) * scale_stride + o).to(tl.float32)
    return (value - zero).to(tl.float32) * factor


@triton.jit
def _field(words, number, count, stride, carry, BITS: tl.constexpr):
    """The ``number``-th of ``count`` integers in a run of words, to each of which ``carry`` is added."""
    bit = number * BITS
    at, shift = bit // 32, bit % 32
    low = tl.load(words + at.to(tl.int64) * stride).to(tl.uint32, bitcast=True) + carry
    value = low.to(tl.uint32) >> shift
    if BITS == 3:  # two of 32 lie across two words
        last = (count * BITS - 1) // 32
        high = tl.load(words + tl.minimum(at + 1, last).to(tl.int64) * stride).to(tl.uint32, bitcast=True)
        value = value | tl.where(shift > 29, high << (32 - shift) % 32, 0)
    return (value & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def unpack_mxfp4(blocks, scales, powers, out, columns, row_stride, column_stride, BLOCK: tl.constexpr):
    """``out[row, columns]`` for one row and ``BLOCK`` columns; ``powers`` has half the power of each scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    v = tl.where(inside, column, 0)
    half = tl.load(blocks + row * (columns // 2) + v // 2).to(tl.int32) >> (v % 2 * 4) & 15
    scale = tl.load(powers + tl.load(scales + row * (columns // 32) + v // 32).to(tl.int32))
    to = out + row * row_stride + column.to(tl.int64) * column_stride
    tl.store(to, (scale * e2m1(half)).to(out.dtype.element_ty), mask=inside)
