"""Launches of products with GGUF's types, FP8, MXFP4 and integers in words; see :mod:`.slots` for what they have to be.

What is read 16 bytes at a time must begin at an aligned address, and a row be whole units; else a value is read at a
time, where there is a kernel for that, which takes several times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import arguments
from .slots import Product, given, is_aligned, options, run, strides

if TYPE_CHECKING:
    from ..base import Parts

_ROWS = 4  # of a program with units; more of them or fewer were slower on an H200
_RUNS = 4  # of a program, with words
_PROGRAMS = 1024  # where a value is read at a time: enough of them to keep a large GPU busy
_IN_UNITS = ("Q4_K", "Q5_K", "Q6_K")
# The bits of 2 ** 23 as a float.
_POWER = 0x4B000000


def multiply_blocks(
    blocks: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor
) -> bool:
    """See :class:`.ggml_blocks.Blocks`."""
    (number, rows), columns, packed = out.shape, x.shape[-1], parts["weight"]
    if blocks.name in _IN_UNITS and is_aligned(packed) and packed.is_contiguous():
        from . import triton_units

        run(triton_units.multiply_units, (-(-rows // _ROWS), number), out, x, packed, *given(slots, bias, x), out, rows,
            columns // blocks.values, *strides(x, out), _POWER, KIND=blocks.name, **options(slots, bias),
            **_at_once(columns // 32))  # fmt: skip
        return True
    from . import triton_blocks

    table, constants = arguments.of_blocks(blocks, packed, columns)
    run(triton_blocks.multiply_blocks, (rows, number), out, x, packed, table, *given(slots, bias, x), out, rows,
        columns, packed.stride(-2), *strides(x, out), **options(slots, bias), **constants)  # fmt: skip
    return True


def multiply_fp8(
    encoding: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, bias: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:  # fmt: skip
    """See :class:`.fp8.FP8`."""
    from . import triton_fp8

    (number, rows), columns, weight = out.shape, x.shape[-1], parts["weight"]
    (height, width), constants = arguments.of_fp8(encoding, parts, rows, columns)
    tensors = x, weight.view(torch.uint8), parts["scale"], *given(slots, bias, x), out
    grid = -(-rows // height), -(-columns // width)  # of the scales
    if columns % 16 == 0 == width % 16 and is_aligned(weight):
        run(triton_fp8.multiply_fp8_units, (-(-rows // _ROWS), number), out, *tensors, rows, columns // 16,
            *strides(x, out), *grid, height, width, **constants, **options(slots, bias),
            **_at_once(columns // 16))  # fmt: skip
    else:
        run(triton_fp8.multiply_fp8, (rows, number), out, *tensors, rows, columns, *strides(x, out), *grid, height,
            width, **constants, **options(slots, bias), BLOCK=arguments.tile(columns))  # fmt: skip
    return True


def multiply_mxfp4(
    encoding: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, bias: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:  # fmt: skip
    """See :class:`.mxfp4.MXFP4`."""
    (number, rows), weight, blocks = out.shape, parts["weight"], x.shape[-1] // 32
    if not is_aligned(weight):
        return False
    from . import triton_mxfp4

    run(triton_mxfp4.multiply_mxfp4, (-(-rows // _ROWS), number), out, x, weight, parts["scale"],
        *given(slots, bias, x), out, rows, blocks, *strides(x, out), **options(slots, bias),
        **_at_once(blocks))  # fmt: skip
    return True


def _at_once(units: int) -> dict[str, int]:
    """Rows of a program and units of each: a thread has one, two warps share a row that is long enough."""
    warps = 1 if units <= 32 else 2
    return {"ROWS": _ROWS, "UNITS": 32 * warps, "num_warps": warps}


def multiply_words(
    encoding: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, bias: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:  # fmt: skip
    """See :class:`.gptq.GPTQ` and :class:`.awq.AWQ`: in shares of the inputs, whose sums are added after that."""
    from . import triton_runs

    length = _run_length(encoding, x.shape[-1], out.shape[-1])
    made = (
        _by_words(encoding, x, parts, slots, out)
        if length is None
        else _by_runs(encoding, x, parts, slots, out, length)
    )
    number, shares, columns = made.shape
    run(triton_runs.add_shares, (-(-columns // 128), number), out, made, given(None, bias, x)[1], out, shares, columns,
        out.stride(0), HAS_BIAS=bias is not None, SHARES=8, COLUMNS=128)  # fmt: skip
    return True


def _run_length(encoding: Any, inputs: int, outputs: int) -> int | None:
    """Inputs that share a scale and fill words; ``None`` where that is not so, or words of zero points are not full."""
    count = 8 if encoding.is_interleaved else 32 // encoding.bits
    unit = 1 if encoding.is_interleaved else count
    if encoding.bits == 3 or outputs % count:
        return None
    lengths = (length for length in (64, 32, 16, 8) if length % unit == 0)
    return next((length for length in lengths if encoding.group % length == 0 == inputs % length), None)


def _by_runs(
    encoding: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, out: torch.Tensor, length: int
) -> torch.Tensor:
    from . import triton_runs

    (number, columns), runs = out.shape, x.shape[-1] // length
    sums = torch.empty(number, -(-runs // _RUNS), columns, dtype=torch.float32, device=x.device)
    both = (x, parts["weight"], parts["zeros"], parts["scale"], given(slots, None, x)[0], sums, runs, columns,
                 strides(x, out)[0], encoding.group, _POWER)  # fmt: skip
    constants = {"RUN": length, "HAS_SLOTS": slots is not None, "RUNS": _RUNS}
    if encoding.is_interleaved:
        grid = -(-columns // 256), sums.shape[1], number
        run(triton_runs.multiply_awq, grid, out, *both, **constants, COLUMNS=32)
    else:
        grid = -(-columns // 128), sums.shape[1], number
        run(triton_runs.multiply_gptq, grid, out, *both, BITS=encoding.bits, OFFSET=encoding.offset, **constants,
            COLUMNS=128)  # fmt: skip
    return sums


def _by_words(
    encoding: Any, x: torch.Tensor, parts: Parts, slots: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    from . import triton_words

    (number, columns), inputs = out.shape, x.shape[-1]
    tensors, places, constants = arguments.of_words(encoding, parts)
    wide, tiles = -(-columns // arguments.COLUMNS), -(-inputs // arguments.ROWS)
    share = -(-tiles // max(_PROGRAMS // (wide * number), 1)) * arguments.ROWS
    sums = torch.empty(number, -(-inputs // share), columns, dtype=torch.float32, device=x.device)
    run(triton_words.multiply_words, (sums.shape[1], wide, number), out, x, *tensors, given(slots, None, x)[0], sums,
        inputs, columns, strides(x, out)[0], *places, encoding.group, share, HAS_SLOTS=slots is not None,
        **constants)  # fmt: skip
    return sums


# By :attr:`.Encoding.kernel`.
PRODUCTS: dict[str, Product] = {
    "blocks": multiply_blocks, "fp8": multiply_fp8, "mxfp4": multiply_mxfp4, "words": multiply_words,
}  # fmt: skip
