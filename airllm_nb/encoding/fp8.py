"""FP8 checkpoints: a byte a value (E4M3), times a scale for each block, row, column or matrix.

Block scales are those of DeepSeek-V3 and Qwen3 (``weight_scale_inv``, one for 128 × 128 values, fewer at the edges; as
bytes they are powers of two, OCP's E8M0); a scale a row or a matrix is what compressed-tensors, FBGEMM and NVIDIA's
ModelOpt write (``weight_scale``). Scales of activations are ignored: here activations are not rounded to FP8, so
nothing needs them, and the result is nearer to the model that was quantised. A product in FP8 would have to round them,
by up to 6% each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..tensors.index import TensorInfo
from .base import Encoded, Encoding, Parts, row_chunks
from .kernels import launch

FORMATS = ("float-quantized", "naive-quantized", "dense")  # of compressed-tensors
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")  # of ModelOpt
DEFAULT_BLOCK = (128, 128)  # transformers', where a config of method "fp8" says nothing
# What the name of a weight's scales ends in: after "x.weight", or in the place of "weight".
_ENDINGS, _SIBLINGS = ("_scale_inv", "_scale"), ("scale", "qscale_weight")
_EXPONENTS = ("F8_E8M0", "U8")
_SCALES = ("F16", "BF16", "F32", *_EXPONENTS)


@dataclass(frozen=True)
class FP8(Encoding):
    """``value = byte · scale of its block``.

    Attributes
    ----------
    block
        Rows and columns that share a scale; ``None`` is all of them.
    is_exponent
        Whether a scale is a byte ``e`` for ``2 ** (e - 127)``.
    """

    name = "fp8"
    spare = 0.0  # a device converts in place
    kernel: ClassVar[str] = "fp8"
    block: tuple[int | None, int | None]
    is_exponent: bool = False

    def row_steps(self, columns: int) -> dict[str, int] | None:
        return None if self.block[0] is None else {"weight": 1, "scale": self.block[0]}

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        rows, columns = out.shape
        if launch.unpack(self, parts, out):
            return
        weight, scale = parts["weight"].view(rows, columns), self._scale(parts["scale"], rows)
        width = self.block[1] or columns
        if out.device.type != "cpu":
            out.copy_(weight)  # exact in every dtype, so that the product is the only rounding
            _scale_columns(out, scale, width)
            return
        table = _values(weight.dtype)
        for chunk in row_chunks(rows, columns, out.device):
            bits = weight[chunk].view(torch.uint8).view(-1).to(torch.int32)
            values = table.index_select(0, bits).view(-1, columns)
            _scale_columns(values, scale[chunk], width)
            out[chunk].copy_(values)

    def whole_bytes(self, values: int) -> int:
        return 12 * -(-values // (self.block[1] or 128))  # scales in float32, for every row

    def _scale(self, scale: torch.Tensor, rows: int) -> torch.Tensor:
        """In float32, for every row: ``[rows, blocks of columns]``."""
        values = _power(scale) if self.is_exponent else scale.float()
        height = self.block[0]
        if height is None:
            return values.view(1, -1).expand(rows, -1)
        values = values.view(-(-rows // height), -1)
        return values if height == 1 else values.repeat_interleave(height, 0)[:rows]


def _scale_columns(values: torch.Tensor, scale: torch.Tensor, width: int) -> None:
    whole = values.shape[1] // width
    if whole:
        values[:, : whole * width].unflatten(1, (whole, width)).mul_(scale[:, :whole, None])
    if whole * width < values.shape[1]:
        values[:, whole * width :].mul_(scale[:, whole:])


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """``2 ** (exponent - 127)`` in float32, by its bits; the least is half of the least normal number."""
    bits = exponent.view(torch.uint8).to(torch.int32)
    return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)


@functools.cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    """Byte → value: on a processor several times faster than PyTorch's own conversion."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def check(settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be unpacked; see :mod:`.formats`."""
    method = settings.get("quant_method", "fp8")
    if method == "compressed-tensors":
        reason = _why_not(settings)
    elif method == "modelopt":
        found = settings.get("quant_algo")
        reason = "" if found in ALGORITHMS else f"its quant_algo {found!r} is not one of {', '.join(ALGORITHMS)}"
    elif settings.get("expert_dtype", "fp8") != "fp8":
        reason = f"its experts are {settings['expert_dtype']}"
    elif settings.get("fmt", "e4m3") not in ("e4m3", "e5m2"):
        reason = f"its values are {settings['fmt']}"
    else:
        reason = ""
    for block in _blocks(settings):
        if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            reason = reason or f"its block size is {list(block)}"
    if reason:
        raise UnsupportedModelError(f"a checkpoint quantised with {method} that cannot be streamed: {reason}; load the "
                                    "unquantised one, with compression='4bit' if it should be small")  # fmt: skip


def _why_not(settings: Mapping[str, Any]) -> str:
    """Why a checkpoint of compressed-tensors is not only a byte and a scale; empty if it is."""
    groups = _groups(settings)
    for form in [settings.get("format"), *(group.get("format") for group in groups)]:
        if form not in (None, *FORMATS):
            return f"compressed-tensors' format {form!r} is not one of {', '.join(FORMATS)}"
    for group in groups:
        weights = _mapping(group.get("weights"))
        if weights and (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            return f"its weights are {weights.get('num_bits')} bits of type {weights.get('type')!r}"
        if weights and not weights.get("symmetric", True):
            return "its weights have zero points"
        if weights.get("strategy") == "block" and weights.get("block_structure") is None:
            return "the size of its blocks is not said (block_structure)"
    sparsity = _mapping(settings.get("sparsity_config")).get("format", "dense")
    if sparsity != "dense":
        return f"its sparse weights are stored as {sparsity!r}"
    return "its activations are transformed (transform_config)" if settings.get("transform_config") else ""


def _blocks(settings: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The block sizes that a config names, whatever it holds there. Sizes of groups along a row are among them."""
    weights = [_mapping(group.get("weights")) for group in _groups(settings)]
    default = DEFAULT_BLOCK if settings.get("quant_method") == "fp8" else None
    along = [(1, given.get("group_size")) for given in weights if given.get("strategy") == "group"]
    for block in (settings.get("weight_block_size", default), *along, *(w.get("block_structure") for w in weights)):
        if isinstance(block, str):
            yield tuple(int(size) if size.isdecimal() and len(size) < 10 else size for size in block.split("x"))
        elif block is not None:
            yield tuple(block) if isinstance(block, (list, tuple)) else (block,)


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups of modules that compressed-tensors quantises each in its own way."""
    groups = _mapping(settings.get("config_groups")).values()
    return [group for group in groups if isinstance(group, Mapping)]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def find(
    settings: Mapping[str, Any], index: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Encoded]:
    """The packed weights of a checkpoint; see :mod:`.formats`."""
    blocks = [(rows, columns) for rows, columns in _blocks(settings)]
    found = {}
    for name, info in index.items():
        if info.dtype in ("F8_E4M3", "F8_E5M2") and len(info.shape) >= 2 and (scale := _scale_of(name, index)):
            found[name] = _packed(info, scale, blocks)
    return found


def _scale_of(name: str, index: Mapping[str, TensorInfo]) -> TensorInfo | None:
    names = [name + ending for ending in _ENDINGS]
    if name.endswith(".weight"):
        names += [f"{name.removesuffix('weight')}{sibling}" for sibling in _SIBLINGS]
    return next((index[scale] for scale in names if scale in index), None)


def _packed(info: TensorInfo, scale: TensorInfo, blocks: list[tuple[int, int]]) -> Encoded:
    """A matrix, or a stack of them."""
    *stack, rows, columns = info.shape
    count, given = math.prod(stack), scale.shape[len(stack) :]
    if scale.shape[: len(stack)] != tuple(stack):
        raise _wrong(info, scale)
    grid = (math.prod(given), 1) if len(given) < 2 else given
    if len(grid) != 2 or (len(given) == 1 and given[0] not in (1, rows)) or scale.dtype not in _SCALES:
        raise _wrong(info, scale)
    block = _block(rows, columns, grid, blocks)
    if block is None:
        raise _wrong(info, scale)
    is_exponent = scale.dtype in _EXPONENTS
    head = (count,) if stack else ()
    parts = {
        "weight": replace(info, shape=(*head, rows, columns)),
        # PyTorch had no dtype for E8M0 before 2.7.
        "scale": replace(scale, dtype="U8" if is_exponent else scale.dtype, shape=(*head, *grid)),
    }
    return Encoded(info.shape, (FP8(block, is_exponent),), parts, 1 if stack else None)


def _block(
    rows: int, columns: int, grid: tuple[int, ...], blocks: list[tuple[int, int]]
) -> tuple[int | None, int | None] | None:
    """Rows and columns that share a scale; ``None`` if the config says of no block that it makes such a grid.

    Nothing is guessed by division: two scales of 192 rows may be for 96 each, or for 128 and the rest.
    """
    named = next((block for block in blocks if grid == (-(-rows // block[0]), -(-columns // block[1]))), None)
    has_one_meaning = grid in ((1, 1), (rows, 1)) or (grid == (1, columns) and not blocks)
    if named is None and has_one_meaning:
        return (None if grid[0] == 1 else 1), (None if grid[1] == 1 else 1)
    return named


def _wrong(info: TensorInfo, scale: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{info.extents[0].path}: {info.name} of shape {list(info.shape)} and its scales "
                           f"{scale.name} ({scale.dtype}) of shape {list(scale.shape)} do not fit one another or the "
                           "config; download it again")  # fmt: skip
