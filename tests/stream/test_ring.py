"""The layout of units in a fixed memory, and which visit overwrites which, against a simulation byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airllm_nb.errors import ClosedError
from airllm_nb.stream.host import HostMemory
from airllm_nb.stream.ring import PAGE, Place, align, place
from airllm_nb.stream.schedule import Schedule

EIGHTH = PAGE // 8
SIZES = st.lists(st.integers(1, 32).map(lambda cells: cells * EIGHTH), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("size", "to", "aligned"),
    [(0, PAGE, 0), (1, PAGE, PAGE), (PAGE, PAGE, PAGE), (PAGE + 1, PAGE, 2 * PAGE), (5, 4, 8)],
)
def test_align_rounds_up(size: int, to: int, aligned: int) -> None:
    assert align(size, to) == aligned


def test_units_follow_each_other_and_wrap() -> None:
    places = place([PAGE, 2 * PAGE, PAGE, PAGE], 3 * PAGE)
    assert [where.offset for where in places] == [0, PAGE, 0, PAGE]
    # The third takes the bytes of the first, the fourth those of the second, the next sweep's first those of the third.
    assert Schedule.of(range(4)).distances(places) == (2, 2, 2, 2)


def test_a_unit_larger_than_the_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="unit 1"):
        place([PAGE, 2 * PAGE], PAGE)


def test_a_single_unit_waits_for_itself() -> None:
    assert Schedule.of(range(1)).distances(place([PAGE], PAGE)) == (1,)


def test_forwards_and_backwards_each_unit_waits_for_its_neighbour_or_itself() -> None:
    places = place([PAGE, PAGE, PAGE], 2 * PAGE)
    schedule = Schedule.of([0, 1, 2, 2, 1, 0])
    assert [where.offset for where in places] == [0, PAGE, 0]
    assert schedule.distances(places) == (1, 3, 2, 1, 3, 2)
    assert [schedule.unit(step) for step in range(8)] == [0, 1, 2, 2, 1, 0, 0, 1]
    assert [schedule.next_visit(1, step) for step in range(8)] == [1, 1, 4, 4, 4, 7, 7, 7]


def test_what_has_memory_of_its_own_overwrites_nothing_and_counts_as_a_step() -> None:
    assert Schedule.of(range(3)).distances([Place(0, PAGE), None, Place(0, PAGE)]) == (1, None, 2)


def test_a_schedule_without_visits_or_a_unit_that_it_does_not_visit_is_refused() -> None:
    with pytest.raises(ValueError, match="one unit at least"):
        Schedule.of([])
    with pytest.raises(ValueError, match="unit 1 is not visited"):
        Schedule.of([0, 2]).next_visit(1, 0)


@given(SIZES, st.integers(0, 40), st.data())
def test_places_lie_in_the_arena_and_distances_are_right(sizes: list[int], spare: int, data: st.DataObject) -> None:
    capacity = max(map(align, sizes)) + spare * PAGE
    places = place(sizes, capacity)
    assert [where.nbytes for where in places] == sizes
    for where in places:
        assert where.offset % PAGE == 0
        assert 0 <= where.offset <= where.offset + where.nbytes <= capacity
    # Who wrote each byte last, in sweep after sweep: the latest of them is whom a distance must name.
    units = st.integers(0, len(sizes) - 1)
    order = data.draw(st.just(list(range(len(sizes)))) | st.lists(units, min_size=1, max_size=24))
    schedule = Schedule.of(order)
    distances = schedule.distances(places)
    count, last = len(schedule), [-1] * (capacity // EIGHTH)
    for step in range(3 * count):
        where = places[schedule.unit(step)]
        mine = range(where.offset // EIGHTH, -(-(where.offset + where.nbytes) // EIGHTH))
        if step >= count and where.nbytes:
            assert distances[step % count] == step - max(last[cell] for cell in mine)
        for cell in mine:
            last[cell] = step


@given(SIZES, st.integers(0, 40))
def test_everything_fits_at_once_where_there_is_room(sizes: list[int], spare: int) -> None:
    capacity = sum(map(align, sizes)) + spare * PAGE
    if capacity:
        assert set(Schedule.of(range(len(sizes))).distances(place(sizes, capacity))) == {len(sizes)}


def test_host_memory_is_zeroed_aligned_and_given_back() -> None:
    arena = HostMemory(3 * PAGE + 1)
    assert arena.nbytes == 4 * PAGE
    view = arena.view(PAGE, 10)
    assert view.data_ptr() % PAGE == 0
    assert view.sum() == 0
    view.fill_(7)
    assert arena.view(0, 2 * PAGE).sum() == 70
    arena.close()
    arena.close()
    with pytest.raises(ClosedError):
        arena.view(0, 1)
    assert view.sum() == 70, "a view that is held stays valid"
