"""MXFP4: blocks of 32 floats of 4 bits that share a power of two, as the experts of gpt-oss lie in their checkpoints.

``…_blocks`` is ``[experts, out, in / 32, 16]`` and ``…_scales`` ``[experts, out, in / 32]``, both of bytes
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf). The native parameter is
``[experts, in, out]``: what lies there are its columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError
from ..tensors.index import TensorInfo
from .base import Encoded, Encoding, Parts, affine, row_chunks
from .kernels import launch

_BLOCK = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_WORDS = {2: torch.int32, 4: torch.int64}


@dataclass(frozen=True)
class MXFP4(Encoding):
    """``value · 2^(scale - 127)``; the low half of a byte is the first of its two values."""

    name: ClassVar[str] = "mxfp4"
    transposed: bool = field(default=True, kw_only=True)
    spare = 6.5
    kernel: ClassVar[str] = "mxfp4"

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        if launch.unpack(self, parts, out):
            return
        (rows, columns), device = out.shape, out.device
        blocks, scales = parts["weight"].view(rows, columns // 2), parts["scale"].view(rows, columns // _BLOCK, 1)
        for chunk in row_chunks(rows, columns, device, spare=self.spare):
            _fill(blocks[chunk], scales[chunk], out[chunk])

    def powers(self, device: torch.device) -> torch.Tensor:
        """For a kernel: byte → half of the power of two that it stands for."""
        return _half_powers(device)


def _fill(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """One chunk, whose temporaries are gone before the next."""
    # Half floats hold each value; a processor multiplies floats faster than it converts them.
    dtype = torch.float32 if out.device.type == "cpu" else out.dtype
    values = _pairs(dtype, out.device).index_select(0, blocks.flatten().int()).view(dtype)
    shape = (-1, out.shape[1] // _BLOCK, _BLOCK)
    scale = _powers(out.device).index_select(0, scales.flatten().int()).view(*shape[:2], 1)
    affine(values.view(shape), scale, None, out.unflatten(1, shape[1:]))


@functools.cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Byte → both of its values, as one integer of their size."""
    values = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)], dtype=dtype)
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), 1).view(_WORDS[dtype.itemsize]).flatten().to(device)


@functools.cache
def _half_powers(device: torch.device) -> torch.Tensor:
    return _powers(device) / 2


@functools.cache
def _powers(device: torch.device) -> torch.Tensor:
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
    powers[255] = torch.nan  # by the specification
    return powers.to(device)


def check(settings: Mapping[str, Any]) -> None:
    """Every checkpoint of this format can be unpacked."""


def find(
    settings: Mapping[str, Any], index: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Encoded]:
    """Every packed parameter of a checkpoint by its name without ``_blocks``.

    Raises
    ------
    CheckpointError
        If the tensors of a parameter do not fit one another, or are not what the model wants.
    """
    found = {}
    for name, blocks in index.items():
        if not name.endswith("_blocks"):
            continue
        stem = name.removesuffix("_blocks")
        if (scales := index.get(f"{stem}_scales")) is None:
            raise CheckpointError(f"{stem}_scales is missing beside {name}; download the checkpoint again")
        fits = len(scales.shape) == 3 and {blocks.dtype, scales.dtype} == {"U8"}
        if fits:
            experts, columns, rows = (*scales.shape[:2], scales.shape[2] * _BLOCK)
            fits = blocks.shape[:2] == (experts, columns) and math.prod(blocks.shape[2:]) == rows // 2
        if not fits or shapes.get(stem, (experts, rows, columns)) != (experts, rows, columns):
            raise CheckpointError(
                f"{stem}: its packed tensors do not fit the model or one another ({blocks.dtype} {list(blocks.shape)}, "
                f"scales {scales.dtype} {list(scales.shape)}); download the files again"
            )
        found[stem] = Encoded((experts, rows, columns), (MXFP4(),), {"weight": blocks, "scale": scales}, pieces=1)
    return found
