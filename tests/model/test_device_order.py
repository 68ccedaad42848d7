"""What a device's memory is promised for, and the order of its work: without a device, by what is asked of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from airllm_nb.encoding import base
from airllm_nb.encoding.base import Encoded
from airllm_nb.encoding.ggml import encoding_of
from airllm_nb.encoding.linear import EncodedLinear
from airllm_nb.encoding.scratch import Scratch
from airllm_nb.model.placing import drop_unpacked, reserve_scratch, temporary_bytes
from airllm_nb.stream.copier import CudaCopier
from airllm_nb.tensors.index import TensorInfo

CPU, META = torch.device("cpu"), torch.device("meta")
Q8_0 = 8  # ggml's number


def layer(rows: int, columns: int, scratch: Scratch, order: tuple[int, ...] | None = None) -> EncodedLinear:
    """A linear layer of Q8_0 whose values are ones; its rows lie in another order, if one is given."""
    found = encoding_of(Q8_0)
    assert found is not None
    size = (rows, columns // 32 * 34)
    packed = Encoded((rows, columns), (found,), {"weight": TensorInfo("weight", "U8", size, ())}, order=order)
    made = EncodedLinear(packed, False, torch.float32, scratch)
    blocks = torch.ones(rows, columns // 32, 34, dtype=torch.uint8)
    blocks[..., :2] = torch.arange(1, rows + 1).half().view(torch.uint8).view(rows, 1, 2)
    made._parameters["weight"] = nn.Parameter(blocks.view(size), requires_grad=False)
    return made


class Growing(Scratch):
    """Notes how often it had to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def reserve(self, nbytes: int, device: torch.device) -> None:
        before = self.nbytes
        super().reserve(nbytes, device)
        self.sizes += [self.nbytes] if self.nbytes > before else []


def test_the_scratch_is_as_large_as_it_will_be_from_the_beginning() -> None:
    """Or an allocator would keep each size that it has outgrown."""
    scratch = Growing()
    model = nn.Sequential(layer(64, 64, scratch), layer(128, 64, scratch), layer(96, 128, scratch))
    reserve_scratch(model, CPU)
    for each in model:
        each(torch.ones(1, each.in_features))
    assert scratch.sizes == [96 * 128 * 4]


def test_an_order_is_moved_once_and_counted() -> None:
    order = (2, 0, 3, 1)
    ordered, plain = layer(4, 32, Scratch(), order), layer(4, 32, Scratch())
    with torch.inference_mode():
        found = ordered(torch.ones(1, 32))
    assert torch.equal(found, plain(torch.ones(1, 32))[:, list(order)])
    kept = ordered.weight.order
    ordered(torch.ones(2, 32))
    assert ordered.weight.order is kept and not kept.is_inference()
    model = nn.Sequential(ordered, plain)
    beside = temporary_bytes(nn.Sequential(plain), META)
    assert temporary_bytes(model, META) == beside + kept.numel() * kept.element_size()
    drop_unpacked(model)
    assert ordered.weight._order is None


def test_what_is_promised_beside_the_scratch_is_that_of_the_largest_matrix() -> None:
    values = 1 << 12
    assert temporary_bytes(nn.Sequential(nn.Linear(2, 2)), META) == 0
    model = nn.Sequential(layer(32, 64, Scratch()), layer(64, 64, Scratch()))
    assert temporary_bytes(model, META) == values * encoding_of(Q8_0).spare
    assert temporary_bytes(model, CPU) == 4 * min(values, base.HOST_VALUES)


def test_copies_wait_for_what_was_queued_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their targets may have been the memory of tensors that this work reads."""
    waited: list[Any] = []
    now = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(wait_stream=waited.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    copier = CudaCopier(torch.device("cuda"))
    copier.begin()
    assert waited == [now]
