"""The trace: exact totals, bounded memory, and files that Perfetto opens."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import pytest
from fakes import FakeClock

from airllm_nb.trace import CAPACITY, MOST_MEMORY, STAGES, MemorySample, Trace, speed_line, stage_rows


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def trace(clock: FakeClock) -> Trace:
    """Two sweeps over two units."""
    clock.advance(100)
    trace = Trace(clock)
    for sweep in range(2):
        for unit in ("attention", "mlp"):
            start = float(sweep * 10)
            trace.add("read", unit, start, start + 1, 1000)
            trace.add("copy", unit, start + 1, start + 1.5, 1000)
            trace.add("compute", unit, start + 2, start + 4)
        clock.advance(10)
        trace.add_memory(MemorySample(trace.now(), 500 + sweep, 1000 - sweep))
        trace.end_sweep(10.0, 14.0 + sweep)
    return trace


def test_totals(trace: Trace) -> None:
    summary = trace.summary()
    assert summary["sweeps"] == 2
    assert summary["stages"]["read"] == {"seconds": 4.0, "bytes": 4000, "count": 4, "gb_per_second": 1e-6}
    assert summary["stages"]["copy"]["seconds"] == 2.0
    assert summary["stages"]["wait"] == {"seconds": 0.0, "bytes": 0, "count": 0, "gb_per_second": 0.0}
    assert trace.by_unit["mlp"]["compute"] == 4.0
    assert summary["peak_device_bytes"] == 1000
    assert set(summary["stages"]) == set(STAGES)


def test_seconds_count_from_the_beginning(trace: Trace) -> None:
    assert trace.now() == 20.0
    assert [sample.seconds for sample in trace.memory] == [10.0, 20.0]


@pytest.mark.parametrize(
    ("sweeps", "median"), [([], None), ([9.0], 9.0), ([9.0, 1.0], 1.0), ([9.0, 1.0, 3.0, 2.0], 2.0)]
)
def test_the_median_sweep_leaves_the_prefill_out(sweeps: list[float], median: float | None) -> None:
    trace = Trace()
    for seconds in sweeps:
        trace.end_sweep(0.0, seconds)
    assert trace.median_sweep() == median


def test_achieved_of_predicted(trace: Trace) -> None:
    assert trace.summary()["achieved_of_predicted"] is None
    trace.predicted_sweep_seconds = 4.0
    assert trace.summary()["achieved_of_predicted"] == pytest.approx(0.8)


def test_the_speed_in_a_line(trace: Trace) -> None:
    assert speed_line(Trace().summary()) == "no sweep finished"
    assert speed_line(trace.summary()) == "5 s a token"
    trace.predicted_sweep_seconds = 4.8
    assert speed_line(trace.summary()) == "predicted 4.8 s a token, achieved 5 s (96%)"
    trace.bound_by = "link"
    assert speed_line(trace.summary()) == "predicted 4.8 s a token (link-bound), achieved 5 s (96%)"
    unused = Trace()
    unused.predicted_sweep_seconds, unused.bound_by = 0.71234, "disk"
    assert speed_line(unused.summary()) == "predicted 0.712 s a token (disk-bound)"


def test_stages_that_did_something_are_rows(trace: Trace) -> None:
    trace.add("copy", "mlp", 0.0, 1.0, 5 * 10**9)
    rows = dict(stage_rows(trace.summary()["stages"]))
    assert rows == {"read": "4.000 s in 4 reads, 4e-06 GB at 0.0 GB/s", "copy": "3.000 s in 5 copies, 5 GB at 1.7 GB/s",
                    "compute": "8.000 s in 4 units"}  # fmt: skip


def test_an_empty_trace_has_a_summary_and_a_table(tmp_path: Path) -> None:
    trace = Trace()
    assert json.loads(json.dumps(trace.summary()))["sweeps"] == 0
    assert "total" in trace.table()
    assert json.loads(trace.to_chrome(tmp_path / "t.json").read_text())["traceEvents"]


def test_the_table_has_a_row_for_each_unit(trace: Trace) -> None:
    head, attention, mlp, total = trace.table().splitlines()
    assert [word for word in head.split() if word != "ms"] == ["unit", *STAGES]
    assert attention.split() == ["attention", "2000.00", "1000.00", "0.00", "4000.00", "0.00"]
    assert mlp.split()[1:] == attention.split()[1:]
    assert total.split()[1:] == ["4000.00", "2000.00", "0.00", "8000.00", "0.00"]


def test_the_chrome_file_follows_the_trace_event_format(trace: Trace, tmp_path: Path) -> None:
    path = trace.to_chrome(str(tmp_path / "trace.json"))
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 12
    assert all({"name", "cat", "pid", "tid", "ts", "dur", "args"} <= event.keys() for event in spans)
    first = spans[0]
    assert (first["name"], first["cat"], first["ts"], first["dur"]) == ("attention", "read", 0.0, 1e6)
    assert first["args"] == {"bytes": 1000, "sweep": 0}
    rows = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert all(rows[event["cat"]] == event["tid"] for event in spans)
    assert [event["args"]["allocated"] for event in events if event["ph"] == "C"] == [500, 501]
    assert {event["ph"] for event in events} == {"M", "X", "C"}


def test_memory_is_bounded_and_totals_stay_exact() -> None:
    trace = Trace()
    for number in range(CAPACITY + 1000):
        trace.add("read", f"unit {number % 7}", 0.0, 1.0, 1)
        trace.add_memory(MemorySample(trace.now(), 1, 1))
        trace.end_sweep(0.0, 1.0)
    assert trace.summary()["stages"]["read"]["count"] == trace.sweeps == CAPACITY + 1000
    assert len(trace.spans) == CAPACITY
    assert len(trace.memory) < MOST_MEMORY and len(trace.sweep_seconds) < CAPACITY
    assert sys.getsizeof(trace.spans) < 1 << 20


def test_memory_samples_become_rarer_and_span_the_whole_trace(clock: FakeClock) -> None:
    trace = Trace(clock)
    for step in range(40_000):
        clock.advance(0.01)
        if trace.wants_memory:
            trace.add_memory(MemorySample(trace.now(), step, step))
    times = [sample.seconds for sample in trace.memory]
    assert MOST_MEMORY / 2 <= len(times) < MOST_MEMORY
    assert times[0] < 1 and times[-1] > 399 and times == sorted(times)
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 1


def test_recording_is_cheap() -> None:
    """A layer of streamed units is a few spans; they may cost 2% of a sweep, and a layer takes milliseconds."""
    trace = Trace()
    start = time.thread_time()
    for _ in range(20_000):
        trace.add("read", "model.layers.0.mlp", 0.0, 1.0, 1)
    assert (time.thread_time() - start) / 20_000 < 50e-6


def test_an_unknown_stage_is_an_error() -> None:
    with pytest.raises(KeyError):
        Trace().add("copi", "unit", 0.0, 1.0)
