"""Weights in fewer bytes: how a matrix is encoded for the disk, and the module that computes on the encoded bytes.

``"4bit"`` is bitsandbytes' nf4 (QLoRA, https://arxiv.org/abs/2305.14314): blocks of 64 values, float32 absmax, no
double quantisation. ``"8bit"`` is affine: blocks of 32 values, each a byte between the least and the greatest of its
block. Blocks run over the flattened matrix. This is the only file that imports bitsandbytes.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import OptionError
from ..tensors.dtypes import TORCH_DTYPES
from .linear import EncodedLinear, Part, Scratch

__all__ = [
    "TORCH_DTYPES", "Codec", "EncodedLinear", "Part", "Scratch", "compressible", "dequantise_4bit", "get_codec",
    "has_4bit_kernels", "is_fused_4bit", "multiply_4bit",
]  # fmt: skip


class Codec:
    """No compression: a weight is its own only part. The other codecs have the same face."""

    name: ClassVar[str] = "none"
    block: ClassVar[int] = 1

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        """What a weight of this shape becomes; pure, so that plans and disk checks need no weight.

        ``dtype`` is the safetensors name of the dtype that the weight has before it is encoded.
        """
        return (Part("weight", dtype, tuple(shape)),)

    def row_step(self, shape: tuple[int, ...]) -> int:
        """Rows can be encoded in chunks of a multiple of this; the parts' bytes, joined, are the same."""
        return self.block // math.gcd(self.block, math.prod(shape[1:]) or 1)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode a weight, or a chunk of its rows, where it lies. The parts are keyed by attribute, on its device."""
        return {"weight": weight.contiguous()}

    def module(self, linear: nn.Linear, compute_dtype: torch.dtype, scratch: Scratch) -> nn.Module:
        """A module in the place of ``linear`` that computes on the parts; ``scratch`` is shared by a whole model."""
        return linear

    def require(self, device: torch.device | str = "cpu") -> None:
        """Check now that this codec works on ``device``.

        Raises
        ------
        OptionError
            If bitsandbytes is needed and is missing or broken; the message says how to install it.
        """


class _NF4(Codec):
    name = "4bit"
    block = 64

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        packed = _grid(shape, 2)
        return Part("weight", "U8", packed), Part("absmax", "F32", _grid(shape, self.block))

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, absmax = self._quantise(weight)
        weight_part, absmax_part = self.parts(tuple(weight.shape), "F32")
        return {"weight": packed.view(weight_part.shape), "absmax": absmax.view(absmax_part.shape)}

    def _quantise(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bnb = _bitsandbytes()
        packed, state = bnb.functional.quantize_4bit(weight.contiguous(), blocksize=self.block, quant_type="nf4")
        return packed, state.absmax

    def module(self, linear: nn.Linear, compute_dtype: torch.dtype, scratch: Scratch) -> nn.Module:
        _bitsandbytes()
        return _NF4Linear(linear, self.parts(_shape(linear), "F32"), compute_dtype, scratch)

    def require(self, device: torch.device | str = "cpu") -> None:
        _bitsandbytes()
        try:
            self._quantise(torch.zeros(1, self.block, device=device))
        except Exception as error:  # a library for another CUDA fails at its first call, with any class of error
            raise _unusable(error) from error


class _NF4Linear(EncodedLinear):
    def _compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        product = multiply_4bit(x, self.weight, self.absmax, shape, bias, _NF4.block, "nf4")
        return super()._compute(x, bias) if product is None else product

    def _dequantise(self) -> torch.Tensor:
        if self.weight.device.type == "cuda":
            room = self._room()
            dequantise_4bit(self.weight, self.absmax, room, _NF4.block, "nf4")
            return room
        packed, absmax, dtype = self.weight.view(-1, 1), self.absmax.view(-1), self.compute_dtype
        operator = torch.ops.bitsandbytes.dequantize_4bit
        # Elsewhere bitsandbytes cannot write into a given tensor, and it is wrong where a row is no whole number of
        # blocks (0.50.2): hence block by block, and what is left after them on its own.
        count = self.out_features * self.in_features
        whole, rest = divmod(count, _NF4.block)
        values = operator.default(packed[: whole * 32], absmax[:whole], _NF4.block, "nf4", [whole, 64], dtype)
        if rest:
            last = operator.default(packed[whole * 32 :], absmax[whole:], _NF4.block, "nf4", [1, rest], dtype)
            values = torch.cat([values.view(-1), last.view(-1)])
        return values.view(self.out_features, self.in_features)


@functools.cache
def has_4bit_kernels(device: torch.device) -> bool:
    """Whether :func:`dequantise_4bit` and :func:`multiply_4bit` work on ``device``; tried once."""
    if device.type != "cuda":
        return False
    try:
        get_codec("4bit").require(device)
    except OptionError:
        return False
    return True


def dequantise_4bit(packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor, block: int, kind: str) -> None:
    """Dequantise a matrix into ``out``, which is contiguous, by one kernel of bitsandbytes.

    ``absmax`` is float32 for every ``block`` values, ``kind`` is ``"nf4"`` or ``"fp4"``.
    """
    operator = torch.ops.bitsandbytes.dequantize_4bit
    operator.out(packed.view(-1, 1), absmax.view(-1), block, kind, list(out.shape), out.dtype, out=out)


def multiply_4bit(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None,
    block: int, kind: str,
) -> torch.Tensor | None:  # fmt: skip
    """``x @ weight.T + bias`` by bitsandbytes' kernel on packed bytes; ``None`` where it has none or would dequantise.

    ``shape`` is that of the weight; for the others see :func:`dequantise_4bit`.
    """
    if not is_fused_4bit(x, shape[0], block):
        return None
    bnb = _bitsandbytes()
    state = bnb.functional.QuantState(
        absmax=absmax.view(-1), shape=torch.Size(shape), code=_code(kind, x.device), blocksize=block, quant_type=kind,
        dtype=x.dtype,
    )  # fmt: skip
    product: torch.Tensor = bnb.matmul_4bit(x, packed.view(-1, 1).t(), quant_state=state, bias=bias)
    return product


class _Affine8(Codec):
    """``value = minimum + byte · spread / 255``.

    The spread, not the step, is stored: a step in float16 would be subnormal for weights below 0.01.
    """

    name = "8bit"
    block = 32

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        blocks = _grid(shape, self.block)
        return Part("weight", "U8", tuple(shape)), Part("spread", "F16", blocks), Part("minimum", "F16", blocks)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = weight.reshape(-1).float()
        if short := -flat.numel() % self.block:
            flat = torch.cat([flat, flat[-1:].expand(short)])
        values = flat.view(-1, self.block)  # [blocks, 32]
        limit = torch.finfo(torch.float16).max
        minimum = values.amin(1, keepdim=True).clamp(-limit, limit).half()
        spread = (values.amax(1, keepdim=True) - minimum).clamp(0, limit).half()
        # Bytes fit the rounded minimum and spread, so that their rounding costs no precision.
        steps = (values - minimum) * (255 / spread.float().clamp(min=1e-30))
        encoded = steps.round_().clamp_(0, 255).to(torch.uint8).view(-1)[: weight.numel()]
        shape = _grid(tuple(weight.shape), self.block)
        return {"weight": encoded.view(weight.shape), "spread": spread.view(shape), "minimum": minimum.view(shape)}

    def module(self, linear: nn.Linear, compute_dtype: torch.dtype, scratch: Scratch) -> nn.Module:
        return _Affine8Linear(linear, self.parts(_shape(linear), "F32"), compute_dtype, scratch)


class _Affine8Linear(EncodedLinear):
    def _dequantise(self) -> torch.Tensor:
        room, block = self._room(), _Affine8.block
        encoded, out = self.weight.view(-1), room.view(-1)
        spread, minimum = self.spread.view(-1, 1), self.minimum.view(-1, 1)
        whole = encoded.numel() // block * block
        affine = _affine_on_device if encoded.is_cuda else _affine_on_host
        affine(encoded[:whole].view(-1, block), spread, minimum, out[:whole].view(-1, block))
        if whole < encoded.numel():
            affine(encoded[whole:].view(1, -1), spread[-1:], minimum[-1:], out[whole:].view(1, -1))
        return room


def _affine_on_device(encoded: torch.Tensor, spread: torch.Tensor, minimum: torch.Tensor, out: torch.Tensor) -> None:
    """One kernel; it computes in float32 inside."""
    if out.dtype == torch.float32:
        spread, minimum = spread.float(), minimum.float()
    rows = out.shape[0]
    torch.addcmul(minimum[:rows], encoded, spread[:rows], value=1 / 255, out=out)


def _affine_on_host(encoded: torch.Tensor, spread: torch.Tensor, minimum: torch.Tensor, out: torch.Tensor) -> None:
    """Half a million values at a time, so that the float32 ones stay in the processor's cache."""
    step = 1 << 14
    values = torch.empty(min(step, out.shape[0]), out.shape[1])
    for first in range(0, out.shape[0], step):
        rows = slice(first, min(first + step, out.shape[0]))
        chunk = values[: rows.stop - first].copy_(encoded[rows])
        out[rows].copy_(chunk.mul_(spread[rows].float() / 255).add_(minimum[rows].float()))


_CODECS: dict[str | None, Codec] = {None: Codec(), "none": Codec(), "4bit": _NF4(), "8bit": _Affine8()}


def get_codec(name: str | None) -> Codec:
    """The codec of ``compression=name``: ``None``, ``"none"``, ``"4bit"`` or ``"8bit"``."""
    if name not in _CODECS:
        raise OptionError(f"compression={name!r} is not known; use None, '4bit' or '8bit'")
    return _CODECS[name]


def compressible(model: nn.Module) -> list[str]:
    """The names of the modules that compression replaces, by the rule of transformers' own bitsandbytes loading.

    These are the ``nn.Linear`` modules except the output head, tied ones and ``_keep_in_fp32_modules``. GPT-2's
    ``Conv1D`` stays as it is: its weights lie transposed in the checkpoint. So does a layer whose matrix is read
    without a call (``reads_weight``, which :mod:`~airllm_nb.model.calls` finds): an encoded one has none to read.
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or [])]
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, kept) and not hasattr(module, "reads_weight")
    ]


def _grid(shape: tuple[int, ...], block: int) -> tuple[int, int]:
    """One entry for every ``block`` values; rows are kept where blocks do not cross them. Always two dimensions."""
    columns = math.prod(shape[1:])
    if columns and columns % block == 0:
        return shape[0], columns // block
    return -(-math.prod(shape) // block), 1


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


@functools.cache
def _bitsandbytes() -> Any:
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about an optional package at import
    try:
        import bitsandbytes
        import bitsandbytes.functional
    except Exception as error:  # a broken installation fails with any class of error
        raise _unusable(error) from error
    finally:
        log.setLevel(level)
    return bitsandbytes


def _unusable(error: Exception) -> OptionError:
    return OptionError("compression='4bit' needs the package bitsandbytes, which is missing or does not work here "
                       f"({type(error).__name__}: {error}); run: pip install bitsandbytes, then restart")  # fmt: skip


@functools.cache
def _code(kind: str, device: torch.device) -> torch.Tensor:
    return _bitsandbytes().functional.get_4bit_type(kind, device=device)


def is_fused_4bit(x: torch.Tensor, out_features: int, block: int) -> bool:
    """Whether bitsandbytes would use its 4-bit kernel here; where it would dequantise, we do, into the scratch."""
    columns = x.shape[-1]
    tokens = x.numel() // columns
    if columns % block or tokens == 0 or not has_4bit_kernels(x.device):
        return False
    if tokens == 1:
        return True
    from bitsandbytes.backends.cuda import ops

    # Since 0.50 the kernel takes more tokens; how many depends on the GPU.
    choose, most = getattr(ops, "_gemm_4bit_use_custom_fn", None), getattr(ops, "_gemm_4bit_custom_max_m", 1)
    return choose is not None and tokens <= most and choose(x.device.index, x.dtype, tokens, out_features, columns)
