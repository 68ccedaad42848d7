"""Unpacking takes the device memory that it promises: simulated on ``meta``, where tensors have sizes and no bytes."""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from airllm_nb.encoding import base
from airllm_nb.encoding.base import Encoding
from airllm_nb.encoding.bnb import NF4, Int8
from airllm_nb.encoding.ggml import encoding_of, packed_row_bytes
from airllm_nb.encoding.gptq import GPTQ
from airllm_nb.encoding.mxfp4 import MXFP4

META = torch.device("meta")
MIB = 1 << 20
# Of which a chunk is a small part.
ROWS, COLUMNS = 28672, 8192
Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def gptq(bits: int, group: int = 128, ordered: bool = False) -> Parts:
    groups = COLUMNS // group
    order: Parts = {"group_index": (torch.int32, (COLUMNS,))} if ordered else {}
    return {
        "weight": (torch.int32, (COLUMNS * bits // 32, ROWS)),
        "zeros": (torch.int32, (groups, ROWS * bits // 32)),
        "scale": (torch.float16, (groups, ROWS)),
        **order,
    }


NESTED: Parts = {
    "absmax": (torch.uint8, (ROWS, COLUMNS // 64)),
    "nested_absmax": (torch.float32, (ROWS * COLUMNS // 64 // 256,)),
    "nested_quant_map": (torch.float32, (256,)),
}
HALF: Parts = {"weight": (torch.uint8, (ROWS, COLUMNS // 2))}
CASES: dict[str, tuple[Encoding, Parts]] = {
    **{f"gptq-{bits}": (GPTQ(bits, 128, 1), gptq(bits)) for bits in (2, 3, 4, 8)},
    "gptq-small-groups": (GPTQ(4, 32, 0), gptq(4, 32)),
    "gptq-ordered": (GPTQ(4, 128, 1, True), gptq(4, ordered=True)),
    "gptq-3-ordered": (GPTQ(3, 128, 1, True), gptq(3, ordered=True)),
    "gptq-uneven": (GPTQ(4, 128, 1, False), gptq(4, ordered=True)),
    "mxfp4": (MXFP4(), {**HALF, "scale": (torch.uint8, (ROWS, COLUMNS // 32))}),
    "nf4": (NF4(), {**HALF, "absmax": (torch.float32, (ROWS, COLUMNS // 64))}),
    "nf4-nested": (NF4(64, 256, 0.1), HALF | NESTED),
    "int8": (Int8(), {"weight": (torch.int8, (ROWS, COLUMNS)), "scale": (torch.float32, (ROWS,))}),
    **{
        kind.name: (found, {"weight": (torch.uint8, (ROWS, packed_row_bytes(kind.value, COLUMNS)))})
        for kind in gguf.GGMLQuantizationType
        if (found := encoding_of(kind.value)) is not None
    },
}


class Live(TorchDispatchMode):
    """The most bytes that tensors made since had together, ``peak``; ``given`` are tensors that were there."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.peak, self._known = 0, {tensor.untyped_storage()._cdata for tensor in given}
        self._made: list[tuple[StorageWeakRef, int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        gone = {key for storage, key, _ in self._made if storage.expired()}
        self._known -= gone
        self._made = [entry for entry in self._made if entry[1] not in gone]
        result = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if torch.is_tensor(leaf)):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._made.append((StorageWeakRef(storage), storage._cdata, storage.nbytes()))
        self.peak = max(self.peak, sum(nbytes for _, _, nbytes in self._made))
        return result


def taken(found: Encoding, parts: Parts, dtype: torch.dtype) -> int:
    """Bytes beside the matrix; the tables of a format, some kilobytes, are there before."""
    given: Mapping[str, torch.Tensor] = {
        name: torch.empty(shape, dtype=kind, device=META) for name, (kind, shape) in parts.items()
    }
    shape = (COLUMNS, ROWS) if found.transposed else (ROWS, COLUMNS)
    out = torch.empty(shape, dtype=dtype, device=META)
    with torch.inference_mode():
        found.unpack(given, out)
        with Live(out, *given.values()) as live:
            found.unpack(given, out)
    return live.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_no_more_is_taken_than_promised(name: str, dtype: torch.dtype) -> None:
    found, parts = CASES[name]
    promised = found.temporary_bytes(ROWS * COLUMNS, META)
    assert base.DEVICE_BYTES <= promised < base.DEVICE_BYTES + ROWS * COLUMNS / 2
    assert taken(found, parts, dtype) <= promised


@pytest.mark.parametrize("name", ["gptq-4", "gptq-ordered", "mxfp4", "nf4", "Q4_0", "Q4_K", "Q6_K"])
def test_most_of_it_is_used(name: str) -> None:
    """Chunks are as large as it allows: each costs its launches."""
    found, parts = CASES[name]
    assert taken(found, parts, torch.bfloat16) >= 0.45 * base.DEVICE_BYTES


def test_a_small_matrix_takes_what_its_values_do() -> None:
    assert NF4(64).temporary_bytes(1 << 20, META) < 6 * MIB
    assert NF4(64).temporary_bytes(1 << 40, torch.device("cpu")) == 4 * base.HOST_VALUES
