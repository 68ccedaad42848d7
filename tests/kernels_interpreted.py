"""Run by test_kernels.py in a process of its own: what the kernels compute, by Triton's interpreter on a CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from kernel_cases import COLUMNS, PACKINGS, ROWS, by_kernel, by_pytorch, empty, parts_of
from test_ggml import Kind, every_type, random_rows, reference

from airllm_nb.checkpoint.codecs.ggml import packing_of
from airllm_nb.checkpoint.codecs.packing import Packing


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())


@every_type
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks(kind: Kind, start: int, transposed: bool) -> None:
    """Wherever they begin, and however many columns there are."""
    weight = random_rows(kind, rows=3, columns=1280)
    moved = torch.zeros(weight.numel() + start, dtype=torch.uint8)[start:].view_as(weight).copy_(weight)
    found = packing_of(int(kind))
    assert found is not None
    out = by_kernel(found, {"weight": moved}, empty(3, 1280, transposed))
    assert torch.allclose(out, reference(kind, weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("found", PACKINGS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_words(found: Packing, transposed: bool) -> None:
    parts = parts_of(found)
    wanted = by_pytorch(found, parts, empty(ROWS, COLUMNS))
    assert torch.equal(by_kernel(found, parts, empty(ROWS, COLUMNS, transposed)), wanted)
