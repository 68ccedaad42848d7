"""On a GPU: products out of slots, and the cache of experts in a graph. Without one: slots_interpreted.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import OF_SLOTS, by_product, by_slots, in_float64, parts_of, stacked

from airllm_nb.encoding.base import Encoding
from airllm_nb.encoding.kernels import launch
from airllm_nb.encoding.mxfp4 import MXFP4
from airllm_nb.encoding.nf4 import NF4
from airllm_nb.stream.device_pool import BankPart, DevicePool
from airllm_nb.stream.lru import LRU

pytestmark = pytest.mark.gpu
DTYPES = torch.float32, torch.float16, torch.bfloat16
EXPERTS, SLOTS, ROUTED, ROWS, COLUMNS = 64, 24, 8, 96, 256
Parts = dict[str, torch.Tensor]


@pytest.mark.parametrize(("found", "rows", "columns"), OF_SLOTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(found: Encoding, rows: int, columns: int, dtype: torch.dtype) -> None:
    """As exact as the dtype, the same bits each time, and those of a slice are those of the whole."""
    parts = {name: part.cuda() for name, part in stacked(found, 4, rows, columns).items()}
    slots, weight = torch.tensor([2, 0, -1, 2, 3], device="cuda"), in_float64(found, parts, rows, columns)
    x = torch.randn(5, columns, device="cuda").to(dtype)
    wanted = torch.einsum("nrc,nc->nr", weight[slots], x.double())
    wanted[2] = 0
    out = by_slots(found, x, parts, slots, torch.full((5, 2, rows), torch.nan, dtype=dtype, device="cuda")[:, 1])
    near = 2 * torch.finfo(dtype).eps + 1e-6
    assert ((out - wanted).abs().max() / wanted.abs().max()).item() <= near
    again = by_slots(found, x, parts, slots.int(), torch.empty(5, rows, dtype=dtype, device="cuda"))
    assert torch.equal(out, again)
    one = {name: part[3] for name, part in parts.items()}
    if found == MXFP4():  # its product is that of an expert, with what lies there
        return
    for bias in (None, torch.randn(rows, device="cuda").to(dtype)):
        product = by_product(found, one, x[4:], rows, bias).double()
        exact = wanted[4:] if bias is None else wanted[4:] + bias.double()
        assert ((product - exact).abs().max() / exact.abs().max()).item() <= near


@pytest.mark.parametrize(("found", "rows", "columns"), OF_SLOTS, ids=str)
def test_a_slice_gives_the_bits_of_the_whole(found: Encoding, rows: int, columns: int) -> None:
    """A matrix that is streamed may be cut into slices; a resident one is not."""
    if (steps := found.row_steps(columns)) is None:
        return
    parts, x = {name: part.cuda() for name, part in parts_of(found, rows, columns).items()}, torch.randn(1, columns)
    whole = by_product(found, parts, x.cuda(), rows, None)
    for first, last in ((0, 4), (4, rows), (0, 1)):
        piece = {name: part[first // steps[name] : -(-last // steps[name])].clone() for name, part in parts.items()}
        assert torch.equal(by_product(found, piece, x.cuda(), last - first, None), whole[:, first:last])


@pytest.fixture(scope="module")
def registered() -> Iterator[Parts]:
    """Experts in memory that the device reads: nf4, one after the other."""
    parts = stacked(NF4(), EXPERTS, ROWS, COLUMNS)
    runtime = torch.cuda.cudart()
    for part in parts.values():
        assert int(runtime.cudaHostRegister(part.data_ptr(), part.nbytes, 0)) == 0
    yield parts
    torch.cuda.synchronize()
    for part in parts.values():
        runtime.cudaHostUnregister(part.data_ptr())


def test_a_graph_holds_all_of_it(registered: Parts) -> None:
    """A thousand replays with other experts: tables as the reference has them, products as of what is resident."""
    parts = {
        name: BankPart(tuple(part.shape[1:]), part.dtype, [expert.data_ptr() for expert in part])
        for name, part in registered.items()
    }
    pool, lru, rng = DevicePool(parts, EXPERTS, SLOTS, torch.device("cuda")), LRU(EXPERTS, SLOTS), random.Random(0)
    resident = {name: part.cuda() for name, part in registered.items()}
    ids, x = torch.zeros(ROUTED, dtype=torch.int64, device="cuda"), torch.randn(1, COLUMNS, device="cuda")
    out, wanted = torch.empty(ROUTED, ROWS, device="cuda"), torch.empty(ROUTED, ROWS, device="cuda")

    def step() -> torch.Tensor:
        slots = pool.ensure_and_gather(ids)
        assert launch.multiply_slots(NF4(), x, pool.stacks, slots, out)
        return slots

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = step()
    pool.reset()
    for number in range(1000):
        asked = [rng.randrange(-1, EXPERTS + 2) for _ in range(ROUTED)]
        ids.copy_(torch.tensor(asked))
        graph.replay()
        assert slots.tolist() == lru.ensure(asked)[0]
        if number % 50 == 0:
            there = torch.tensor([expert if expert < EXPERTS else -1 for expert in asked], device="cuda")
            assert launch.multiply_slots(NF4(), x, resident, there, wanted) and torch.equal(out, wanted)
            assert list(pool.cached().items()) == list(lru.cached.items())
            for expert, slot in lru.cached.items():
                assert all(torch.equal(pool.stacks[name][slot], part[expert]) for name, part in resident.items())
    counts = pool.counts()
    assert (counts.hits, counts.misses) == (lru.hits, lru.misses)
