"""What kernels are given beside tensors of their own, to unpack as well as to multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..base import Parts

TILE = 1024  # values
ROWS, COLUMNS = 16, 128  # of a tile of values that are packed in words


def of_blocks(blocks: Any, packed: torch.Tensor, columns: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """The table of the type, or anything, and constants."""
    table = blocks.table(packed.device)
    constants = {"KIND": blocks.name, "VALUES": blocks.values, "NBYTES": blocks.nbytes, "GROUP": blocks.group}
    return packed if table is None else table, {**constants, "GROUPS": tile(columns) // blocks.group}


def of_fp8(encoding: Any, parts: Parts, rows: int, columns: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Rows and columns that share a scale; constants."""
    height, width = encoding.block
    is_e5m2 = parts["weight"].dtype == torch.float8_e5m2
    return (height or rows, width or columns), {"IS_E5M2": is_e5m2, "IS_EXPONENT": encoding.is_exponent}


def of_words(encoding: Any, parts: Parts) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Tensors, their strides from row to row, and constants."""
    words, zeros, scale, groups = parts["weight"], parts["zeros"], parts["scale"], parts.get("group_index")
    order = "listed" if groups is not None else "tiles" if encoding.group % ROWS == 0 else "runs"
    constants = {"BITS": encoding.bits, "OFFSET": encoding.offset, "IS_AWQ": encoding.is_interleaved, "ORDER": order}
    strides = words.stride(-2), zeros.stride(-2), scale.stride(-2)
    tensors = words, zeros, scale, words if groups is None else groups
    return tensors, strides, {**constants, "ROWS": ROWS, "COLUMNS": COLUMNS}


def tile(columns: int) -> int:
    """Columns that are computed at once: a power of two."""
    return min(TILE, max(1 << (columns - 1).bit_length(), 32))


def tiles(columns: int) -> int:
    return -(-columns // tile(columns))
