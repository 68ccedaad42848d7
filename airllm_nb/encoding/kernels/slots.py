"""Launches of products out of slots: several vectors, each with a matrix of its own; one of either is a special case.

How a row is summed depends on its length alone: the same bits come each time, and of a slice of the matrix the same as
of the whole. What is launched depends on shapes alone, so that a graph may hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..base import Parts

# x [n, columns] or [1, columns], rows contiguous; slots [n], or None for one matrix that is not stacked; bias [rows];
# out [n, rows]. Whether it did: a kernel may not serve this shape.
Product = Callable[[Any, torch.Tensor, "Parts", "torch.Tensor | None", "torch.Tensor | None", torch.Tensor], bool]


def multiply_nf4(
    encoding: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, bias: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:  # fmt: skip
    """See :class:`.nf4.NF4`."""
    (number, rows), columns, weight = out.shape, x.shape[-1], parts["weight"]
    if encoding.transposed or columns % encoding.block or not is_aligned(weight):
        return False
    from . import triton_nf4

    code = encoding.code(out.device)
    nested = parts.get("nested_absmax", code), parts.get("nested_quant_map", code)
    blocks, turns = columns // encoding.block, of_words(columns // 8)
    grid = -(-rows // turns["ROWS"]), number
    run(triton_nf4.multiply_nf4, grid, out, x, weight, parts["absmax"], *nested, code, *given(slots, bias, x), out,
        rows, blocks, *strides(x, out), encoding.offset, BLOCK=encoding.block, NESTED=encoding.nested,
        **options(slots, bias), **turns)  # fmt: skip
    return True


def multiply_affine8(
    encoding: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, bias: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:  # fmt: skip
    """See :class:`.affine8.Affine8`."""
    if x.shape[-1] % encoding.block or not is_aligned(parts["weight"]):
        return False
    _multiply_bytes(x, parts["weight"], parts["spread"], parts["minimum"], slots, bias, out, 1 / 255, encoding.block)
    return True


def multiply_int8(
    encoding: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, bias: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:  # fmt: skip
    """See :class:`.bnb.Int8`."""
    if encoding.transposed or x.shape[-1] % 4 or not is_aligned(parts["weight"]):
        return False
    _multiply_bytes(x, parts["weight"], parts["scale"], parts["scale"], slots, bias, out, 1 / 127, 0)
    return True


def _multiply_bytes(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, slots: torch.Tensor | None,
    bias: torch.Tensor | None, out: torch.Tensor, factor: float, block: int,
) -> None:  # fmt: skip
    from . import triton_bytes

    (number, rows), columns = out.shape, x.shape[-1]
    turns = of_words(columns // 4)
    grid = -(-rows // turns["ROWS"]), number
    run(triton_bytes.multiply_bytes, grid, out, x, weight, scale, minimum, *given(slots, bias, x), out, rows, columns,
        *strides(x, out), factor, BLOCK=block, IS_SIGNED=weight.dtype == torch.int8, **options(slots, bias),
        **turns)  # fmt: skip


# ---- what launches have in common ------------------------------------------------------------------------------------


def given(
    slots: torch.Tensor | None, bias: torch.Tensor | None, instead: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and bias as arguments: anything stands for what is not there."""
    return instead if slots is None else slots, instead if bias is None else bias


def options(slots: torch.Tensor | None, bias: torch.Tensor | None) -> dict[str, bool]:
    return {"HAS_SLOTS": slots is not None, "HAS_BIAS": bias is not None}


def strides(x: torch.Tensor, out: torch.Tensor) -> tuple[int, int]:
    """From one vector to the next; 0 where all take the same."""
    return 0 if len(x) == 1 else x.stride(0), out.stride(0)


def of_words(words: int) -> dict[str, int]:
    """How a warp takes rows of so many words: 32 of each of eight, or more of fewer where rows are long.

    Measured on an H200 with nf4, rows of 768 to 14,336 values.
    """
    steps = 4 if words >= 256 else next((steps for steps in (4, 2) if words % (32 * steps) == 0), 1)
    return {"ROWS": 8 // steps, "STEPS": steps, "IS_EVEN": words % (32 * steps) == 0, "num_warps": 1}


def is_aligned(part: torch.Tensor) -> bool:
    """Whether words can be read of it."""
    return part.data_ptr() % 4 == 0


def run(kernel: Any, grid: tuple[int, ...], out: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """On the current stream of the device of ``out``."""
    with torch.cuda.device_of(out):
        kernel[grid](*arguments, **constants)


# By :attr:`.Encoding.kernel`.
SLOTS: dict[str, Product] = {"nf4": multiply_nf4, "affine8": multiply_affine8, "int8": multiply_int8}
