"""Kernels for FP8 weights with scales of blocks, rows, columns or the matrix. They run on GPUs without FP8 too."""

from __future__ import annotations

import triton
import triton.language as tl


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
    x, weight, scale, bias, out, columns, weight_stride, scale_stride, height, width,
    IS_E5M2: tl.constexpr, IS_EXPONENT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[row] = weight[row] @ x + bias[row]`` for one row; ``x`` is one vector, and sums are in float32."""
    row = tl.program_id(0).to(tl.int64)
    weight, scale = weight + row * weight_stride, scale + row // height * scale_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = _values(weight, scale, column, columns, width, IS_E5M2, IS_EXPONENT)
        total += value * tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
    product = tl.sum(total, 0)
    if HAS_BIAS:
        product += tl.load(bias + row).to(tl.float32)
    tl.store(out + row, product.to(out.dtype.element_ty))


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
    factor = tl.load(scale + tl.where(inside, column, 0) // width)
    if IS_EXPONENT:
        exponent = factor.to(tl.int32)
        return value * tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    return value * factor.to(tl.float32)
