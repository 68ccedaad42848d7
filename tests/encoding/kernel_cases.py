"""Matrices for the kernels that unpack, and the two ways in which they are unpacked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from airllm_nb.encoding.awq import AWQ
from airllm_nb.encoding.base import Encoding
from airllm_nb.encoding.fp8 import FP8
from airllm_nb.encoding.gptq import GPTQ
from airllm_nb.encoding.kernels import launch as kernels
from airllm_nb.encoding.mxfp4 import MXFP4

Parts = dict[str, torch.Tensor]
ROWS, COLUMNS, GROUP = 64, 160, 32
BITS = itertools.product((2, 3, 4, 8), (0, 1), (None, True))
WORDS: list[Encoding] = [GPTQ(bits, GROUP, offset, even) for bits, offset, even in BITS]
SCALED = [FP8((128, 128)), FP8((24, 64), True), FP8((1, None)), FP8((None, None)), FP8((None, 1)), FP8((64, 128))]
# Everything but GGUF's types.
PACKINGS = [*WORDS, GPTQ(4, 12, 1), AWQ(GROUP), AWQ(8), MXFP4(), *SCALED]
WITH_PRODUCT = [found for found in PACKINGS if not isinstance(found, MXFP4) and not getattr(found, "even", None)]


def parts_of(found: Encoding, rows: int = ROWS, columns: int = COLUMNS) -> Parts:
    """Of a matrix ``[rows, columns]`` as it lies: random, but for the scales."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=random)

    if isinstance(found, MXFP4):
        scale = torch.randint(110, 136, (rows, columns // 32), dtype=torch.uint8, generator=random)
        return {"weight": noise(rows, columns // 8).view(torch.uint8), "scale": scale}
    if isinstance(found, FP8):
        grid = [-(-size // (of_block or size)) for size, of_block in zip((rows, columns), found.block, strict=True)]
        weight = torch.randn(rows, columns, generator=random).to(
            torch.float8_e5m2 if found.block == (64, 128) else torch.float8_e4m3fn
        )
        scale = torch.randint(110, 136, grid, dtype=torch.uint8, generator=random)
        return {"weight": weight, "scale": scale if found.is_exponent else torch.rand(grid, generator=random)}
    bits, groups = getattr(found, "bits", 4), -(-rows // found.group)
    parts = {
        "weight": noise(rows, columns // 8) if isinstance(found, AWQ) else noise(rows * bits // 32, columns),
        "zeros": noise(groups, columns * bits // 32),
        "scale": torch.rand(groups, columns, generator=random).half(),
    }
    if getattr(found, "even", None):
        parts["group_index"] = torch.randperm(rows, generator=random).int() // GROUP
    return parts


def by_kernel(found: Encoding, parts: Parts, out: torch.Tensor) -> torch.Tensor:
    """``out``, filled by a kernel and nothing else."""
    launched = []

    def launch(key: Any, work: Any) -> bool:
        launched.append(work())
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "usable", lambda device: True)
        patch.setattr(kernels, "_launch", launch)
        found.unpack(parts, out)
    assert launched == [None]
    return out


def by_product(found: Encoding, parts: Parts, x: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` by a kernel on the packed bytes, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "usable", lambda device: True)
        patch.setattr(kernels, "_launch", lambda key, work: work() is None)
        product = found.multiply(x, parts, (rows, x.shape[-1]), bias)
    assert product is not None
    return product


def by_pytorch(found: Encoding, parts: Parts, out: torch.Tensor) -> torch.Tensor:
    """``out``, filled without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "usable", lambda device: False)
        found.unpack(parts, out)
    return out


def empty(rows: int, columns: int, transposed: bool = False, **options: Any) -> torch.Tensor:
    """A matrix that lies row by row, or column by column."""
    out = torch.full((columns, rows) if transposed else (rows, columns), torch.nan, **options)
    return out.t() if transposed else out
