"""Run by test_kernels.py in a process of its own: what the kernels compute, by Triton's interpreter on a CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from kernel_cases import (
    COLUMNS,
    OF_SLOTS,
    PACKINGS,
    ROWS,
    WITH_PRODUCT,
    Parts,
    by_kernel,
    by_product,
    by_pytorch,
    by_slots,
    empty,
    in_float64,
    parts_of,
    stacked,
)
from test_ggml import Kind, every_type, random_rows, reference

from airllm_nb.encoding.affine8 import Affine8
from airllm_nb.encoding.awq import AWQ
from airllm_nb.encoding.base import Encoding
from airllm_nb.encoding.bnb import Int8
from airllm_nb.encoding.fp8 import FP8
from airllm_nb.encoding.ggml import encoding_of
from airllm_nb.encoding.gptq import GPTQ
from airllm_nb.encoding.kernels import arguments, launch, products
from airllm_nb.encoding.mxfp4 import MXFP4
from airllm_nb.encoding.nf4 import NF4


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())


@every_type
@pytest.mark.parametrize(("start", "transposed"), [(0, False), (1, True)])
def test_blocks(kind: Kind, start: int, transposed: bool) -> None:
    """Wherever they begin, and however many columns there are."""
    weight = random_rows(kind, rows=3, columns=1280)
    moved = torch.zeros(weight.numel() + start, dtype=torch.uint8)[start:].view_as(weight).copy_(weight)
    found = encoding_of(int(kind))
    assert found is not None
    out = by_kernel(found, {"weight": moved}, empty(3, 1280, transposed))
    assert torch.allclose(out, reference(kind, weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("found", PACKINGS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_words(found: Encoding, transposed: bool) -> None:
    parts = parts_of(found)
    wanted = by_pytorch(found, parts, empty(ROWS, COLUMNS))
    assert torch.equal(by_kernel(found, parts, empty(ROWS, COLUMNS, transposed)), wanted)


# A tile is a part of them, and the last one is not full; shares of a product are of several tiles.
ENDS = [
    (AWQ(8), 40, 168), (GPTQ(4, 32, 1), 40, 136), (GPTQ(3, 128, 1), 416, 160), (FP8((2, 128)), 3, 1312),
    (FP8((1, None)), 3, 160), (MXFP4(), 3, 160),
]  # fmt: skip


@pytest.mark.parametrize(("found", "rows", "columns"), ENDS, ids=str)
def test_ends(found: Encoding, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "TILE", 64)
    monkeypatch.setattr(products, "_PROGRAMS", 6)
    parts = parts_of(found, rows, columns)
    wanted = by_pytorch(found, parts, empty(rows, columns))
    assert torch.equal(by_kernel(found, parts, empty(rows, columns)), wanted)
    if not isinstance(found, MXFP4):
        assert_product(found, parts, wanted.t() if found.transposed else wanted)


@every_type
def test_products_with_blocks(kind: Kind) -> None:
    """Half of the types with a bias: what adds it is the same for all."""
    has_bias = int(kind) % 2 == 0
    weight, found = random_rows(kind, rows=3, columns=1280), encoding_of(int(kind))
    assert found is not None
    x, bias = torch.randn(1, 1, 1280), torch.randn(3) if has_bias else None
    wanted = torch.nn.functional.linear(x, reference(kind, weight), bias)
    for vector in (x, torch.stack([x, x * 2], -1)[..., 0]):  # its values lie apart
        out = by_product(found, {"weight": weight}, vector, 3, bias)
        assert out.shape == (1, 1, 3) and torch.allclose(out, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("found", WITH_PRODUCT, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(found: Encoding, has_bias: bool) -> None:
    parts = parts_of(found)
    weight = by_pytorch(found, parts, empty(ROWS, COLUMNS))
    assert_product(found, parts, weight.t() if found.transposed else weight, has_bias)


def assert_product(found: Encoding, parts: Parts, weight: torch.Tensor, has_bias: bool = False) -> None:
    x, bias = torch.randn(1, weight.shape[1]), torch.randn(weight.shape[0]) if has_bias else None
    wanted = torch.nn.functional.linear(x, weight, bias)
    for vector in (x, torch.stack([x, x * 2], -1)[..., 0]):  # its values lie apart
        out = by_product(found, parts, vector, len(weight), bias)
        assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("found", "rows", "columns"), OF_SLOTS, ids=str)
def test_products_out_of_slots(found: Encoding, rows: int, columns: int) -> None:
    """Each vector with a matrix of its own, a matrix twice, and padding; one vector for all alike."""
    parts, slots = stacked(found, 4, rows, columns), torch.tensor([2, 0, -1, 2, 3])
    weight = in_float64(found, parts, rows, columns)
    for x in (torch.randn(5, columns), torch.randn(1, columns), torch.randn(columns, 5).t()):
        wanted = torch.einsum("nrc,nc->nr", weight[slots], x.double().expand(5, -1))
        wanted[2] = 0
        out = torch.full((5, 2, rows), torch.nan)[:, 1]  # the half of another
        by_slots(found, x, parts, slots.int() if len(x) == 1 else slots, out)
        assert torch.allclose(out.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert not out[2].count_nonzero()


@pytest.mark.parametrize(("found", "rows", "columns"), OF_SLOTS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_one_matrix(found: Encoding, rows: int, columns: int, has_bias: bool) -> None:
    parts = stacked(found, 1, rows, columns)
    weight = in_float64(found, parts, rows, columns)[0].float()
    parts = {name: part[0] for name, part in parts.items()}
    if found == MXFP4():  # its product is that of an expert, with what lies there
        assert launch.multiply(found, torch.ones(1, columns), parts, rows, None) is None
    else:
        assert_product(found, parts, weight, has_bias)


@pytest.mark.parametrize("found", [NF4(), NF4(transposed=True), Affine8(), Int8(transposed=True)], ids=str)
def test_what_they_do_not_serve(found: Encoding) -> None:
    """Blocks that cross rows, matrices that lie the other way round: PyTorch does those, and nothing is said."""
    columns = COLUMNS if found.transposed else COLUMNS + 16
    parts = {
        name: torch.zeros(1, 1, 1, dtype=torch.uint8) for name in ("weight", "absmax", "spread", "minimum", "scale")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "usable", lambda device: True)
        assert not launch.multiply_slots(
            found, torch.ones(1, columns), parts, torch.zeros(1).int(), torch.ones(1, ROWS)
        )
        assert launch.multiply(found, torch.ones(1, columns), parts, ROWS, None) is None
    assert not launch._failed


@pytest.mark.parametrize(("found", "part", "value"), [(FP8((None, None)), "weight", 0xFF), (MXFP4(), "scale", 0xFF)])
def test_what_is_no_number_stays_in_its_row(found: Encoding, part: str, value: int) -> None:
    parts = stacked(found, 1, 3, 64)
    parts[part].view(torch.uint8)[0, 1, 1] = value
    out = by_slots(found, torch.randn(1, 64), parts, torch.zeros(1, dtype=torch.int32), torch.ones(1, 3))
    assert out.isnan().tolist() == [[False, True, False]]


def test_where_bytes_are_not_aligned() -> None:
    """Values are read one at a time there, or by PyTorch."""
    for found in (encoding_of(12), FP8((1, None)), MXFP4(transposed=False)):
        assert found is not None
        parts = parts_of(found, 3, 256)
        moved = torch.zeros(parts["weight"].numel() + 1, dtype=torch.uint8)[1:].view(parts["weight"].shape)
        packed = parts["weight"].view(torch.uint8)
        parts = parts | {"weight": moved.copy_(packed).view(parts["weight"].dtype)}
        if isinstance(found, MXFP4):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launch, "usable", lambda device: True)
                assert launch.multiply(found, torch.ones(1, 256), parts, 3, None) is None
        else:
            assert_product(found, parts, by_pytorch(found, parts, empty(3, 256)))
