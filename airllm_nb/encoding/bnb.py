"""bitsandbytes checkpoints as ``save_pretrained`` writes them: nf4 and fp4 (double quantisation too), and LLM.int8.

The 4 bits are those of :mod:`.nf4`. LLM.int8 (https://arxiv.org/abs/2208.07339) has a byte a value, one absmax a row;
the activations that it would quantise as well stay as they are: that is only more exact.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..tensors.index import ITEMSIZE, TensorInfo
from .base import Encoded, Encoding, Parts, affine, row_chunks, stored
from .nf4 import CODES, FP4, NF4

log = logging.getLogger(__name__)

STATE = ".quant_state.bitsandbytes__"  # weight, this, kind: the tensor that holds a weight's settings as JSON
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Int8(Encoding):
    """``value = byte · absmax of the row / 127``."""

    name = "int8"
    spare = 1.0
    kernel = "int8"

    def row_steps(self, columns: int) -> dict[str, int] | None:
        return None if self.transposed else {"weight": 1, "scale": 1}

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        weight, scale = parts["weight"].view(out.shape), parts["scale"].float().view(-1, 1) / 127
        rows, columns = out.shape
        for chunk in row_chunks(rows, columns, out.device, spare=self.spare):
            affine(weight[chunk], scale[chunk], None, out[chunk])


def check(settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be unpacked; see :mod:`.formats`."""
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if settings.get("load_in_4bit") and kind not in tuple(CODES):  # it may be anything, a list too
        raise UnsupportedModelError(f"bitsandbytes' 4-bit type {kind!r} is not known (these are: {', '.join(CODES)}); "
                                    "load the unquantised checkpoint, with compression='4bit'")  # fmt: skip


def find(
    settings: Mapping[str, Any], index: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Encoded]:
    """The packed weights of a checkpoint; see :mod:`.formats`."""
    found: dict[str, Encoded] = {}
    for name in index:
        weight, mark, kind = name.partition(STATE)
        packed = None
        if mark:
            packed = _four_bits(weight, kind, index, shapes.get(weight))
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('SCB')}weight"
            packed = _eight_bits(weight, index)
        if packed is not None:
            found[weight] = packed
    # transformers quantises the transpose of a Conv1D (GPT-2). A square one does not show that, its neighbours do.
    if any(packed.shape != shapes.get(name) == packed.shape[::-1] for name, packed in found.items()):
        return {
            name: replace(packed, shape=packed.shape[::-1], encodings=(replace(packed.encodings[0], transposed=True),))
            for name, packed in found.items()
        }
    return found


def _four_bits(
    weight: str, kind: str, index: Mapping[str, TensorInfo], shape: tuple[int, ...] | None
) -> Encoded | None:
    info, absmax = _part(index, weight), _part(index, f"{weight}.absmax")
    state = _state(index[f"{weight}{STATE}{kind}"])
    shape = tuple(state["shape"]) if state else shape
    if shape is None:
        log.warning("%s: its shape is in a file that is not here yet", weight)
        return None
    try:
        encoding = {"nf4": NF4, "fp4": FP4}[kind]
        rows, columns = (int(size) for size in shape)
        block = int(state.get("blocksize", _block(rows * columns, absmax)))
        nested = int(state.get("nested_blocksize", NESTED_BLOCK))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _wrong(info, f"its quantisation state cannot be read ({error})") from None
    if block not in BLOCKS or min(rows, columns, nested) < 1:
        raise _wrong(info, f"its shape is {rows} x {columns}, its blocks are {block} and {nested}")
    count, blocks = rows * columns, -(-rows * columns // block)
    if nested > max(blocks, NESTED_BLOCK):
        raise _wrong(info, f"its {blocks:,} blocks are quantised in blocks of {nested:,}")
    if not 0 <= info.nbytes - (count + 1) // 2 < 8:
        raise _wrong(info, f"{info.nbytes:,} bytes do not hold {rows} x {columns} values of 4 bits")
    aligned = columns % block == 0
    parts = {
        "weight": _sized(info, "U8", (rows, columns // 2) if aligned else (info.nbytes, 1)),
        "absmax": _sized(absmax, absmax.dtype, (rows, columns // block) if aligned else (blocks, 1)),
    }
    if f"{weight}.nested_absmax" not in index:
        if absmax.dtype == "U8":
            raise _wrong(absmax, f"it is quantised, and {weight}.nested_absmax is missing")
        _check_floats(absmax)
        return Encoded((rows, columns), (encoding(block),), parts)
    if absmax.dtype != "U8":
        raise _wrong(absmax, f"it is {absmax.dtype}, and {weight}.nested_absmax says that it is quantised")
    nested_absmax = _part(index, f"{weight}.nested_absmax")
    parts["nested_absmax"] = _sized(nested_absmax, nested_absmax.dtype, (-(-blocks // nested),))
    nested_map = _part(index, f"{weight}.nested_quant_map")
    parts["nested_quant_map"] = _sized(nested_map, nested_map.dtype, (256,))
    _check_floats(nested_absmax, nested_map)
    offset = _offset(info, state) if state else 0.0
    return Encoded((rows, columns), (encoding(block, nested, offset),), parts)


def _offset(info: TensorInfo, state: Mapping[str, Any]) -> float:
    try:
        offset = float(state["nested_offset"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _wrong(info, f"its nested_offset cannot be read ({type(error).__name__})") from None
    if not math.isfinite(offset):
        raise _wrong(info, f"its nested_offset is {offset}")
    return offset


def _check_floats(*scales: TensorInfo) -> None:
    for scale in scales:
        if scale.dtype not in FLOATS:
            raise _wrong(scale, f"it is {scale.dtype}, and scales are floats")


def _block(count: int, absmax: TensorInfo) -> int:
    """Values in a block, by how many blocks there are, where the state is in a file that is not here."""
    return next((size for size in BLOCKS if -(-count // size) == math.prod(absmax.shape)), 64)


def _eight_bits(weight: str, index: Mapping[str, TensorInfo]) -> Encoded:
    info, scale = _part(index, weight), _part(index, f"{weight.removesuffix('weight')}SCB")
    layout = index.get(f"{weight}_format")
    if layout is not None and (code := stored(layout)) not in (None, b"\0"):
        raise UnsupportedModelError(f"{weight} lies in the order of an old GPU (weight_format {list(code or b'')}); "
                                    "save the model again with a bitsandbytes of today")  # fmt: skip
    if info.dtype != "I8" or len(info.shape) != 2:
        raise _wrong(info, f"{info.dtype} of shape {list(info.shape)} is no matrix of LLM.int8")
    _check_floats(scale)
    parts = {"weight": info, "scale": _sized(scale, scale.dtype, (info.shape[0],))}
    return Encoded(info.shape, (Int8(),), parts)


def _part(index: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    if name not in index:
        raise CheckpointError(f"tensor {name!r} is missing beside its packed weight; download the checkpoint again")
    return index[name]


def _sized(info: TensorInfo, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """The same bytes with one row for each of the matrix's, where that goes. ``quant_storage`` may be any dtype."""
    sized = replace(info, dtype=dtype, shape=shape)
    if math.prod(shape) * ITEMSIZE[dtype] != info.nbytes:
        raise _wrong(info, f"its shape {list(info.shape)} should be {list(shape)}")
    return sized


def _state(info: TensorInfo) -> dict[str, Any]:
    """The settings of a weight; empty if the file is not here."""
    data = stored(info)
    if data is None:
        return {}
    try:
        state = json.loads(data)
        return {**state, "shape": [int(size) for size in state["shape"]]}
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _wrong(info, f"it is no quantisation state ({type(error).__name__})") from None


def _wrong(info: TensorInfo, what: str) -> CheckpointError:
    return CheckpointError(f"{info.extents[0].path}: {info.name}: {what}; download the file again")
