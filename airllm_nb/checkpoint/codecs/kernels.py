"""Kernels of our own, where Triton is there (PyTorch for CUDA brings it on Linux) and the GPU is not too old.

One unpacks a matrix, with no memory beside it; one multiplies the packed bytes with a single vector, the next token's,
which then reads nothing else. PyTorch alone can do the same (:meth:`.Packing.unpack`) in some ten launches and with
memory for what is between them, which on a fast link takes longer than the copy. The first use of a kernel compiles it,
for a second; Triton keeps what it compiled on disk.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .fp8 import FP8
    from .ggml_blocks import Blocks
    from .packing import Parts

log = logging.getLogger(__name__)

_TILE = 1024  # values
_ROWS, _COLUMNS = 16, 128  # of words
# Of a product with words, which are summed in shares: enough of them to keep a large GPU busy.
_PROGRAMS = 1024
# GGUF's types whose scales are of 16 values; those of the others are of 32 or more.
_SIXTEENS = {"Q2_K", "Q3_K", "Q6_K", "NVFP4", "IQ2_XS", "IQ2_S", "IQ1_M"}
_broken: set[str] = set()


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether kernels can be compiled and run on ``device``; tried once, on one block."""
    if device.type != "cuda":
        return False
    try:
        halves = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8, device=device)
        scale, power = torch.zeros(1, 1, dtype=torch.uint8, device=device), torch.ones(1, device=device)
        out = torch.empty(1, 32, dtype=torch.float16, device=device)
        _unpack_mxfp4(halves, scale, power, out)
        agrees = out[0].tolist() == [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12] * 2
    except Exception as error:  # no compiler, no headers, too old a GPU: Triton has a class of error for each
        log.info("packed weights are unpacked by PyTorch: Triton's kernels do not run here (%s: %s)",
                 type(error).__name__, error)  # fmt: skip
        return False
    if not agrees:
        log.warning("packed weights are unpacked by PyTorch: Triton's kernels are wrong on this GPU")
    return agrees


# ---- one matrix; each returns whether that was done ------------------------------------------------------------------


def unpack_blocks(blocks: Blocks, packed: torch.Tensor, out: torch.Tensor) -> bool:
    """Rows of GGML blocks ``[rows, bytes]`` into ``out`` ``[rows, columns]``."""
    return _try(blocks.name, out, lambda: _unpack_blocks(blocks, packed, out))


def unpack_fp8(packing: FP8, parts: Parts, out: torch.Tensor) -> bool:
    """Bytes ``[rows, columns]`` with their scales into ``out``."""
    return _try("FP8", out, lambda: _unpack_fp8(packing, parts, out))


def unpack_words(parts: Parts, out: torch.Tensor, bits: int, offset: int, group: int, is_awq: bool) -> bool:
    """Words of GPTQ or AWQ into ``out`` ``[in, out]``."""
    return _try(f"{bits}-bit", out, lambda: _unpack_words(parts, out, bits, offset, group, is_awq))


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, powers: torch.Tensor, out: torch.Tensor) -> bool:
    """Blocks ``[rows, columns / 2]`` and scales ``[rows, columns / 32]`` into ``out``.

    ``powers`` has half the power of two that each scale stands for, in float32.
    """
    return _try("mxfp4", out, lambda: _unpack_mxfp4(blocks, scales, powers, out))


# ---- one vector; each returns ``x @ weight.T + bias``, or ``None`` where that was not done ---------------------------


def multiply_blocks(
    blocks: Blocks, x: torch.Tensor, packed: torch.Tensor, rows: int, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """With rows of GGML blocks."""
    return _product(blocks.name, x, rows, lambda out: _multiply_blocks(blocks, x, packed, bias, out))


def multiply_fp8(
    packing: FP8, x: torch.Tensor, parts: Parts, rows: int, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """With bytes and their scales."""
    return _product("FP8", x, rows, lambda out: _multiply_fp8(packing, x, parts, bias, out))


def multiply_words(
    x: torch.Tensor, parts: Parts, rows: int, bias: torch.Tensor | None, bits: int, offset: int, group: int,
    is_awq: bool,
) -> torch.Tensor | None:  # fmt: skip
    """With words of GPTQ or AWQ, unless their inputs are in an order: then unpacking is not slower."""

    def launch(out: torch.Tensor) -> None:
        _multiply_words(x, parts, bias, out, bits, offset, group, is_awq)

    return None if "group_index" in parts else _product(f"{bits}-bit", x, rows, launch)


def _product(what: str, x: torch.Tensor, rows: int, launch: Callable[[torch.Tensor], None]) -> torch.Tensor | None:
    has_gradient = torch.is_grad_enabled() and x.requires_grad  # which no kernel here passes on
    if x.numel() != x.shape[-1] or has_gradient or not usable(x.device):
        return None
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    return out if _try(what, out, lambda: launch(out)) else None


def _try(what: str, out: torch.Tensor, launch: Callable[[], None]) -> bool:
    if not out.numel() or what in _broken or not usable(out.device):
        return False
    try:
        launch()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton could not compile this one
        _broken.add(what)
        log.warning("%s weights are unpacked by PyTorch: Triton's kernel does not compile (%s: %s)", what,
                    type(error).__name__, error)  # fmt: skip
        return False
    return True


# ---- launches --------------------------------------------------------------------------------------------------------


def _unpack_blocks(blocks: Blocks, packed: torch.Tensor, out: torch.Tensor) -> None:
    from . import triton_blocks

    (rows, columns), (table, constants) = out.shape, _of_blocks(blocks, packed, out.shape[1])
    _run(triton_blocks.unpack_blocks, (rows, _tiles(columns)), out, packed, table, out,
         columns, packed.stride(0), *out.stride(), **constants)  # fmt: skip


def _multiply_blocks(
    blocks: Blocks, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    from . import triton_blocks

    x, (table, constants) = x.reshape(-1), _of_blocks(blocks, packed, x.shape[-1])
    _run(triton_blocks.multiply_blocks, (out.shape[-1],), out, x, packed, table, x if bias is None else bias, out,
         len(x), packed.stride(0), HAS_BIAS=bias is not None, **constants)  # fmt: skip


def _of_blocks(blocks: Blocks, packed: torch.Tensor, columns: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """The table of the type, or anything, and constants."""
    table, group = blocks.table(packed.device), 16 if blocks.name in _SIXTEENS else 32
    constants = {"KIND": blocks.name, "VALUES": blocks.values, "NBYTES": blocks.nbytes, "GROUP": group}
    return packed if table is None else table, {**constants, "GROUPS": _tile(columns) // group}


def _unpack_fp8(packing: FP8, parts: Parts, out: torch.Tensor) -> None:
    from . import triton_fp8

    rows, columns = out.shape
    weight, arguments, constants = _of_fp8(packing, parts, rows, columns)
    _run(triton_fp8.unpack_fp8, (rows, _tiles(columns)), out, weight, parts["scale"], out, *arguments, *out.stride(),
         **constants)  # fmt: skip


def _multiply_fp8(packing: FP8, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    from . import triton_fp8

    x, rows = x.reshape(-1), out.shape[-1]
    weight, arguments, constants = _of_fp8(packing, parts, rows, len(x))
    _run(triton_fp8.multiply_fp8, (rows,), out, x, weight, parts["scale"], x if bias is None else bias, out,
         *arguments, HAS_BIAS=bias is not None, **constants)  # fmt: skip


def _of_fp8(
    packing: FP8, parts: Parts, rows: int, columns: int
) -> tuple[torch.Tensor, tuple[int, ...], dict[str, Any]]:
    """The bytes; columns, strides and the block; constants."""
    weight, (height, width) = parts["weight"].view(rows, columns), packing.block
    height, width = height or rows, width or columns
    arguments = columns, weight.stride(0), -(-columns // width), height, width
    constants = {"IS_E5M2": weight.dtype == torch.float8_e5m2, "IS_EXPONENT": packing.is_exponent}
    return weight.view(torch.uint8), arguments, {**constants, "BLOCK": _tile(columns)}


def _unpack_words(parts: Parts, out: torch.Tensor, bits: int, offset: int, group: int, is_awq: bool) -> None:
    from . import triton_words

    rows, columns = out.shape
    arguments, constants = _of_words(parts, bits, offset, group, is_awq)
    words, zeros, scale, groups, *strides = arguments
    _run(triton_words.unpack_words, (-(-rows // _ROWS), -(-columns // _COLUMNS)), out, words, zeros, scale, groups, out,
         rows, columns, *strides, *out.stride(), group, **constants)  # fmt: skip


def _multiply_words(
    x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, out: torch.Tensor, bits: int, offset: int, group: int,
    is_awq: bool,
) -> None:  # fmt: skip
    from . import triton_words

    x, columns = x.reshape(-1), out.shape[-1]
    arguments, constants = _of_words(parts, bits, offset, group, is_awq)
    words, zeros, scale, groups, *strides = arguments
    wide, tiles = -(-columns // _COLUMNS), -(-len(x) // _ROWS)
    share = -(-tiles // max(_PROGRAMS // wide, 1)) * _ROWS
    sums = torch.empty(-(-len(x) // share), columns, dtype=torch.float32, device=x.device)
    _run(triton_words.multiply_words, (len(sums), wide), out, x, words, zeros, scale, groups, sums, len(x), columns,
         *strides, group, share, **constants)  # fmt: skip
    product = sums.sum(0)
    out.view(-1).copy_(product if bias is None else product.add_(bias))


def _of_words(parts: Parts, bits: int, offset: int, group: int, is_awq: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    words, zeros, scale, groups = parts["weight"], parts["zeros"], parts["scale"], parts.get("group_index")
    order = "listed" if groups is not None else "tiles" if group % _ROWS == 0 else "runs"
    constants = {"BITS": bits, "OFFSET": offset, "IS_AWQ": is_awq, "ORDER": order, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    strides = words.stride(0), zeros.stride(0), scale.stride(0)
    return (words, zeros, scale, words if groups is None else groups, *strides), constants


def _unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, powers: torch.Tensor, out: torch.Tensor) -> None:
    from . import triton_words

    rows, columns = out.shape
    _run(triton_words.unpack_mxfp4, (rows, _tiles(columns)), out, blocks, scales, powers, out, columns, *out.stride(),
         BLOCK=_tile(columns))  # fmt: skip


def _tile(columns: int) -> int:
    """Columns that are computed at once: a power of two."""
    return min(_TILE, max(1 << (columns - 1).bit_length(), 32))


def _tiles(columns: int) -> int:
    return -(-columns // _tile(columns))


def _run(kernel: Any, grid: tuple[int, ...], out: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """On the current stream of the device of ``out``."""
    with torch.cuda.device_of(out):
        kernel[grid](*arguments, **constants)
