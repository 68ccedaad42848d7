"""bitsandbytes' 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): our ``"4bit"``, and its own checkpoints' weights.

Two values a byte, the first in the high half, over the flattened matrix; blocks of 64 values share an absmax, which in
a checkpoint may itself be quantised in blocks of 256. We write nf4 with absmax in float32. This is the only file that
imports bitsandbytes: its kernels encode, and on a GPU unpack and multiply; PyTorch unpacks the same values without it.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OptionError
from .base import Encoding, Part, Parts, affine, grid, row_chunks

# The code of fp4 is a number of one sign, two exponent and one fraction bit, by 12.
CODES = {
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip


@dataclass(frozen=True)
class NF4(Encoding):
    """Blocks of ``block`` values over the flattened matrix.

    Attributes
    ----------
    nested, offset
        Of the quantised absmax: how many share a ``nested_absmax`` (0: it is float32), and their mean.
    """

    name = "nf4"
    compression = "4bit"
    spare = 5.5
    kernel = "nf4"
    block: int = 64
    nested: int = 0
    offset: float = 0.0

    def row_steps(self, columns: int) -> dict[str, int] | None:
        is_whole = columns % self.block == 0 and not self.nested and not self.transposed
        return {"weight": 1, "absmax": 1} if is_whole else None

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        packed, absmax = parts["weight"].reshape(-1), self._absmax(parts)
        if out.is_contiguous() and has_kernels(out.device):
            operator = torch.ops.bitsandbytes.dequantize_4bit
            operator.out(packed.view(-1, 1), absmax, self.block, self.name, list(out.shape), out.dtype, out=out)
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
        if columns % block == 0 and out.device.type != "cpu":
            blocks = (columns // block, block)
            affine(values.view(-1, *blocks), absmax.view(-1, blocks[0], 1), None, out.unflatten(1, blocks))
            return
        whole = rows * columns // block
        values[: whole * block].view(-1, block).mul_(absmax[:whole, None])
        values[whole * block :].mul_(absmax[-1])
        out.copy_(values.view(-1, columns))

    def temporary_bytes(self, values: int, device: torch.device) -> int:
        if self.transposed or not has_kernels(device):  # rows of the scratch may lie apart, which PyTorch fills
            return super().temporary_bytes(values, device)
        return self.whole_bytes(values) if self.nested else 0

    def whole_bytes(self, values: int) -> int:
        blocks = -(-values // self.block)
        return 12 * blocks if self.nested else 4 * blocks  # absmax in float32; nested ones are looked up and repeated

    def multiply(
        self, x: torch.Tensor, parts: Parts, shape: tuple[int, int], bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """By a kernel of ours for one vector, by bitsandbytes' for a few; ``None`` where it would dequantise."""
        if (product := super().multiply(x, parts, shape, bias)) is not None:
            return product
        if self.transposed or not _is_fused(x, shape[0], self.block):  # asked first: absmax may not be needed
            return None
        bnb = _bitsandbytes()
        state = bnb.functional.QuantState(
            absmax=self._absmax(parts), shape=torch.Size(shape), code=_code(self.name, x.device), blocksize=self.block,
            quant_type=self.name, dtype=x.dtype,
        )  # fmt: skip
        made: torch.Tensor = bnb.matmul_4bit(x, parts["weight"].view(-1, 1).t(), quant_state=state, bias=bias)
        return made

    def code(self, device: torch.device) -> torch.Tensor:
        """The values that 4 bits stand for, in float32."""
        return _values(self.name, device)

    def _absmax(self, parts: Parts) -> torch.Tensor:
        """The absmax of every block in float32."""
        absmax = parts["absmax"].reshape(-1)
        if not self.nested:
            return absmax.float()
        values = parts["nested_quant_map"].float().index_select(0, absmax.to(torch.int32))
        nested = parts["nested_absmax"].float()[:, None].expand(-1, self.nested).reshape(-1)
        return values.mul_(nested[: values.numel()]).add_(self.offset)

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return Part("weight", "U8", grid(shape, 2)), Part("absmax", "F32", grid(shape, self.block))

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        quantise, shape = _bitsandbytes().functional.quantize_4bit, tuple(weight.shape)
        packed, state = quantise(weight.contiguous(), blocksize=self.block, quant_type=self.name)
        return {"weight": packed.view(grid(shape, 2)), "absmax": state.absmax.view(grid(shape, self.block))}

    def encodable_rows(self, shape: tuple[int, ...]) -> int:
        return self.block // math.gcd(self.block, math.prod(shape[1:]))

    def require(self, device: torch.device | str = "cpu") -> None:
        _bitsandbytes()
        try:
            self.encode(torch.zeros(1, self.block, device=device))
        except Exception as error:  # a library for another CUDA fails at its first call, with any class of error
            raise _unusable(error) from error


class FP4(NF4):
    name = "fp4"
    compression = ""


@functools.cache
def _values(kind: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(CODES[kind], dtype=torch.float32, device=device)


@functools.cache
def _pairs(kind: str, device: torch.device) -> torch.Tensor:
    """Byte → its two values in float32, as one integer of 64 bits, so that one look-up takes both."""
    code = torch.tensor(CODES[kind], dtype=torch.float32)
    pairs = torch.stack([code[:, None].expand(16, 16), code[None].expand(16, 16)], -1)
    return pairs.view(torch.int64).view(-1).to(device)


# ---- the library -----------------------------------------------------------------------------------------------------


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
def has_kernels(device: torch.device) -> bool:
    """Whether bitsandbytes' kernels unpack and multiply on ``device``; tried once."""
    if device.type != "cuda":
        return False
    try:
        NF4().require(device)
    except OptionError:
        return False
    return True


@functools.cache
def _code(kind: str, device: torch.device) -> torch.Tensor:
    return _bitsandbytes().functional.get_4bit_type(kind, device=device)


def _is_fused(x: torch.Tensor, out_features: int, block: int) -> bool:
    """Whether bitsandbytes would use its 4-bit kernel here; where it would dequantise, we do, into the scratch."""
    columns = x.shape[-1]
    tokens = x.numel() // columns
    if columns % block or tokens == 0 or not has_kernels(x.device):
        return False
    if tokens == 1:
        return True
    from bitsandbytes.backends.cuda import ops

    # Since 0.50 the kernel takes more tokens; how many depends on the GPU.
    choose, most = getattr(ops, "_gemm_4bit_use_custom_fn", None), getattr(ops, "_gemm_4bit_custom_max_m", 1)
    return choose is not None and tokens <= most and choose(x.device.index, x.dtype, tokens, out_features, columns)
