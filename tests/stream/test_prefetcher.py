"""The scheduler against a disk and a device that do what they want, when they want, and against real threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
from fakes import (
    Deadlock,
    FakeClock,
    FakeDevice,
    FakeReader,
    Simulation,
    ThreadedReader,
    content,
    make_stops,
    within,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from airllm_nb.errors import CheckpointError, ClosedError, GenerationStopped
from airllm_nb.stream.copier import MemoryCopier
from airllm_nb.stream.prefetcher import READS_AT_ONCE, Prefetcher
from airllm_nb.stream.ring import PAGE, align
from airllm_nb.stream.schedule import Schedule

DEPTHS = [0, 1, 2, 3, 4, None]


def names(*indices: int) -> list[str]:
    return [f"unit-{index}" for index in indices]


def make(stops: list, depth: int | None = None, **options) -> tuple[Prefetcher, FakeReader, FakeDevice]:
    reader, device = FakeReader(at_once=options.pop("at_once", False)), FakeDevice()
    return Prefetcher(stops, reader, device, depth, FakeClock(), **options), reader, device


# ---- order and back-pressure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
def test_reads_are_asked_for_in_order_and_no_further_ahead_than_the_depth(depth: int | None) -> None:
    stops = make_stops([PAGE] * 6, arena=6 * PAGE)
    prefetcher, reader, _ = make(stops, depth, at_once=True)
    for step in range(18):
        prefetcher.take(step % 6)
        ahead = 6 if depth is None else depth
        expected = [index % 6 for index in range(step + 1 + ahead)]
        assert reader.submitted == names(*expected)
        prefetcher.release(step % 6)


def test_only_a_few_reads_are_under_way_at_once() -> None:
    stops = make_stops([PAGE] * 10, arena=10 * PAGE)
    simulation = Simulation(stops)
    most = 0
    finish = simulation.reader.finish

    def counted(which: int = 0, error: BaseException | None = None) -> None:
        nonlocal most
        most = max(most, len(simulation.reader.pending))
        finish(which, error)

    simulation.reader.finish = counted  # type: ignore[method-assign]
    simulation.sweep(3)
    simulation.check()
    assert 1 < most <= READS_AT_ONCE


def test_a_full_ring_holds_reads_back_until_their_place_is_copied() -> None:
    stops = make_stops([PAGE] * 4, ring=2 * PAGE, arena=4 * PAGE)
    prefetcher, reader, device = make(stops)
    with pytest.raises(Deadlock):
        within(0.3, lambda: prefetcher.take(0))
    assert reader.submitted == names(0, 1)
    reader.finish()
    assert reader.submitted == names(0, 1, 2)
    assert device.host_waits == 0, "the first read waits for nothing"
    assert reader.pending[-1].before is not None, "the third overwrites the first, whose copy is only queued"


def test_in_place_a_read_waits_until_compute_has_released_its_place() -> None:
    stops = make_stops([PAGE] * 3, ring=PAGE)
    prefetcher, reader, _ = make(stops, at_once=True)
    for step in range(7):
        memory, _ = prefetcher.take(step % 3)
        assert reader.submitted == names(*[index % 3 for index in range(step + 1)])
        assert memory.equal(content(stops[step % 3].unit))
        prefetcher.release(step % 3)


def test_a_copy_waits_for_the_compute_that_reads_its_place() -> None:
    stops = make_stops([PAGE] * 2, arena=PAGE)
    prefetcher, _, device = make(stops, depth=1, at_once=True)
    memory, _ = prefetcher.take(0)
    device.compute(stops[0].unit, memory)
    prefetcher.release(0)
    assert len(device.copied) == 2, "the second copy is queued as soon as the first compute is"
    assert device.run_copy()
    assert not device.run_copy(), "but may not run before it"
    prefetcher.take(1)
    device.drain()
    assert device.wrong == []


def test_the_first_units_of_the_next_sweep_move_while_the_last_one_computes() -> None:
    stops = make_stops([PAGE] * 4, arena=4 * PAGE)
    prefetcher, reader, _ = make(stops, depth=2, at_once=True)
    for index in range(4):
        prefetcher.take(index)
        if index < 3:
            prefetcher.release(index)
    assert reader.submitted == names(0, 1, 2, 3, 0, 1)


def test_kept_units_are_read_once() -> None:
    stops = make_stops([PAGE] * 4, keep=[True, False, True, False], ring=2 * PAGE, arena=2 * PAGE)
    simulation = Simulation(stops)
    simulation.sweep(4)
    simulation.check()
    assert [simulation.reader.submitted.count(name) for name in names(0, 2)] == [1, 1]
    assert simulation.reader.submitted.count("unit-1") >= 4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_kept_units_are_not_read_twice_while_their_first_read_is_under_way(count: int) -> None:
    stops = make_stops([PAGE] * count, keep=[True] * count, ring=0)
    prefetcher, reader, _ = make(stops)
    with pytest.raises(Deadlock):
        within(0.3, lambda: prefetcher.take(0))
    assert reader.submitted == names(*range(count))


def test_starvation_is_reported_as_seconds_waited() -> None:
    stops = make_stops([PAGE] * 5, ring=2 * PAGE)
    simulation = Simulation(stops, depth=1)
    _, waited = simulation.prefetcher.take(0)
    assert waited >= 1.0
    simulation.prefetcher.release(0)
    while simulation.happen():
        pass
    _, waited = simulation.prefetcher.take(1)
    assert waited == 0.0


def test_everything_moved_is_recorded_for_the_trace() -> None:
    stops = make_stops([PAGE] * 3, keep=[False, True, False], arena=2 * PAGE)
    simulation = Simulation(stops, depth=0)
    simulation.sweep(2)
    simulation.check()
    moved = [(entry.stage, entry.unit.name) for entry in simulation.prefetcher.moved]
    assert sorted(moved) == sorted(
        [("copy", name) for name in names(0, 1, 2) * 2] + [("read", name) for name in [*names(0, 2) * 2, "unit-1"]]
    )
    reads = [entry for entry in simulation.prefetcher.moved if entry.stage == "read"]
    assert all(entry.start <= entry.end for entry in reads)
    assert all(first.end <= second.start for first, second in itertools.pairwise(reads))


def test_the_record_of_what_moved_is_bounded() -> None:
    stops = make_stops([PAGE] * 2)
    simulation = Simulation(stops)
    simulation.sweep(100)
    assert len(simulation.prefetcher.moved) < 100


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["in place", "device"])
def stops(request: pytest.FixtureRequest) -> list:
    return make_stops([PAGE, 3 * PAGE, PAGE, 2 * PAGE, 5], ring=4 * PAGE, arena={"device": 5 * PAGE}.get(request.param))


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("depth", [0, 1, None])
@pytest.mark.parametrize("keep", [False, True])
def test_a_readers_error_reaches_the_caller_and_the_next_forward_works(
    stops: list, failing: int, depth: int | None, keep: bool
) -> None:
    if keep:
        stops = make_stops([PAGE] * 5, keep=[True] * 5, ring=0, arena=2 * PAGE if stops[0].device is not None else None)
    for seed in range(5):
        simulation = Simulation(stops, depth, seed)
        for stop in stops:
            stop.loaded = False
        simulation.reader.fail[f"unit-{failing}"] = CheckpointError("model.safetensors ends at byte 17")
        with pytest.raises(CheckpointError, match="ends at byte 17"):
            simulation.sweep(2)
        simulation.sweep(2)
        simulation.check()


def test_an_error_ahead_of_time_does_not_hang_a_caller_that_tries_the_same_unit_again() -> None:
    simulation = Simulation(make_stops([PAGE] * 4))
    simulation.reader.fail["unit-2"] = CheckpointError("bad sector")
    simulation.compute(0)
    while simulation.happen():
        pass
    with pytest.raises(CheckpointError, match="bad sector"):
        simulation.prefetcher.take(1)
    for index in (1, 2, 3):
        simulation.compute(index)
    simulation.check()


def test_an_error_in_a_read_for_the_next_sweep_does_not_hang_the_next_forward() -> None:
    simulation = Simulation(make_stops([PAGE] * 3), depth=1)
    simulation.compute(0)
    simulation.compute(1)
    simulation.reader.fail["unit-0"] = CheckpointError("bad sector")
    simulation.compute(2)
    while simulation.happen():
        pass
    assert not simulation.reader.fail, "the next sweep was not read ahead"
    with pytest.raises(CheckpointError, match="bad sector"):
        simulation.sweep()
    simulation.sweep(2)
    simulation.check()


@pytest.mark.parametrize("where", ["take", "release"])
def test_a_read_that_cannot_be_started_does_not_hang_the_next_forward(where: str) -> None:
    simulation = Simulation(make_stops([PAGE] * 3, ring=PAGE), depth=1)
    prefetcher, reader = simulation.prefetcher, simulation.reader
    if where == "release":
        # The ring has one place: the first of the next sweep can be read when the last is released.
        simulation.compute(0)
        simulation.compute(1)
        prefetcher.take(2)
    reader.refuse = RuntimeError("can't start new thread")
    with pytest.raises(RuntimeError, match="new thread"):
        if where == "release":
            prefetcher.release(2)
        prefetcher.take(0)
    reader.refuse = None
    simulation.sweep(2)
    simulation.check()


def test_a_copy_that_fails_on_a_reading_thread_reaches_the_caller() -> None:
    simulation = Simulation(make_stops([PAGE] * 3, arena=2 * PAGE))
    copy, broken = simulation.device.copy, [True]

    def failing_copy(*args):
        if broken:
            raise RuntimeError("CUDA error: out of memory")
        return copy(*args)

    simulation.device.copy = failing_copy  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        simulation.sweep()
    broken.clear()
    simulation.sweep(2)
    simulation.check()


# ---- leaving the schedule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("aborted_at", range(5))
@pytest.mark.parametrize("released", [False, True])
def test_an_aborted_forward_starts_again_at_the_first_unit(
    stops: list, depth: int | None, aborted_at: int, released: bool
) -> None:
    for seed in range(4):
        simulation = Simulation(stops, depth, seed)
        simulation.sweep()
        for index in range(aborted_at):
            simulation.compute(index)
        memory, _ = simulation.prefetcher.take(aborted_at)
        simulation.work(stops[aborted_at].unit, memory)
        if released:
            simulation.prefetcher.release(aborted_at)
        simulation.sweep(2)
        simulation.check()
        assert simulation.prefetcher.resets == (0 if released and aborted_at == 4 else 1)


def test_cancelling_ends_a_wait_and_the_next_forward_works(stops: list) -> None:
    simulation = Simulation(stops, depth=1)
    simulation.cancel_next = True
    with pytest.raises(GenerationStopped):
        simulation.prefetcher.take(0)
    simulation.cancelled = False
    simulation.sweep(2)
    simulation.check()


@pytest.mark.parametrize(
    "order",
    [[4, 3, 2, 1, 0], [0, 0, 1, 1, 2], [0, 2, 4, 1, 3], [2], [0, 1, 2, 0, 1, 2, 3, 4], [3, 4, 0, 1, 2]],
    ids=str,
)
def test_another_order_costs_time_but_no_byte(stops: list, order: list[int]) -> None:
    for seed in range(4):
        simulation = Simulation(stops, None, seed)
        for index in order * 3:
            simulation.compute(index)
        simulation.check()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    "visits", [[0, 1, 2, 3, 4, 4, 3, 2, 1, 0], [4, 3, 2, 1, 0], [1, 3], [2, 2], [0, 2, 4, 2, 1, 3], [3]], ids=str
)
def test_a_schedule_may_visit_units_in_any_order_and_is_then_never_left(
    stops: list, depth: int | None, visits: list[int]
) -> None:
    for seed in range(4):
        simulation = Simulation(stops, depth, seed, Schedule.of(visits))
        simulation.sweep(3)
        simulation.check()
        assert simulation.prefetcher.resets == 0


def test_backwards_reads_go_ahead_in_that_order() -> None:
    stops = make_stops([PAGE] * 3, arena=3 * PAGE)
    prefetcher, reader, _ = make(stops, depth=2, at_once=True, schedule=Schedule.of([0, 1, 2, 2, 1, 0]))
    for unit in (0, 1, 2, 2):
        prefetcher.take(unit)
        prefetcher.release(unit)
    assert reader.submitted == names(0, 1, 2, 2, 1, 0)
    assert prefetcher.resets == 0


def test_a_unit_that_the_schedule_does_not_visit_is_refused_and_the_others_go_on(stops: list) -> None:
    simulation = Simulation(stops, schedule=Schedule.of([0, 2]))
    simulation.sweep()
    with pytest.raises(ValueError, match="unit 1 is not visited"):
        simulation.compute(1)
    simulation.sweep(2)
    simulation.check()


def test_the_usual_order_never_resets(stops: list) -> None:
    simulation = Simulation(stops)
    simulation.sweep(5)
    assert simulation.prefetcher.resets == 0


def test_the_release_of_what_is_not_held_changes_nothing(stops: list) -> None:
    simulation = Simulation(stops)
    simulation.prefetcher.release(3)
    simulation.compute(0)
    simulation.prefetcher.release(0)
    simulation.prefetcher.take(1)
    simulation.prefetcher.release(0)
    simulation.prefetcher.release(1)
    for index in (2, 3, 4):
        simulation.compute(index)
    simulation.check()
    assert simulation.prefetcher.resets == 0


# ---- close in every state --------------------------------------------------------------------------------------------


def test_closing_an_idle_one_refuses_further_use(stops: list) -> None:
    prefetcher, _, _ = make(stops)
    prefetcher.close()
    prefetcher.close()
    with pytest.raises(ClosedError):
        prefetcher.take(0)


@pytest.mark.parametrize("steps", range(12))
def test_closing_between_any_two_calls_waits_for_reads_and_copies(stops: list, steps: int) -> None:
    simulation = Simulation(stops, None, steps)
    for step in range(steps // 2):
        simulation.compute(step % 5)
    if steps % 2:
        simulation.prefetcher.take(steps // 2 % 5)
    simulation.prefetcher.close()
    assert simulation.reader.pending == []
    assert not simulation.device.run_copy(), "a copy is still queued"
    with pytest.raises(ClosedError):
        simulation.prefetcher.take(0)
    simulation.check()


def test_closing_while_another_thread_waits_wakes_it() -> None:
    reader = ThreadedReader(delay=0.3)
    prefetcher = Prefetcher(make_stops([PAGE] * 3), reader, MemoryCopier(), None, time.perf_counter)
    errors: list[BaseException] = []

    def waits() -> None:
        try:
            while True:
                for index in range(3):
                    prefetcher.take(index)
                    prefetcher.release(index)
        except ClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=waits, daemon=True)
    thread.start()
    time.sleep(0.05)
    within(120, prefetcher.close)
    thread.join(120)
    reader.close()
    assert len(errors) == 1
    assert reader.pending == []


def test_closing_while_a_read_fails_is_quiet() -> None:
    simulation = Simulation(make_stops([PAGE] * 3))
    simulation.compute(0)
    simulation.reader.fail.update({name: CheckpointError("gone") for name in names(0, 1, 2)})
    simulation.prefetcher.close()
    with pytest.raises(ClosedError):
        simulation.prefetcher.take(1)


def test_a_release_after_close_is_quiet(stops: list) -> None:
    simulation = Simulation(stops)
    simulation.prefetcher.take(0)
    simulation.prefetcher.close()
    simulation.prefetcher.release(0)
    assert simulation.reader.pending == []


# ---- anything at all -------------------------------------------------------------------------------------------------


def orders(count: int) -> st.SearchStrategy[Schedule]:
    """Forwards as in decoding, forwards and backwards, or anything."""
    forwards = list(range(count))
    anything = st.lists(st.integers(0, count - 1), min_size=1, max_size=2 * count + 2)
    return (st.just(forwards) | st.just([*forwards, *reversed(forwards)]) | anything).map(Schedule.of)


SIZES = st.integers(1, 3 * PAGE) | st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE])


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list, int | None]:
    sizes = draw(st.lists(SIZES, min_size=1, max_size=7))
    keep = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    in_ring = [align(size) for size, kept in zip(sizes, keep, strict=True) if not kept] or [0]
    everywhere = [align(size) for size in sizes]
    ring = draw(st.integers(max(in_ring) // PAGE, sum(in_ring) // PAGE)) * PAGE
    arena = draw(st.none() | st.integers(max(everywhere) // PAGE, sum(everywhere) // PAGE).map(lambda n: n * PAGE))
    depth = draw(st.sampled_from(DEPTHS))
    return make_stops(sizes, keep, ring, arena), depth


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(0, 2**32), st.data())
def test_every_take_sees_its_own_bytes_whatever_finishes_first(
    schedule: tuple[list, int | None], seed: int, data: st.DataObject
) -> None:
    stops, depth = schedule
    simulation = Simulation(stops, depth, seed, data.draw(orders(len(stops))))
    simulation.sweep(4)
    simulation.check()
    assert simulation.prefetcher.resets == 0


@settings(max_examples=400, deadline=None)
@given(schedules(), st.integers(0, 2**32), st.lists(st.sampled_from("csrjexa"), min_size=2, max_size=12), st.data())
def test_nothing_that_goes_wrong_leaves_a_wrong_byte_or_a_hang(
    schedule: tuple[list, int | None], seed: int, actions: list[str], data: st.DataObject
) -> None:
    stops, depth = schedule
    simulation = Simulation(stops, depth, seed, data.draw(orders(len(stops))))
    prefetcher, chance, visits, at = simulation.prefetcher, simulation.random, simulation.visits, 0
    for action in actions:
        other = chance.randrange(len(visits))
        index = visits[other]
        try:
            if action == "c":  # go on
                simulation.compute(visits[at])
                at = (at + 1) % len(visits)
            elif action == "s":  # a whole forward
                simulation.sweep()
                at = 0
            elif action == "r":  # a forward aborted between take and release
                memory, _ = prefetcher.take(visits[at])
                simulation.work(stops[visits[at]].unit, memory)
                at = 0
            elif action == "j":  # another order
                simulation.compute(index)
                at = (other + 1) % len(visits)
            elif action == "e":  # the disk fails some time
                simulation.reader.fail[stops[index].unit.name] = CheckpointError("bad sector")
            elif action == "x":  # the user stops it in its next wait
                simulation.cancel_next = True
                simulation.compute(visits[at])
                at = (at + 1) % len(visits)
            else:  # time passes
                simulation.happen(20)
        except (CheckpointError, GenerationStopped):
            at = chance.choice([0, at])
        simulation.cancelled = simulation.cancel_next = False
    simulation.reader.fail.clear()
    for _ in range(3):
        try:
            simulation.sweep()
            break
        except CheckpointError:
            pass
    simulation.sweep()
    prefetcher.close()
    simulation.check()


# ---- real threads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def threaded_reader() -> Iterator[ThreadedReader]:
    reader = ThreadedReader()
    yield reader
    reader.close()


@pytest.mark.parametrize("depth", [0, 1, 3, None])
@pytest.mark.parametrize("arena", [None, 4 * PAGE, 9 * PAGE])
def test_with_real_threads_every_take_sees_its_own_bytes(
    threaded_reader: ThreadedReader, depth: int | None, arena: int | None
) -> None:
    sizes = [PAGE, 3 * PAGE, 17, 2 * PAGE, PAGE, 4 * PAGE, 1]
    stops = make_stops(sizes, keep=[False, True, False, False, True, False, False], ring=5 * PAGE, arena=arena)
    device = FakeDevice()
    prefetcher = Prefetcher(stops, threaded_reader, device, depth, time.perf_counter)
    expected = [content(stop.unit) for stop in stops]
    over = threading.Event()

    def gpu() -> None:
        while not over.is_set():
            if not (device.run_copy() or device.run_compute()):
                time.sleep(0.0002)

    def forward() -> None:
        for sweep in range(30):
            for index, stop in enumerate(stops):
                memory, _ = prefetcher.take(index)
                if arena is None:
                    assert memory.equal(expected[index])
                else:
                    device.compute(stop.unit, memory)
                if sweep % 7 == 6 and index == sweep % len(stops):
                    break
                prefetcher.release(index)

    worker = threading.Thread(target=gpu, daemon=True)
    worker.start()
    try:
        within(120, forward)
        within(120, prefetcher.close)
    finally:
        over.set()
        worker.join(120)
    device.drain()
    assert device.wrong == []


def test_with_real_threads_errors_and_stops_do_not_hang(threaded_reader: ThreadedReader) -> None:
    stops = make_stops([PAGE, 2 * PAGE, PAGE, 9], ring=3 * PAGE, arena=3 * PAGE)
    stopping = threading.Event()
    prefetcher = Prefetcher(stops, threaded_reader, MemoryCopier(), None, time.perf_counter, stopping.is_set)
    expected = [content(stop.unit) for stop in stops]
    met: list[str] = []

    def forwards() -> None:
        for number in range(60):
            stopping.clear()
            if number % 3 == 1:
                threaded_reader.fail[f"unit-{number % 4}"] = CheckpointError("bad sector")
            if number % 3 == 2:
                stopping.set()
            try:
                for index in range(4):
                    memory, _ = prefetcher.take(index)
                    assert memory.equal(expected[index])
                    prefetcher.release(index)
            except (CheckpointError, GenerationStopped) as error:
                met.append(type(error).__name__)

    within(120, forwards)
    within(120, prefetcher.close)
    assert "CheckpointError" in met
