"""Matrices for the kernels that unpack, and the two ways in which they are unpacked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_ggml import Kind, random_rows

from airllm_nb.encoding.affine8 import Affine8
from airllm_nb.encoding.awq import AWQ
from airllm_nb.encoding.base import Encoding
from airllm_nb.encoding.bnb import Int8
from airllm_nb.encoding.fp8 import FP8
from airllm_nb.encoding.ggml import encoding_of
from airllm_nb.encoding.ggml_blocks import Blocks
from airllm_nb.encoding.gptq import GPTQ
from airllm_nb.encoding.kernels import launch as kernels
from airllm_nb.encoding.mxfp4 import MXFP4
from airllm_nb.encoding.nf4 import FP4, NF4

Parts = dict[str, torch.Tensor]
ROWS, COLUMNS, GROUP = 64, 160, 32
BITS = itertools.product((2, 3, 4, 8), (0, 1), (None, True))
WORDS: list[Encoding] = [GPTQ(bits, GROUP, offset, even) for bits, offset, even in BITS]
SCALED = [FP8((128, 128)), FP8((24, 64), True), FP8((1, None)), FP8((None, None)), FP8((None, 1)), FP8((64, 128))]
# Everything but GGUF's types.
PACKINGS = [*WORDS, GPTQ(4, 12, 1), AWQ(GROUP), AWQ(8), MXFP4(), *SCALED]
WITH_PRODUCT = [found for found in PACKINGS if not isinstance(found, MXFP4) and not getattr(found, "even", None)]
# What is multiplied out of slots, and its shape in the tests: more rows and columns than a program takes at once, and
# not a multiple of it.
OF_SLOTS: list[tuple[Encoding, int, int]] = [
    (NF4(), 9, 576), (NF4(), 3, 2112), (NF4(64, 256, 0.125), 6, 192), (FP4(32), 5, 512), (Affine8(), 9, 416),
    (Affine8(), 3, 512), (Int8(), 6, 300), (Int8(), 3, 1068),
    *((found, 5, 1280) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q4_0") if (found := encoding_of(Kind[kind]))),
    (MXFP4(), 3, 1056), (MXFP4(transposed=False), 1, 32),
    (FP8((2, 128)), 6, 528), (FP8((64, 128)), 5, 528), (FP8((1, None), True), 6, 48), (FP8((2, 24)), 6, 72),
    (GPTQ(4, 128, 1), 136, 320), (GPTQ(8, 32, 0), 136, 160), (GPTQ(2, 16, 1), 144, 80), (GPTQ(4, 8, 0), 8, 72),
    (GPTQ(4, 96, 1), 24, 160), (GPTQ(3, 32, 1), 160, 32), (GPTQ(4, 12, 1), 40, 24), (AWQ(8), 264, 40), (AWQ(4), 40, 24),
]  # fmt: skip


def parts_of(found: Encoding, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Parts:
    """Of a matrix ``[rows, columns]`` as it lies: random, but for the scales."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=random)

    if isinstance(found, Blocks):
        return {"weight": random_rows(Kind[found.name], rows, columns, seed)}
    if isinstance(found, NF4):
        return nf4_parts(found, rows, columns, random)
    if isinstance(found, Affine8):
        return found.encode(torch.randn(rows, columns, generator=random))
    if isinstance(found, Int8):
        weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=random)
        return {"weight": weight, "scale": torch.rand(rows, generator=random)}
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


def nf4_parts(found: NF4, rows: int, columns: int, random: torch.Generator) -> Parts:
    weight = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=random)
    absmax = torch.rand(rows, columns // found.block, generator=random)
    if not found.nested:
        return {"weight": weight, "absmax": absmax}
    return {
        "weight": weight, "absmax": (absmax * 255).to(torch.uint8),
        "nested_absmax": torch.rand(-(-absmax.numel() // found.nested), generator=random),
        "nested_quant_map": torch.rand(256, generator=random),
    }  # fmt: skip


def stacked(found: Encoding, matrices: int, rows: int, columns: int) -> Parts:
    """Parts of so many matrices ``[rows, columns]``, none like the other."""
    each = [parts_of(found, *as_it_lies(found, rows, columns), seed) for seed in range(matrices)]
    return {name: torch.stack([parts[name] for parts in each]) for name in each[0]}


def in_float64(found: Encoding, parts: Parts, rows: int, columns: int) -> torch.Tensor:
    """``[matrices, rows, columns]``, unpacked in float32 without kernels."""
    shape, number, device = as_it_lies(found, rows, columns), len(parts["weight"]), parts["weight"].device
    each = [
        by_pytorch(found, {name: part[i] for name, part in parts.items()}, empty(*shape, device=device))
        for i in range(number)
    ]
    return torch.stack([matrix if shape == (rows, columns) else matrix.t() for matrix in each]).double()


def as_it_lies(found: Encoding, rows: int, columns: int) -> tuple[int, int]:
    """What a matrix ``[rows, columns]`` of a product unpacks to."""
    return (columns, rows) if found.kernel in kernels.BY_COLUMNS else (rows, columns)


def by_slots(found: Encoding, x: torch.Tensor, parts: Parts, slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out``, filled by a kernel and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "usable", lambda device: True)
        patch.setattr(kernels, "_launch", lambda key, work: work() is not False)
        assert kernels.multiply_slots(found, x, parts, slots, out)
    return out


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
        patch.setattr(kernels, "_launch", lambda key, work: work() is not False)
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
