"""bitsandbytes checkpoints as ``save_pretrained`` writes them: nf4 and fp4 (double quantisation too), and LLM.int8.

4 bits (QLoRA, https://arxiv.org/abs/2305.14314): two values a byte, the first in the high half, over the flattened
matrix; blocks of 64 values share an absmax, which may itself be quantised in blocks of 256. 8 bits
(https://arxiv.org/abs/2208.07339): a byte a value, one absmax a row. The activations that LLM.int8 would quantise as
well stay as they are: that is only more exact.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..tensors.index import ITEMSIZE, TensorInfo
from .ours import dequantise_4bit, has_4bit_kernels, is_fused_4bit, multiply_4bit
from .packing import Packed, Packing, affine, row_chunks, stored

log = logging.getLogger(__name__)

STATE = ".quant_state.bitsandbytes__"  # weight, this, kind: the tensor that holds a weight's settings as JSON
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
FLOATS = ("F16", "BF16", "F32", "F64")
# The code of fp4 is a number of one sign, two exponent and one fraction bit, by 12.
CODES = {
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip


@dataclass(frozen=True)
class NF4(Packing):
    """Blocks of ``block`` values over the flattened matrix.

    Attributes
    ----------
    nested, offset
        Of the quantised absmax: how many share a ``nested_absmax`` (0: it is float32), and their mean.
    aligned
        Whether every row is a whole number of blocks.
    """

    name = "nf4"
    spare = 5.5
    block: int = 64
    nested: int = 0
    offset: float = 0.0
    aligned: bool = False

    def __post_init__(self) -> None:
        if self.aligned and not self.nested and not self.transposed:
            object.__setattr__(self, "row_steps", {"weight": 1, "absmax": 1})

    def unpack(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        packed, absmax = parts["weight"].reshape(-1), self._absmax(parts)
        if out.is_contiguous() and has_4bit_kernels(out.device):
            dequantise_4bit(packed, absmax, out, self.block, self.name)
            return
        columns, block = out.shape[1], self.block
        for rows in row_chunks(out.shape[0], columns, out.device, block // math.gcd(block, columns), self.spare):
            first, last = rows.start * columns, rows.stop * columns
            self._fill(packed[first // 2 : (last + 1) // 2], absmax[first // block : -(-last // block)], out[rows])

    def _fill(self, packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
        """Rows that begin with a block; what it makes is gone before the next."""
        (rows, columns), block = out.shape, self.block
        values = _pairs(self.name, out.device).index_select(0, packed.to(torch.int32)).view(torch.float32)
        values = values[: rows * columns]
        if columns % block == 0:
            blocks = (columns // block, block)
            affine(values.view(-1, *blocks), absmax.view(-1, blocks[0], 1), None, out.unflatten(1, blocks))
            return
        whole = rows * columns // block
        values[: whole * block].view(-1, block).mul_(absmax[:whole, None])
        values[whole * block :].mul_(absmax[-1])
        out.copy_(values.view(-1, columns))

    def whole_bytes(self, values: int) -> int:
        blocks = -(-values // self.block)
        return 12 * blocks if self.nested else 4 * blocks  # absmax in float32; nested ones are looked up and repeated

    def multiply(
        self, x: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        fits = x.device.type == "cuda" and not self.transposed
        if not fits or not is_fused_4bit(x, shape[0], self.block):  # asked first: absmax may not be needed
            return None
        return multiply_4bit(x, parts["weight"], self._absmax(parts), shape, bias, self.block, self.name)

    def _absmax(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The absmax of every block in float32."""
        absmax = parts["absmax"].reshape(-1)
        if not self.nested:
            return absmax.float()
        values = parts["nested_quant_map"].float().index_select(0, absmax.to(torch.int32))
        nested = parts["nested_absmax"].float()[:, None].expand(-1, self.nested).reshape(-1)
        return values.mul_(nested[: values.numel()]).add_(self.offset)


class FP4(NF4):
    name = "fp4"


class NF4Transposed(NF4):
    transposed = True


class FP4Transposed(FP4):
    transposed = True


@dataclass(frozen=True)
class Int8(Packing):
    """``value = byte · absmax of the row / 127``."""

    name = "int8"
    spare = 1.0

    def __post_init__(self) -> None:
        if not self.transposed:
            object.__setattr__(self, "row_steps", {"weight": 1, "scale": 1})

    def unpack(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        weight, scale = parts["weight"].view(out.shape), parts["scale"].float().view(-1, 1) / 127
        rows, columns = out.shape
        for chunk in row_chunks(rows, columns, out.device, spare=self.spare):
            affine(weight[chunk], scale[chunk], None, out[chunk])


class Int8Transposed(Int8):
    transposed = True


_TRANSPOSED: dict[type[Packing], Any] = {NF4: NF4Transposed, FP4: FP4Transposed, Int8: Int8Transposed}


@functools.cache
def _pairs(kind: str, device: torch.device) -> torch.Tensor:
    """Byte → its two values in float32, as one integer of 64 bits, so that one look-up takes both."""
    code = torch.tensor(CODES[kind], dtype=torch.float32)
    pairs = torch.stack([code[:, None].expand(16, 16), code[None].expand(16, 16)], -1)
    return pairs.view(torch.int64).view(-1).to(device)


def check(settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be unpacked; see :mod:`.formats`."""
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if settings.get("load_in_4bit") and kind not in tuple(CODES):  # it may be anything, a list too
        raise UnsupportedModelError(f"bitsandbytes' 4-bit type {kind!r} is not known (these are: {', '.join(CODES)}); "
                                    "load the unquantised checkpoint, with compression='4bit'")  # fmt: skip


def find(
    settings: Mapping[str, Any], index: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Packed]:
    """The packed weights of a checkpoint; see :mod:`.formats`."""
    found: dict[str, Packed] = {}
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
        return {name: _turned(packed) for name, packed in found.items()}
    return found


def _turned(packed: Packed) -> Packed:
    packing: Any = packed.packing[0]
    turned = _TRANSPOSED[type(packing)](**asdict(packing))
    return replace(packed, shape=packed.shape[::-1], packing=(turned,))


def _four_bits(weight: str, kind: str, index: Mapping[str, TensorInfo], shape: tuple[int, ...] | None) -> Packed | None:
    info, absmax = _part(index, weight), _part(index, f"{weight}.absmax")
    state = _state(index[f"{weight}{STATE}{kind}"])
    shape = tuple(state["shape"]) if state else shape
    if shape is None:
        log.warning("%s: its shape is in a file that is not here yet", weight)
        return None
    try:
        packing_type = {"nf4": NF4, "fp4": FP4}[kind]
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
        return Packed((rows, columns), (packing_type(block, aligned=aligned),), parts)
    if absmax.dtype != "U8":
        raise _wrong(absmax, f"it is {absmax.dtype}, and {weight}.nested_absmax says that it is quantised")
    nested_absmax = _part(index, f"{weight}.nested_absmax")
    parts["nested_absmax"] = _sized(nested_absmax, nested_absmax.dtype, (-(-blocks // nested),))
    nested_map = _part(index, f"{weight}.nested_quant_map")
    parts["nested_quant_map"] = _sized(nested_map, nested_map.dtype, (256,))
    _check_floats(nested_absmax, nested_map)
    offset = _offset(info, state) if state else 0.0
    return Packed((rows, columns), (packing_type(block, nested, offset, aligned),), parts)


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


def _eight_bits(weight: str, index: Mapping[str, TensorInfo]) -> Packed:
    info, scale = _part(index, weight), _part(index, f"{weight.removesuffix('weight')}SCB")
    layout = index.get(f"{weight}_format")
    if layout is not None and (code := stored(layout)) not in (None, b"\0"):
        raise UnsupportedModelError(f"{weight} lies in the order of an old GPU (weight_format {list(code or b'')}); "
                                    "save the model again with a bitsandbytes of today")  # fmt: skip
    if info.dtype != "I8" or len(info.shape) != 2:
        raise _wrong(info, f"{info.dtype} of shape {list(info.shape)} is no matrix of LLM.int8")
    _check_floats(scale)
    parts = {"weight": info, "scale": _sized(scale, scale.dtype, (info.shape[0],))}
    return Packed(info.shape, (Int8(),), parts)


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
