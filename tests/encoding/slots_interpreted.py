"""Run by test_kernels.py in a process of its own: the cache of experts on a device, by Triton's interpreter on a CPU.

There, a device's memory is the host's, and so are the addresses that it copies from.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airllm_nb.stream import device_pool
from airllm_nb.stream.device_pool import BankPart, Counts, DevicePool
from airllm_nb.stream.lru import LRU

CPU = torch.device("cpu")
Bank = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu() -> None:
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # type: ignore[assignment, misc]
    device_pool._PROGRAMS, device_pool._BLOCK = 3, 4


def bank_of(experts: int) -> Bank:
    """Parts of several dtypes; one is less than a block of what is copied at once, one takes many."""
    random_ = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randint(0, 256, (experts, 3, 112), dtype=torch.uint8, generator=random_),
        "scale": torch.rand(experts, 5, generator=random_),
        "bias": torch.rand(experts, 37, generator=random_).half(),
    }


def parts_of(bank: Bank) -> dict[str, BankPart]:
    return {
        name: BankPart(tuple(part.shape[1:]), part.dtype, [expert.data_ptr() for expert in part])
        for name, part in bank.items()
    }


def assert_same(pool: DevicePool, lru: LRU, bank: Bank, ids: list[int]) -> None:
    """One call does the same to both, and what is in the slots is what the tables say."""
    slots, _ = lru.ensure(ids)
    assert pool.ensure_and_gather(torch.tensor(ids)).tolist() == slots
    assert list(pool.cached().items()) == list(lru.cached.items())
    for expert, slot in lru.cached.items():
        assert all(torch.equal(pool.stacks[name][slot], bank[name][expert]) for name in bank)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_it_does_what_the_reference_does(data: st.DataObject, experts: int, slots: int) -> None:
    bank = bank_of(experts)
    pool, lru = DevicePool(parts_of(bank), experts, slots, CPU), LRU(experts, slots)
    most = 12 if slots >= experts else slots
    for ids in data.draw(st.lists(st.lists(st.integers(-2, experts + 2), min_size=1, max_size=most), max_size=6)):
        assert_same(pool, lru, bank, ids)
    counts = pool.counts()
    assert (counts.hits, counts.misses) == (lru.hits, lru.misses)


def test_a_thousand_calls() -> None:
    """The tables of a real layer's size, without drift."""
    rng, experts, slots = random.Random(0), 128, 40
    bank = {"bias": torch.arange(experts, dtype=torch.int64)[:, None]}
    pool, lru, routed = DevicePool(parts_of(bank), experts, slots, CPU), LRU(experts, slots), [0] * experts
    pool._gather = lambda number: None  # type: ignore[method-assign]  # the tables alone
    for _ in range(1000):
        ids = [int(rng.triangular(-1, experts + 1, 3)) for _ in range(rng.choice([1, 8, 8, 8, 32]))]
        for expert in {expert for expert in ids if 0 <= expert < experts}:
            routed[expert] += 1
        assert pool.ensure_and_gather(torch.tensor(ids)).tolist() == lru.ensure(ids)[0]
    assert list(pool.cached().items()) == list(lru.cached.items()) and lru.hits > 1000 < lru.misses
    assert pool.counts() == Counts(lru.hits, lru.misses, routed)


def test_ids_of_several_tokens() -> None:
    bank, ids = bank_of(6), torch.tensor([[[1, 4], [4, 9]], [[2, 1], [-1, 0]]], dtype=torch.int32)
    pool = DevicePool(parts_of(bank), 6, 6, CPU)
    assert pool.ensure_and_gather(ids).tolist() == [[[0, 1], [1, -1]], [[2, 0], [-1, 3]]]
    assert pool.ensure_and_gather(ids.transpose(0, 2)[0]).tolist() == [[0, 2], [1, -1]]
    assert pool.counts() == Counts(3, 4, [1, 2, 2, 0, 2, 0])
    assert pool.ensure_and_gather(ids[:0]).shape == (0, 2, 2)
    pool.reset()
    assert pool.counts() == Counts(0, 0, [0] * 6) and pool.cached() == {}
    assert_same(pool, LRU(6, 6), bank, [5, 3])


def test_layers_share_stacks_and_keep_nothing() -> None:
    """What another layer has put there meanwhile is not taken for this one's."""
    banks = [bank_of(6), {name: part.flip(0).clone() for name, part in bank_of(6).items()}]
    first = DevicePool(parts_of(banks[0]), 6, 3, CPU)
    pools = [DevicePool(parts_of(bank), 6, 3, CPU, first.stacks, keeps=False) for bank in banks]
    for ids in ([4, 1, 4], [1, 5], [0, 4, 2], [4, 9, 0]):
        for pool, bank in zip(pools, banks, strict=True):
            for expert, slot in zip(ids, pool.ensure_and_gather(torch.tensor(ids)).tolist(), strict=True):
                assert (slot < 0) == (expert > 5)
                assert slot < 0 or all(torch.equal(pool.stacks[name][slot], bank[name][expert]) for name in bank)
    assert pools[0].counts() == Counts(0, 9, [2, 2, 1, 0, 3, 1])


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_wherever_bytes_lie(width: int) -> None:
    """An expert's bytes may begin anywhere; what is before and after them is not touched, nor are other slots."""
    nbytes, start = 48 + width, width
    memory = torch.randint(0, 256, (6 * 256,), dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 256 :]
    places = [expert * 256 + start for expert in range(5)]
    part = BankPart((nbytes,), torch.uint8, [memory.data_ptr() + place for place in places])
    assert part.width == width
    pool = DevicePool({"weight": part}, 5, 4, CPU)
    pool.stacks["weight"].zero_()
    pool.ensure_and_gather(torch.tensor([3, 1]))
    for slot, expert in enumerate((3, 1)):
        assert torch.equal(pool.stacks["weight"][slot], memory[places[expert] :][:nbytes])
    assert not pool.stacks["weight"][2:].count_nonzero()


def test_what_is_refused() -> None:
    bank = bank_of(8)
    pool = DevicePool(parts_of(bank), 8, 4, CPU)
    with pytest.raises(ValueError, match="5 experts of 8 at once; 4 slots"):
        pool.ensure_and_gather(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="64 ids at most"):
        DevicePool(parts_of(bank), 8, 8, CPU).ensure_and_gather(torch.zeros(65, dtype=torch.int64))
    with pytest.raises(ValueError, match="addresses of 9 experts"):
        DevicePool(parts_of(bank), 9, 4, CPU)
    with pytest.raises(ValueError, match="another shape"):
        DevicePool(parts_of(bank), 8, 5, CPU, pool.stacks)
