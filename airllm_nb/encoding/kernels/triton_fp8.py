"""Kernels for FP8 weights with scales of blocks, rows, columns or the matrix. They run on GPUs without FP8 too."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_units import four, half, sixteen


@triton.jit
def unpack_fp8(
    weight, scale, out, columns, weight_stride, scale_stride, height, width, row_stride, column_stride,
    IS_E5M2: tl.constexpr, IS_EXPONENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[row, columns]`` for one row and ``BLOCK`` columns; strides are in elements."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weight, scale = weight + row * weight_stride, scale + row // height * scale_stride
    value = _values(weight, scale, column, columns, width, IS_E5M2, IS_EXPONENT)
    to = out + row * row_stride + column.to(tl.int64) * column_stride
    tl.store(to, value.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def multiply_fp8(
    x, weight, scale, slots, bias, out, rows, columns, x_stride, out_stride, scale_rows, scale_stride, height, width,
    IS_E5M2: tl.constexpr, IS_EXPONENT: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[n, row] = weight[slots[n], row] @ x[n] + bias[row]`` for one row, wherever it lies and in any blocks.

    Sums are in float32. Slot -1 gives zeros.
    """
    row, n = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    total = tl.zeros((BLOCK,), tl.float32)
    if slot >= 0:
        weight += (slot * rows + row.to(tl.int64)) * columns
        scale += (slot * scale_rows + row // height) * scale_stride
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            value = _values(weight, scale, column, columns, width, IS_E5M2, IS_EXPONENT)
            total += value * tl.load(x + n * x_stride + column, mask=column < columns, other=0).to(tl.float32)
    product = tl.sum(total, 0)
    if HAS_BIAS and slot >= 0:
        product += tl.load(bias + row).to(tl.float32)
    tl.store(out + n * out_stride + row, product.to(out.dtype.element_ty))


@triton.jit
def multiply_fp8_units(
    x, weight, scale, slots, bias, out, rows, units, x_stride, out_stride, scale_rows, scale_stride, height, width,
    IS_E5M2: tl.constexpr, IS_EXPONENT: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The same for ``ROWS`` rows of ``units`` of 16 values, each of which has one scale, ``UNITS`` at once."""
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else 0
    sums = tl.zeros((ROWS, UNITS), tl.float32)
    if slot >= 0:
        words = weight.to(tl.pointer_type(tl.uint32))
        for first in range(0, units, UNITS):
            u = first + tl.arange(0, UNITS)
            inside = u < units
            u = tl.where(inside, u, 0)
            a, b = sixteen(x + n * x_stride + u * 16, UNITS)
            for i in tl.static_range(ROWS):
                at = tl.minimum(tl.program_id(0) * ROWS + i, rows - 1)
                w = four(words + ((slot * rows + at.to(tl.int64)) * units + u) * 4, UNITS)
                part = _dot(w[0], a[0], a[1], a[2], a[3], IS_E5M2) + _dot(w[1], a[4], a[5], a[6], a[7], IS_E5M2)
                part += _dot(w[2], b[0], b[1], b[2], b[3], IS_E5M2) + _dot(w[3], b[4], b[5], b[6], b[7], IS_E5M2)
                if not IS_E5M2:
                    is_nan = (_above(w[0]) | _above(w[1]) | _above(w[2]) | _above(w[3])) != 0
                    part = tl.where(is_nan, float("nan"), part * 256)
                factor = tl.load(scale + (slot * scale_rows + at // height) * scale_stride + u * 16 // width)
                part = _scaled(part, factor, IS_EXPONENT)
                sums += tl.where((tl.arange(0, ROWS)[:, None] == i) & inside[None, :], part[None, :], 0)
    product = tl.sum(sums, 1)
    if HAS_BIAS and slot >= 0:
        product += tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)
    tl.store(out + n * out_stride + row, product.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _dot(w, x0, x1, x2, x3, IS_E5M2: tl.constexpr):
    """With four values in a word, as float16 two by two; see :func:`_values`."""
    if IS_E5M2:
        even, odd = w << 8 & 0xFF00FF00, w & 0xFF00FF00
    else:
        even, odd = (w & 0x00800080) << 8 | (w & 0x007F007F) << 7, w & 0x80008000 | w >> 1 & 0x3F803F80
    return half(even) * x0 + half(odd) * x1 + half(even >> 16) * x2 + half(odd >> 16) * x3


@triton.jit
def _above(w):
    """Bits of the bytes of a word that are no number in E4M3."""
    return (w & 0x7F7F7F7F) + 0x01010101 & 0x80808080


@triton.jit
def _values(weight, scale, column, columns, width, IS_E5M2: tl.constexpr, IS_EXPONENT: tl.constexpr):
    """Of one row; 0 beyond its end."""
    inside = column < columns
    bits = tl.load(weight + column, mask=inside, other=0).to(tl.uint16)
    if IS_E5M2:  # the upper half of a float16
        value = (bits << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # the exponent of a float16 has another bias; its subnormal numbers are those of E4M3
        value = ((bits & 128) << 8 | (bits & 127) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256
        value = tl.where((bits & 127) == 127, float("nan"), value)
    return _scaled(value, tl.load(scale + tl.where(inside, column, 0) // width), IS_EXPONENT)


@triton.jit
def _scaled(value, factor, IS_EXPONENT: tl.constexpr):
    if IS_EXPONENT:
        exponent = factor.to(tl.int32)
        return value * tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    return value * factor.to(tl.float32)
