"""Kernels of our own, where Triton is there (PyTorch for CUDA brings it on Linux) and the GPU is not too old.

One unpacks a matrix, with no memory beside it; one multiplies the packed bytes with a single vector, the next token's,
which then reads nothing else, or each of a few vectors with a matrix of its own (:mod:`.slots`). PyTorch alone can do
the same (:meth:`.Encoding.unpack`) in some ten launches and with memory for what is between them, which on a fast link
takes longer than the copy. The first use of a kernel compiles it, for a second; Triton keeps what it compiled on disk.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import arguments
from .products import PRODUCTS
from .slots import SLOTS, Product, run

if TYPE_CHECKING:
    from ..base import Encoding, Parts

log = logging.getLogger(__name__)

# Those whose packing runs along the columns of what they unpack to.
BY_COLUMNS = ("words",)
OLDEST_GPU = (7, 0)  # compute capability; for older ones a compiler may end the process instead of raising an error
_Key = tuple[str, str, torch.device]
_usable: set[torch.device] = set()
_failed: collections.Counter[_Key] = collections.Counter()


def unpack(encoding: Encoding, parts: Parts, out: torch.Tensor) -> bool:
    """What :meth:`.Encoding.unpack` does, if there is a kernel for it; whether there was."""
    if not out.numel() or not unpacks(encoding, out.device):
        return False
    return _launch(_key("unpack", encoding, out.device), lambda: _UNPACK[encoding.kernel](encoding, parts, out))


def unpacks(encoding: Encoding, device: torch.device) -> bool:
    """Whether :func:`unpack` is to be expected to work."""
    return encoding.kernel in _UNPACK and usable(device) and _failed[_key("unpack", encoding, device)] < 2


def multiply(
    encoding: Encoding, x: torch.Tensor, parts: Parts, rows: int, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """``x @ weight.T + bias`` for one vector, if there is a kernel for it.

    It is given in float32 precision: weights are not rounded to the dtype of ``x``.
    """
    has_gradient = torch.is_grad_enabled() and x.requires_grad  # which no kernel here passes on
    # With inputs in an order, unpacking is not slower.
    if not multiplies(encoding, False) or x.numel() != x.shape[-1] or has_gradient or "group_index" in parts:
        return None
    if not usable(x.device) or _failed[key := _key("multiply", encoding, x.device)] > 1:
        return None
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    vector, product, below = x.contiguous().view(1, -1), MULTIPLY[encoding.kernel], out.view(1, -1)
    return out if _launch(key, lambda: product(encoding, vector, parts, None, bias, below)) else None


def multiply_slots(encoding: Encoding, x: torch.Tensor, parts: Parts, slots: torch.Tensor, out: torch.Tensor) -> bool:
    """``out[i] = x[i] @ matrix[slots[i]].T``: a few vectors, each with a matrix of its own, if there is a kernel.

    It never waits for the device, and what it launches depends on shapes alone: it may be captured in a graph. It is
    given in float32 precision, the same bits each time.

    Parameters
    ----------
    x
        ``[n, columns]``, or ``[1, columns]`` for all alike; of a floating dtype.
    parts
        Attribute → ``[matrices, *shape of one]``, contiguous; a matrix is what :meth:`.Encoding.unpack` makes of one,
        for encodings :data:`BY_COLUMNS` its transpose.
    slots
        ``[n]`` on the device, of an integer dtype; -1 gives zeros.
    out
        ``[n, rows]`` of a floating dtype, rows contiguous; they may lie apart.

    Returns
    -------
    bool
        Whether there was.
    """
    if encoding.kernel not in MULTIPLY or "group_index" in parts or not usable(x.device):
        return False
    if _failed[key := _key("slots", encoding, x.device)] > 1:
        return False
    x = x if x.stride(-1) == 1 else x.contiguous()
    return not out.numel() or _launch(key, lambda: MULTIPLY[encoding.kernel](encoding, x, parts, slots, None, out))


def multiplies(encoding: Encoding, transposed: bool) -> bool:
    """Whether there is a kernel for ``x @ weight.T``, or for ``x @ weight`` if ``transposed``."""
    return encoding.kernel in MULTIPLY and (encoding.transposed != (encoding.kernel in BY_COLUMNS)) == transposed


def usable(device: torch.device) -> bool:
    """Whether kernels can be compiled and run on ``device``: known after one was."""
    if device in _usable:
        return True
    key = "try", "one block", device
    if device.type != "cuda" or _failed[key] > 1 or torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return False
    if _launch(key, lambda: _try(device)):
        _usable.add(device)
    return device in _usable


def _try(device: torch.device) -> None:
    halves = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8, device=device)
    scale, power = torch.zeros(1, 1, dtype=torch.uint8, device=device), torch.ones(1, device=device)
    out = torch.empty(1, 32, dtype=torch.float16, device=device)
    _run_mxfp4(halves, scale, power, out)
    if out[0].tolist() != [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12] * 2:
        raise RuntimeError("a kernel gives wrong values on this GPU")


def _key(what: str, encoding: Encoding, device: torch.device) -> _Key:
    return what, f"{type(encoding).__name__}: {encoding.name}", device


def _launch(key: _Key, launch: Callable[[], bool | None]) -> bool:
    """Whether it was done. What failed is tried once more: Ctrl-C ends a compiler as well."""
    try:
        return launch() is not False
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no headers: Triton has a class of error for each
        _failed[key] += 1
        reason = next(iter(str(error).strip().splitlines()), "")
        level = logging.INFO if isinstance(error, ImportError) else logging.WARNING  # there is none but for Linux
        log.log(level, "PyTorch does it, as Triton's kernel failed (%s %s): %s: %s", *key[:2],
                type(error).__name__, reason)  # fmt: skip
        return False


# ---- launches --------------------------------------------------------------------------------------------------------


def _unpack_blocks(blocks: Any, parts: Parts, out: torch.Tensor) -> None:
    from . import triton_blocks

    packed, (rows, columns) = parts["weight"], out.shape
    table, constants = arguments.of_blocks(blocks, packed, columns)
    run(triton_blocks.unpack_blocks, (rows, arguments.tiles(columns)), out, packed, table, out, columns,
        packed.stride(0), *out.stride(), **constants)  # fmt: skip


def _unpack_fp8(encoding: Any, parts: Parts, out: torch.Tensor) -> None:
    from . import triton_fp8

    (rows, columns), weight = out.shape, parts["weight"].view(torch.uint8)
    (height, width), constants = arguments.of_fp8(encoding, parts, rows, columns)
    run(triton_fp8.unpack_fp8, (rows, arguments.tiles(columns)), out, weight, parts["scale"], out, columns, columns,
        -(-columns // width), height, width, *out.stride(), **constants, BLOCK=arguments.tile(columns))  # fmt: skip


def _unpack_words(encoding: Any, parts: Parts, out: torch.Tensor) -> None:
    from . import triton_words

    (rows, columns), (tensors, strides, constants) = out.shape, arguments.of_words(encoding, parts)
    grid = -(-rows // arguments.ROWS), -(-columns // arguments.COLUMNS)
    run(triton_words.unpack_words, grid, out, *tensors, out, rows, columns, *strides, *out.stride(), encoding.group,
        **constants)  # fmt: skip


def _unpack_mxfp4(encoding: Any, parts: Parts, out: torch.Tensor) -> None:
    _run_mxfp4(parts["weight"].view(len(out), -1), parts["scale"].view(len(out), -1), encoding.powers(out.device), out)


def _run_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, powers: torch.Tensor, out: torch.Tensor) -> None:
    """``powers`` has half the power of two that each scale stands for, in float32."""
    from . import triton_words

    rows, columns = out.shape
    run(triton_words.unpack_mxfp4, (rows, arguments.tiles(columns)), out, blocks, scales, powers, out, columns,
        *out.stride(), BLOCK=arguments.tile(columns))  # fmt: skip


_UNPACK: dict[str, Callable[..., None]] = {
    "blocks": _unpack_blocks, "fp8": _unpack_fp8, "words": _unpack_words, "mxfp4": _unpack_mxfp4,
}  # fmt: skip
# By :attr:`.Encoding.kernel`.
MULTIPLY: dict[str, Product] = SLOTS | PRODUCTS
