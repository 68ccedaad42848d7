"""Our ``"8bit"``: blocks of 32 values over the flattened matrix, each a byte between the least and the greatest of it.

``value = minimum + byte · spread / 255``. The spread, not the step, is stored: a step in float16 would be subnormal for
weights below 0.01.
"""

from __future__ import annotations

import math

import torch

from .base import HOST_VALUES, Encoding, Part, Parts, grid


class Affine8(Encoding):
    """Three parts: the bytes, and for each block its spread and minimum in float16. It unpacks into whole rows only."""

    name = "affine8"
    compression = "8bit"
    spare = 0.0
    kernel = "affine8"
    block = 32

    def row_steps(self, columns: int) -> dict[str, int] | None:
        return {"weight": 1, "spread": 1, "minimum": 1} if columns % self.block == 0 else None

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        encoded, values = parts["weight"].reshape(-1), out.view(-1)
        spread, minimum = parts["spread"].reshape(-1, 1), parts["minimum"].reshape(-1, 1)
        whole = encoded.numel() // self.block * self.block
        fill = _fill_on_host if out.device.type == "cpu" else _fill_on_device
        fill(encoded[:whole].view(-1, self.block), spread, minimum, values[:whole].view(-1, self.block))
        if whole < encoded.numel():
            fill(encoded[whole:].view(1, -1), spread[-1:], minimum[-1:], values[whole:].view(1, -1))

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        blocks = grid(shape, self.block)
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
        shape = grid(tuple(weight.shape), self.block)
        return {"weight": encoded.view(weight.shape), "spread": spread.view(shape), "minimum": minimum.view(shape)}

    def encodable_rows(self, shape: tuple[int, ...]) -> int:
        return self.block // math.gcd(self.block, math.prod(shape[1:]))


def _fill_on_device(encoded: torch.Tensor, spread: torch.Tensor, minimum: torch.Tensor, out: torch.Tensor) -> None:
    """One kernel; it computes in float32 inside."""
    if out.dtype == torch.float32:
        spread, minimum = spread.float(), minimum.float()
    rows = out.shape[0]
    torch.addcmul(minimum[:rows], encoded, spread[:rows], value=1 / 255, out=out)


def _fill_on_host(encoded: torch.Tensor, spread: torch.Tensor, minimum: torch.Tensor, out: torch.Tensor) -> None:
    """As many values at a time as stay in the processor's cache in float32."""
    step = max(HOST_VALUES // out.shape[1], 1)
    for first in range(0, out.shape[0], step):
        rows = slice(first, min(first + step, out.shape[0]))
        values = encoded[rows].float().mul_(spread[rows].float() / 255).add_(minimum[rows].float())
        out[rows].copy_(values)
