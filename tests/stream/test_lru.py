"""Which experts are in slots: against a reference of its own making, whatever is asked for."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airllm_nb.stream.lru import LRU

EXPERTS = 12
calls = st.lists(st.lists(st.integers(-2, EXPERTS + 2), max_size=8), max_size=40)


class Reference:
    """Hits of a cache that knows nothing of slots: experts are used one after the other."""

    def __init__(self, room: int):
        self.room, self.order = room, OrderedDict[int, None]()

    def missing(self, wanted: list[int]) -> set[int]:
        missing = set(wanted) - set(self.order)
        for expert in [*wanted, *wanted]:  # again, as one that came in later must not have put it out
            self.order[expert] = None
            self.order.move_to_end(expert)
        while len(self.order) > self.room:
            self.order.popitem(last=False)
        return missing


@given(calls, st.integers(1, EXPERTS + 3))
def test_it_is_a_cache_of_what_was_used_last(asked: list[list[int]], room: int) -> None:
    """Never two experts in a slot, never one evicted that the call uses, and the hits of any other such cache."""
    lru, reference, content = LRU(EXPERTS, room), Reference(room), dict[int, int]()
    hits = misses = 0
    for ids in asked:
        wanted = list(dict.fromkeys(expert for expert in ids if 0 <= expert < EXPERTS))
        if len(wanted) > room:
            before = lru.cached
            with pytest.raises(ValueError, match=f"{len(wanted)} experts do not fit into {room} slots"):
                lru.ensure(ids)
            assert lru.cached == before
            continue
        slots, missing = lru.ensure(iter(ids))
        content |= {slot: expert for expert, slot in missing.items()}  # what is brought
        assert [content[slot] if slot >= 0 else None for slot in slots] == [
            expert if 0 <= expert < EXPERTS else None for expert in ids
        ]
        assert all(0 <= slot < room for slot in missing.values())
        assert set(missing) == reference.missing(wanted) and list(missing) == [e for e in wanted if e in missing]
        assert list(lru.cached) == list(reference.order)
        assert {slot: expert for expert, slot in lru.cached.items()} == content
        hits, misses = hits + len(wanted) - len(missing), misses + len(missing)
    assert (lru.hits, lru.misses) == (hits, misses)


def test_slots_fill_from_the_first_on_and_the_oldest_leaves() -> None:
    lru = LRU(EXPERTS, 3)
    assert lru.ensure([7, 5, 7]) == ([0, 1, 0], {7: 0, 5: 1})
    assert lru.ensure([EXPERTS, 7]) == ([-1, 0], {})
    assert lru.ensure([1, 2]) == ([2, 1], {1: 2, 2: 1})  # 5 was used longest ago
    lru.reset()
    assert (lru.hits, lru.misses, lru.cached) == (0, 0, {})
    assert lru.ensure([2]) == ([0], {2: 0})
