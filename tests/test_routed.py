"""What experts were asked for: of a sweep, in words, in a table and in the trace's file."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeClock

from airllm_nb.routed import Routed, asked_and_hits, expert_table, expert_use, experts_line
from airllm_nb.trace import MemorySample, Trace


@pytest.fixture
def trace() -> Trace:
    """A prompt that needs all four experts of two layers, and two tokens with two each."""
    clock = FakeClock()
    trace = Trace(clock)
    steps = [((0, 1, 2, 3), 0), ((0, 1), 2), ((0, 3), 1)]
    for number, (asked, hits) in enumerate(steps):
        trace.begin_sweep()
        clock.advance(1)
        for layer in ("model.layers.1.experts", "model.layers.2.experts"):
            trace.add_routed(layer, 4, asked, hits)
            # Recorded late, as a device's are.
            trace.add("copy", layer, number + 0.5, number + 0.6, 100 * (len(asked) - hits))
        trace.add_memory(MemorySample(trace.now(), 0, 0))
    for number in range(3):
        trace.end_sweep(number, number + 1)
    return trace


def test_a_summary_leaves_the_prompt_out(trace: Trace) -> None:
    experts = trace.summary()["experts"]
    # Of two sweeps: eight asked for in both layers, six of them there.
    assert experts == {"asked": 4, "hit_rate": 0.75, "moved": 1, "bytes": 100}
    assert asked_and_hits(trace.experts) == (16, 6) and trace.hit_rate == 6 / 16
    assert experts_line(trace.summary()) == "75% expert hits, 1 experts and 1e-07 GB moved a token"
    assert trace.table().endswith("\n75% expert hits, 1 experts and 1e-07 GB moved a token")


def test_while_the_prompt_runs_it_is_all_there_is() -> None:
    trace = Trace(FakeClock())
    trace.begin_sweep()
    trace.add_routed("experts", 4, [0, 1], 0)
    trace.add("copy", "experts", 0.0, 1.0, 200)
    assert trace.summary()["experts"] == {"asked": 2, "hit_rate": 0, "moved": 2, "bytes": 200}


def test_without_experts_nothing_is_said() -> None:
    trace = Trace()
    assert trace.summary()["experts"] is None and experts_line(trace.summary()) == ""
    assert expert_use({}, 3) is None and expert_use({"experts": Routed([0, 0])}, 3) is None
    assert "expert" not in trace.table()


def test_a_file_counts_what_was_there_and_what_moved(trace: Trace) -> None:
    counted: list[dict[str, Any]] = [event for event in trace.chrome_events() if event["name"] == "experts"]
    assert [event["args"] for event in counted] == [
        {"cached": 0, "moved": 8}, {"cached": 4, "moved": 8}, {"cached": 6, "moved": 10},
    ]  # fmt: skip
    assert [event["ph"] for event in counted] == ["C"] * 3 and counted[0]["ts"] == 1e6


def test_layers_and_experts(trace: Trace) -> None:
    trace.experts["model.layers.2.experts"].cached = (0, 3)
    use = expert_use(trace.experts, trace.sweeps)
    assert use is not None and use.layers == ("model.layers.1.experts", "model.layers.2.experts")
    assert use.asked == ((3, 2, 1, 2),) * 2 and use.hits == (3, 3)
    assert use.cached == (None, frozenset({0, 3})) and use.count_cached == 2
    assert (use.most, use.total, use.share, use.top) == (4, 16, 6 / 16, (0, 0, 3))
    # It is a picture of a moment.
    trace.add_routed("model.layers.1.experts", 4, [3], 0)
    assert use.total == 16
    head, first, second, total = expert_table(use).splitlines()
    assert head.split() == ["layer", "asked", "different", "hits", "cached", "most", "often", "(times)"]
    assert first.split() == ["model.layers.1.experts", "8", "4", "38%", "0", "(3),", "1", "(2),", "3", "(2)"]
    assert second.split()[1:5] == ["8", "4", "38%", "2"] and total.split() == ["total", "16", "8", "38%", "2"]
