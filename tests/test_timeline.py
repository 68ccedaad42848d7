"""What a sweep looked like: lanes, what compute waited for, the efficiency, and the words for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeClock

from airllm_nb.timeline import LANES, SweepView, last_sweep, verdict, zoom
from airllm_nb.trace import Trace

PLAN = {"tiers": {"disk": {"units": 2}}, "vram_budget": 4 << 30}


def trace_of(
    spans: Iterable[tuple[Any, ...]], window: tuple[float, float] | None = None, tiers: Mapping[str, str] | None = None
) -> Trace:
    trace = Trace(FakeClock())
    for span in spans:
        trace.add(*span)
    if window:
        trace.end_sweep(*window)
    trace.tiers = tiers or {}
    return trace


def view_of(*args: Any, **kwargs: Any) -> SweepView:
    view = last_sweep(trace_of(*args, **kwargs))
    assert view is not None
    return view


def pipeline(units: int, read: float, copy: float, compute: float, sweeps: int = 2, ahead: int = 4) -> Trace:
    """Every third unit comes from disk; each stage starts a unit as soon as it may, ``ahead`` units at the most."""
    trace, clock = trace_of([]), 0.0
    tiers = {f"model.layers.{at // 7}.unit{at % 7}": "ram" if at % 3 else "disk" for at in range(units)}
    trace.tiers, free = tiers, [0.0] * ahead
    disk = link = 0.0
    for _ in range(sweeps):
        begin = clock
        for at, (name, tier) in enumerate(tiers.items()):
            ready = max(link, free[at % ahead])
            if tier == "disk":
                trace.add("read", name, disk, disk + read, 1000)
                disk += read
                ready = max(ready, disk)
            link = ready + copy
            trace.add("copy", name, ready, link, 1000)
            start = max(link, clock)
            clock = free[at % ahead] = start + compute
            trace.add("compute", name, start, clock)
        trace.end_sweep(begin, clock)
    return trace


# ---- lanes and windows


def test_nothing_is_recorded() -> None:
    assert last_sweep(Trace()) is None
    unused = Trace()
    unused.began = 3.0
    assert last_sweep(unused) is None


def test_the_last_finished_sweep_is_cut_out_of_the_trace() -> None:
    trace = trace_of([("compute", "a", 0, 4), ("read", "b", 2, 12, 1000)], (0, 5))
    # Added after the sweep was closed, and with the number of the next one: time counts.
    trace.add("compute", "b", 6, 8)
    trace.end_sweep(5, 10)
    trace.add("compute", "a", 9, 11)
    view = last_sweep(trace)
    assert view is not None
    assert (view.start, view.end, view.running, view.seconds) == (5, 10, False, 5)
    assert [(span.unit, span.start, span.end) for span in view.lanes["compute"]] == [("b", 6, 8), ("a", 9, 10)]
    assert [(span.start, span.end, span.nbytes) for span in view.lanes["read"]] == [(5, 10, 500)]
    assert view.busy == {"read": 5, "compute": 3}
    assert view.nbytes == {"read": 500, "compute": 0}


def test_lanes_come_in_one_order_and_only_if_they_exist() -> None:
    spans = [(stage, "a", 0, 1) for stage in reversed(LANES)]
    assert list(view_of(spans, (0, 1)).lanes) == ["read", "copy", "dequantise", "compute", "wait"]
    assert list(view_of([("compute", "a", 0, 1)], (0, 1)).lanes) == ["compute"]


def test_what_overlaps_is_busy_once() -> None:
    assert view_of([("read", "a", 0, 3), ("read", "b", 2, 4), ("read", "c", 2, 3)], (0, 8)).busy == {"read": 4}


def test_the_first_sweep_is_seen_while_it_runs() -> None:
    trace = trace_of([("read", "a", 0, 9), ("compute", "a", 9, 10), ("read", "b", 9, 14)])
    trace.began = 1.0
    view = last_sweep(trace)
    assert view is not None and view.running
    assert (view.start, view.end) == (1, 14)
    # What comes after the last compute is not known yet: it is told apart from idle time.
    assert view.waited == {"read": 8, "copy": 0, "host": 0}
    assert verdict(view).startswith("So far: ")
    trace.end_sweep(1, 15)
    assert (view := last_sweep(trace)) is not None and not view.running
    assert view.waited["host"] == 5


# ---- what compute waited for


def test_idle_time_of_compute_by_cause() -> None:
    spans = [
        ("compute", "a", 0, 1),
        ("read", "b", 0, 4, 100), ("copy", "b", 4, 6, 100), ("compute", "b", 7, 8),
        ("copy", "c", 6, 7, 100), ("compute", "c", 8, 9),
        ("read", "a", 8, 10, 100), ("copy", "a", 9, 10, 100),
    ]  # fmt: skip
    view = view_of(spans, (0, 10), {"b": "disk"})
    assert [(gap.stage, gap.unit, gap.start, gap.end) for gap in view.gaps] == [
        ("read", "b", 1, 4), ("copy", "b", 4, 6), ("host", "b", 6, 7),
        ("host", "", 9, 10),  # the read and the copy are for the next sweep
    ]  # fmt: skip
    assert view.waited == {"read": 3, "copy": 2, "host": 2}
    assert sum(view.waited.values()) + view.busy["compute"] == view.seconds


def test_nobody_reads_while_the_read_is_not_started() -> None:
    view = view_of([("read", "a", 2, 5), ("compute", "a", 5, 6)], (0, 6))
    assert view.waited == {"read": 3, "copy": 0, "host": 2}


def test_a_read_of_the_sweep_before_explains_nothing() -> None:
    view = view_of([("read", "a", 0, 3), ("compute", "a", 12, 13), ("read", "b", 9, 14)], (10, 14))
    assert view.waited["read"] == 0


@pytest.mark.parametrize(
    ("read", "copy", "compute", "bound", "cause"),
    [(9.0, 1.0, 0.5, "disk", "read"), (1.0, 2.0, 0.5, "link", "copy"), (0.5, 0.2, 3.0, "compute", None)],
)
def test_the_busiest_lane_bounds(read: float, copy: float, compute: float, bound: str, cause: str | None) -> None:
    view = last_sweep(pipeline(90, read, copy, compute))
    assert view is not None
    assert view.bound_by == bound
    assert 0.9 < view.efficiency <= 1.0
    waited = view.waited
    assert waited["host"] < 0.01 * view.seconds
    if cause:
        assert max(waited, key=lambda name: waited[name]) == cause
        # Compute does nothing else than compute and wait.
        assert sum(waited.values()) + view.busy["compute"] == pytest.approx(view.seconds)
    else:
        assert sum(waited.values()) < 0.1 * view.seconds


def test_efficiency_of_taking_turns() -> None:
    view = last_sweep(pipeline(90, 3.0, 1.0, 1.0, ahead=1))
    assert view is not None
    assert view.efficiency == pytest.approx(view.busy[max(view.busy, key=lambda lane: view.busy[lane])] / view.seconds)
    assert view_of([("wait", "a", 0, 1)], (0, 2)).efficiency == 0


# ---- close-up


def test_zoom_shows_units_that_follow_each_other() -> None:
    view = last_sweep(pipeline(90, 9.0, 1.0, 0.5))
    assert view is not None
    close = zoom(view, 12)
    units = [span.unit for span in view.lanes["compute"]]
    found = [span.unit for span in close.lanes["compute"]]
    assert found == units[39:51]
    assert view.start < close.start < close.end < view.end
    # The wait for the first unit is in it.
    assert close.start == view.lanes["compute"][38].end
    assert sum(close.waited.values()) + close.busy["compute"] == pytest.approx(close.seconds)
    assert all(close.start <= span.start < span.end <= close.end for lane in close.lanes.values() for span in lane)


def test_zoom_on_few_units_is_everything() -> None:
    view = view_of([("compute", "a", 0, 1)], (0, 1))
    assert zoom(view) is view
    only_moves = view_of([("copy", f"u{at}", at, at + 1) for at in range(40)], (0, 40))
    assert len(zoom(only_moves, 4).lanes["copy"]) == 4


# ---- words


def test_words_for_a_disk() -> None:
    spans = [("read", "b", 0, 96, 100), ("copy", "b", 96, 97), ("compute", "b", 97, 100)]
    told = verdict(view_of(spans, (0, 100), {"b": "disk"}), PLAN)
    assert told == (
        "Disk-bound: 96% of the sweep waits for reads and 1% for copies. Reading, copying and computing overlap to 96% "
        "of what the disk allows. A larger --ram would keep the one unit that comes from disk each time."
    )


def test_no_remedy_without_a_plan_or_a_reason() -> None:
    spans = [("read", "b", 0, 96, 100), ("compute", "b", 96, 100)]
    assert "--ram" not in verdict(view_of(spans, (0, 100), {"b": "disk"}))
    kept = verdict(view_of(spans, (0, 100), {"b": "ram"}), PLAN)
    assert "--ram" not in kept and "1 unit of those read stays in RAM" in kept


def test_words_for_a_link() -> None:
    view = last_sweep(pipeline(90, 1.0, 2.0, 0.5))
    assert view is not None
    told = verdict(view, PLAN)
    assert told.startswith("Link-bound: ") and "for copies" in told and "90 units that cross the link" in told
    assert "--vram" not in verdict(view, {"vram_budget": None})


def test_words_for_taking_turns() -> None:
    spans = [("read", "a", 0, 4), ("copy", "a", 4, 7), ("compute", "a", 7, 10)]
    told = verdict(view_of(spans, (0, 10), {"a": "disk"}))
    assert told == (
        "Reading, copying and computing take turns: 40% of the sweep waits for reads and 30% for copies, and the disk "
        "alone would need 40% of the time."
    )


def test_words_for_idling() -> None:
    spans = [("copy", "a", 0, 4), ("compute", "a", 1, 4), ("compute", "b", 8, 10)]
    told = verdict(view_of(spans, (0, 10)))
    assert told == (
        "Nothing is busy all the time: for 50% of the sweep compute stands still while no weights that it needs are "
        "moving. Computing is the busiest, with 50%."
    )


def test_words_for_what_does_not_stream() -> None:
    assert verdict(view_of([("compute", "a", 0, 9)], (0, 10)), PLAN) == "Nothing streams: compute-bound."
    # A GPU that holds everything times nothing.
    assert verdict(view_of([], (0, 10)), PLAN) == "Nothing streams: compute-bound."


# ---- cost, threads, and the real thing


def test_a_large_model_takes_milliseconds() -> None:
    trace = pipeline(700, 3.0, 1.0, 0.5, sweeps=30)
    assert len(trace.spans) > 40_000
    times = []
    for _ in range(5):
        start = time.process_time()
        view = last_sweep(trace)
        assert view is not None
        verdict(zoom(view), PLAN)
        times.append(time.process_time() - start)
    assert min(times) < 0.05, "10 ms on a quiet machine"


def test_a_trace_that_another_thread_writes() -> None:
    trace, stop, errors = pipeline(60, 3.0, 1.0, 0.5, sweeps=1), threading.Event(), []

    def write() -> None:
        at = trace.windows[-1][1]
        while not stop.is_set():
            for unit in range(50):
                trace.add("read", f"u{unit}", at, at + 0.5, 10)
                trace.add("compute", f"u{unit}", at + 0.5, at + 1)
                at += 1
            trace.end_sweep(at - 50, at)

    def look() -> None:
        try:
            for _ in range(60):
                view = last_sweep(trace)
                assert view is not None
                assert sum(view.waited.values()) + view.busy["compute"] == pytest.approx(view.seconds)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write), threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    threads[1].join(60)
    stop.set()
    threads[0].join(60)
    assert errors == []


@pytest.mark.parametrize("streams", [False, True])
def test_a_real_sweep(tiny_llama: Any, one_thread: None, streams: bool) -> None:
    import airllm_nb
    from airllm_nb import LoadOptions

    folder: Path = tiny_llama(tied=False, num_hidden_layers=6)
    options = {"vram_budget": 1 << 20, "ram_budget": 300 << 10} if streams else {}
    with airllm_nb.open_model(folder, LoadOptions.create(max_seq_len=64, **options)) as model:
        for _ in model.stream("one two three", max_new_tokens=4):
            pass
        view = last_sweep(model.trace)
    assert view is not None and not view.running
    assert view.seconds == pytest.approx(model.trace.sweep_seconds[-1])
    assert view.streams == streams
    assert 0 < view.efficiency <= 1
    assert sum(view.waited.values()) + view.busy["compute"] == pytest.approx(view.seconds)
    assert {span.unit for span in view.lanes["compute"]} <= set(view.tiers)
