"""Unpacking by one kernel a matrix, where Triton is there (PyTorch for CUDA brings it on Linux) and the GPU is not old.

Everything here is also unpacked by plain PyTorch, in some ten launches and with room for what is between them; on a GPU
whose link is fast that takes longer than the copy. The first use of a kernel compiles it, for a second; Triton keeps
what it compiled on disk.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .ggml_blocks import Blocks

log = logging.getLogger(__name__)

_BLOCK = 1024
_ROWS, _COLUMNS = 16, 128
_broken: set[str] = set()


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether kernels can be compiled and run on ``device``; tried once, on one block."""
    if device.type != "cuda":
        return False
    block = torch.tensor([0, 0x3C, *range(16)], dtype=torch.uint8, device=device)  # Q4_0 with the scale 1
    wanted = [*range(-8, 8), *[-8] * 16]
    try:
        out = torch.empty(1, 32, dtype=torch.float16, device=device)
        _launch_blocks("Q4_0", 32, 18, block.view(1, -1), None, out)
        agrees = out[0].tolist() == wanted
    except Exception as error:  # no compiler, no headers, too old a GPU: Triton has a class of error for each
        log.info("packed weights are unpacked by PyTorch: Triton's kernels do not run here (%s: %s)",
                 type(error).__name__, error)  # fmt: skip
        return False
    if not agrees:
        log.warning("packed weights are unpacked by PyTorch: Triton's kernels are wrong on this GPU")
    return agrees


def unpack_blocks(blocks: Blocks, packed: torch.Tensor, out: torch.Tensor) -> bool:
    """Rows of GGML blocks ``[rows, bytes]`` into ``out`` ``[rows, columns]``; whether that was done."""

    def launch() -> None:
        _launch_blocks(blocks.name, blocks.values, blocks.nbytes, packed, blocks.table(out.device), out)

    return _try(blocks.name, out, launch)


def unpack_words(
    parts: Mapping[str, torch.Tensor], out: torch.Tensor, bits: int, offset: int, group: int, is_awq: bool
) -> bool:
    """Words of GPTQ or AWQ into ``out`` ``[in, out]``; whether that was done."""
    return _try(f"{bits}-bit words", out, lambda: _launch_words(parts, out, bits, offset, group, is_awq))


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, powers: torch.Tensor, out: torch.Tensor) -> bool:
    """Blocks ``[rows, columns / 2]`` and scales ``[rows, columns / 32]`` into ``out``; whether that was done.

    ``powers`` has half the power of two that each scale stands for, in float32.
    """
    return _try("mxfp4", out, lambda: _launch_mxfp4(blocks, scales, powers, out))


def _try(what: str, out: torch.Tensor, launch: Callable[[], None]) -> bool:
    if not out.numel() or what in _broken or not usable(out.device):
        return False
    try:
        launch()
    except Exception as error:  # Triton could not compile this one
        _broken.add(what)
        log.warning("%s weights are unpacked by PyTorch: Triton's kernel does not compile (%s: %s)", what,
                    type(error).__name__, error)  # fmt: skip
        return False
    return True


def _launch_blocks(
    kind: str, values: int, nbytes: int, packed: torch.Tensor, table: torch.Tensor | None, out: torch.Tensor
) -> None:
    from . import triton_blocks

    rows, columns = out.shape
    block = min(_BLOCK, 1 << (columns - 1).bit_length())
    table = packed if table is None else table
    _run(triton_blocks.unpack_blocks, (rows, -(-columns // block)), out, packed, table, out, columns, packed.stride(0),
         *out.stride(), KIND=kind, VALUES=values, NBYTES=nbytes, BLOCK=block)  # fmt: skip


def _launch_words(
    parts: Mapping[str, torch.Tensor], out: torch.Tensor, bits: int, offset: int, group: int, is_awq: bool
) -> None:
    from . import triton_words

    words, zeros, groups = parts["weight"], parts["zeros"], parts.get("group_index")
    rows, columns = out.shape
    _run(triton_words.unpack_words, (-(-rows // _ROWS), -(-columns // _COLUMNS)), out, words, zeros,
         parts["scale"], words if groups is None else groups, out, rows, columns, words.stride(0), zeros.stride(0),
         parts["scale"].stride(0), *out.stride(), group, BITS=bits, OFFSET=offset, IS_AWQ=is_awq,
         HAS_GROUPS=groups is not None, ROWS=_ROWS, COLUMNS=_COLUMNS)  # fmt: skip


def _launch_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, powers: torch.Tensor, out: torch.Tensor) -> None:
    from . import triton_words

    rows, columns = out.shape
    block = min(_BLOCK, 1 << (columns - 1).bit_length())
    _run(triton_words.unpack_mxfp4, (rows, -(-columns // block)), out, blocks, scales, powers, out, columns,
         *out.stride(), BLOCK=block)  # fmt: skip


def _run(kernel: Any, grid: tuple[int, int], out: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """On the current stream of the device of ``out``."""
    with torch.cuda.device_of(out):
        kernel[grid](*arguments, **constants)
