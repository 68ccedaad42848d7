"""A cache that is lent is what it was, whatever is done with it, and however often."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from airllm_nb.decode import fixed

CAPACITY, BATCH = 32, 2
CONFIG = LlamaConfig(num_hidden_layers=3, hidden_size=8, num_attention_heads=2)
CONFIG.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
CONFIG.sliding_window = 5


def rows(number: int, tokens: int, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.arange(batch * 2 * tokens * 4, dtype=torch.float32).view(batch, 2, tokens, 4)
    return values + 1000 * number, -values - 1000 * number


def add(cache: Any, number: int, tokens: int) -> None:
    for layer in range(3):
        cache.update(*rows(number + layer, tokens, batch_of(cache)), layer)


def batch_of(cache: Any) -> int:
    return cache.layers[0].keys.shape[0] if cache.layers[0].is_initialized else BATCH


def filled(tokens: int) -> DynamicCache:
    cache = DynamicCache(config=CONFIG)
    add(cache, 0, tokens)
    return cache


def step(cache: Any, lent: fixed.FixedCache, number: int) -> None:
    """What a replay does: a row in all layers, and one token more."""
    loan = lent.loan
    assert loan is not None
    lent.counter.fill_(loan.length)
    for layer in range(3):
        lent.layers[layer].update(*rows(number + layer, 1, lent.layers[layer].keys.shape[0]))
    loan.length += 1


def assert_same(one: Any, other: Any) -> None:
    assert one.get_seq_length() == other.get_seq_length()
    for mine, its in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, its.keys) and torch.equal(mine.values, its.values)
        assert type(mine) is type(its) and type(mine) in (DynamicLayer, DynamicSlidingWindowLayer)
        assert mine.get_seq_length() == its.get_seq_length() and mine.get_mask_sizes(1) == its.get_mask_sizes(1)


TODO = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 6)), st.tuples(st.just("add"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["reorder", "select", "copy", "pickle", "crop", "length"]), st.just(1)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(TODO, max_size=8))
def test_it_is_what_an_ordinary_one_is(tokens: int, todo: list[tuple[str, int]]) -> None:
    ordinary, cache, number = filled(tokens), filled(tokens), 0
    lent = fixed.FixedCache(cache, CAPACITY)
    for what, count in todo:
        number += 10
        if what == "step":
            for each in range(count):
                add(ordinary, number + 100 * each, 1)
                serves = (loan := lent.loan) is not None and loan.holds(cache)
                if not serves and fixed.fits(cache, lent):
                    lent.borrow(cache)
                    serves = True
                if serves and cache.get_seq_length() < CAPACITY:
                    step(cache, lent, number + 100 * each)
                else:
                    add(cache, number + 100 * each, 1)
        for one in (ordinary, cache):
            if what == "add":
                add(one, number, count)
            elif what == "reorder":
                one.reorder_cache(torch.arange(batch_of(one)).flip(0))
            elif what == "select":
                one.batch_select_indices(torch.tensor([0]))
            elif what == "crop" and 1 < one.get_seq_length() < CONFIG.sliding_window:
                one.crop(-1)
            elif what == "length":
                assert one.get_mask_sizes(1, 1) == ordinary.get_mask_sizes(1, 1)
        if what == "copy":
            assert_same(copy.deepcopy(cache), ordinary)
        elif what == "pickle":
            assert_same(pickle.loads(pickle.dumps(cache)), ordinary)
    lent.close()
    assert_same(cache, ordinary)


def test_what_is_dropped_is_not_held() -> None:
    cache = filled(3)
    lent, gone = fixed.FixedCache(cache, CAPACITY), weakref.ref(cache)
    assert lent.loan is not None
    del cache
    gc.collect()
    assert gone() is None and lent.loan is None
    other = filled(4)
    lent.borrow(other)
    lent.close()
    assert_same(other, filled(4))


def test_a_fixed_cache_has_one_borrower(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = filled(3), filled(6)
    lent = fixed.FixedCache(first, CAPACITY)
    lent.borrow(second)
    assert_same(first, filled(3))
    assert lent.loan is not None and lent.loan.holds(second) and not lent.loan.holds(first)


def test_what_cannot_be_lent() -> None:
    class Other(DynamicCache):
        pass

    assert not fixed.fits(Other(config=CONFIG)) and not fixed.fits(DynamicCache()) and not fixed.fits(None)
    recording = filled(7)
    recording.activate_past_recording()
    assert not fixed.fits(recording)
    uneven = filled(3)
    uneven.layers[0].crop(-1)
    assert not fixed.fits(uneven)
    lent = fixed.FixedCache(filled(3), CAPACITY)
    assert fixed.fits(filled(4), lent) and not fixed.fits(filled(CAPACITY), lent)
    half = filled(3)
    half.batch_select_indices(torch.tensor([0]))
    assert fixed.fits(half) and not fixed.fits(half, lent)


def test_when_memory_runs_out_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, left = filled(7), [2]
    lent, clone = fixed.FixedCache(cache, CAPACITY), torch.Tensor.clone

    def scarce(self: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("none left")
        return clone(self)

    monkeypatch.setattr(torch.Tensor, "clone", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        lent.close()
    monkeypatch.undo()
    assert_same(cache, filled(7))


def test_the_edge_is_what_windows_forget() -> None:
    cache = filled(7)
    edge = fixed.edge(cache)
    add(cache, 50, 1)
    lent = fixed.FixedCache(cache, CAPACITY)
    lent.put_rows(edge)
    for number in (1, 2):
        assert torch.equal(lent.layers[number].keys[:, :, 3:7], rows(number, 7)[0][:, :, 3:])
