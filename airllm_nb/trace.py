"""What happened, as data: spans of reads, copies, computes and waits, memory samples, and what experts were asked for.

The engine adds spans while it runs; renderers read them afterwards. Totals are exact for the whole trace; single
spans are kept for the last :data:`CAPACITY` only, so that a trace never outgrows a few megabytes.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .config import format_seconds
from .routed import Routed, asked_and_hits, experts_line

T = TypeVar("T")
STAGES = ("read", "copy", "dequantise", "compute", "wait")
COUNTED = {"read": "reads", "copy": "copies", "dequantise": "matrices", "compute": "units", "wait": "waits"}
CAPACITY = 65_536
# Memory samples: seconds between two at first, and how many are kept; when there are as many, every second goes.
MEMORY_EVERY, MOST_MEMORY = 0.05, 2048


class Span(NamedTuple):
    """One thing that took time; seconds since the trace began."""

    stage: str
    unit: str
    start: float
    end: float
    nbytes: int
    sweep: int


class MemorySample(NamedTuple):
    """Device memory at one moment, in bytes; on a CPU the resident set of the process.

    ``allocated`` and ``reserved`` are of this process's allocator. Of what is allocated, ``slots`` holds units that
    are moving or wait for their turn, and ``kv_cache`` is what earlier forwards have left. ``others`` is what the
    driver counts beside: other programs, and CUDA itself.
    """

    seconds: float
    allocated: int
    reserved: int
    slots: int = 0
    kv_cache: int = 0
    others: int = 0


@dataclass
class StageTotal:
    """Sum over all spans of one stage."""

    seconds: float = 0.0
    nbytes: int = 0
    count: int = 0
    untimed: int = 0  # of the bytes, those that kernels moved, nobody knows in what time

    @property
    def gb_per_second(self) -> float:
        """Bytes over busy seconds, in 10⁹ bytes a second; 0 when nothing was moved."""
        return (self.nbytes - self.untimed) / self.seconds / 1e9 if self.seconds else 0.0


class Trace:
    """The record of one generation, in seconds of ``clock``. One thread writes it; others may read it meanwhile.

    Attributes
    ----------
    windows, began
        Start and end of each sweep, in seconds since the trace began; start of that which runs, or of the last one.
    replayed
        Sweeps that ran as they were recorded, at once: what units took in them is not known.
    plan
        What was planned for it, see :meth:`~airllm_nb.plan.residency.ResidencyPlan.as_dict`; empty until it runs.
    tiers
        ``"gpu"``, ``"ram"`` or ``"disk"`` of each unit by name, in the order of the schedule.
    experts
        Of each layer of experts that are not all there, by the unit's name.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._origin = clock, clock()
        self.windows: deque[tuple[float, float]] = deque(maxlen=CAPACITY // 16)
        self.began = 0.0
        self.plan: Mapping[str, Any] = {}
        self.tiers: Mapping[str, str] = {}
        self.experts: dict[str, Routed] = {}
        self.spans: deque[Span] = deque(maxlen=CAPACITY)
        self.memory: list[MemorySample] = []
        self._routed: list[tuple[float, int, int]] = []  # seconds, and how often experts were asked for and there
        self._memory_every, self._memory_next = MEMORY_EVERY, 0.0
        self.totals: dict[str, StageTotal] = {stage: StageTotal() for stage in STAGES}
        self.by_unit: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(STAGES, 0.0))
        self.sweeps = self.replayed = self.tokens = self.peak_bytes = 0
        # Sweeps begun; and of the first one, which says little of the others, experts asked for and there, and bytes.
        self._begun, self._second, self._prompt, self._prompt_bytes = 0, math.inf, (0, 0), dict.fromkeys(STAGES, 0)
        self.predicted_sweep_seconds: float | None = None
        self.bound_by: str | None = None  # the resource that the prediction rests on: "disk", "link" or "compute"

    def now(self) -> float:
        """Seconds since the trace began."""
        return self._clock() - self._origin

    def add(self, stage: str, unit: str, start: float, end: float, nbytes: int = 0) -> None:
        """Record one span; ``start`` and ``end`` are in seconds since the trace began."""
        total = self.totals[stage]
        total.seconds += end - start
        total.nbytes += nbytes
        total.count += 1
        if start < self._second:  # by its time, as it is added late
            self._prompt_bytes[stage] += nbytes
        self.by_unit[unit][stage] += end - start
        self.spans.append(Span(stage, unit, start, end, nbytes, self.sweeps))

    def add_routed(self, unit: str, experts: int, asked: Iterable[int], hits: int) -> None:
        """A forward asked a layer of so many ``experts`` for some, of which ``hits`` were there."""
        named = set(asked)
        self.add_counted(unit, [int(expert in named) for expert in range(experts)], hits, 0)

    def add_counted(self, unit: str, asked: Sequence[int], hits: int, nbytes: int) -> None:
        """What kernels have counted: how often each expert was asked for, ``hits`` that were there, bytes moved."""
        if any(asked):
            routed = self.experts.setdefault(unit, Routed([0] * len(asked)))
            routed.asked = [old + new for old, new in zip(routed.asked, asked, strict=True)]
            routed.hits += hits
        if nbytes:
            self.add("copy", unit, self.now(), self.now(), nbytes)
            self.totals["copy"].untimed += nbytes

    @property
    def hit_rate(self) -> float | None:
        """The share of experts asked for that were there; ``None`` where all always are."""
        asked, hits = asked_and_hits(self.experts)
        return hits / asked if asked else None

    def begin_sweep(self) -> None:
        """A sweep over all units begins now."""
        self.began, self._begun = self.now(), self._begun + 1
        if self._begun == 2:
            self._second, self._prompt = self.began, asked_and_hits(self.experts)

    def end_sweep(self, start: float, end: float) -> None:
        """Close one sweep over all units, from ``start`` to ``end`` in seconds since the trace began."""
        self.windows.append((start, end))
        self.sweeps += 1

    @property
    def sweep_seconds(self) -> list[float]:
        """How long each sweep took."""
        return [end - start for start, end in _copied(self.windows)]

    @property
    def last_window(self) -> tuple[float, float] | None:
        """Start and end of the last sweep that has ended."""
        return self.windows[-1] if self.windows else None

    @property
    def wants_memory(self) -> bool:
        """Whether the next memory sample is due; they become rarer as the trace grows longer."""
        return self.now() >= self._memory_next

    def add_memory(self, sample: MemorySample) -> None:
        """Record device memory in use; ``sample.seconds`` is :meth:`now`."""
        self.peak_bytes = max(self.peak_bytes, sample.reserved)
        self.memory.append(sample)
        if self.experts:
            self._routed.append((sample.seconds, *asked_and_hits(self.experts)))
        if len(self.memory) >= MOST_MEMORY:
            self.memory, self._routed = self.memory[::2], self._routed[::2]
            self._memory_every *= 2
        self._memory_next = sample.seconds + self._memory_every

    @property
    def of_device(self) -> bool:
        """Whether the memory samples are a GPU's: beside the allocator's memory its driver always counts something."""
        planned = self.plan.get("vram_budget") is not None or not self.plan
        return planned and any(one.others or one.allocated != one.reserved for one in list(self.memory))

    def recent(self) -> list[Span]:
        """The spans that are kept, safe while the trace grows."""
        return _copied(self.spans)

    def median_sweep(self) -> float | None:
        """The median sweep in seconds, the first left out when there are others (it is the prefill)."""
        every = self.sweep_seconds
        sweeps = sorted(every[1:] or every)
        return sweeps[len(sweeps) // 2] if sweeps else None

    def summary(self) -> dict[str, Any]:
        """Totals as a plain dict: seconds, bytes and GB/s of each stage, sweeps, tokens, achieved / predicted."""
        sweep, predicted = self.median_sweep(), self.predicted_sweep_seconds
        return {
            "sweeps": self.sweeps, "replayed": self.replayed, "tokens": self.tokens,
            "sweep_seconds": sweep, "predicted_sweep_seconds": predicted, "bound_by": self.bound_by,
            "achieved_of_predicted": predicted / sweep if predicted and sweep else None,
            "peak_device_bytes": self.peak_bytes, "experts": self._experts(),
            "stages": {
                stage: {"seconds": total.seconds, "bytes": total.nbytes, "count": total.count,
                        "gb_per_second": total.gb_per_second} for stage, total in self.totals.items()
            },
        }  # fmt: skip

    def _experts(self) -> dict[str, Any] | None:
        """Of a sweep after the prompt's, if there is one: hits, and experts and bytes that moved."""
        asked, hits = asked_and_hits(self.experts)
        stage = "copy" if self.totals["copy"].nbytes else "read"  # over the link; from disk, where there is none
        nbytes, sweeps = self.totals[stage].nbytes, max(self._begun, 1)
        if sweeps > 1 and asked > self._prompt[0]:
            asked, hits = asked - self._prompt[0], hits - self._prompt[1]
            nbytes, sweeps = nbytes - self._prompt_bytes[stage], sweeps - 1
        if not asked:
            return None
        return {"asked": asked / sweeps, "hit_rate": hits / asked, "moved": (asked - hits) / sweeps,
                "bytes": nbytes / sweeps}  # fmt: skip

    def table(self) -> str:
        """Milliseconds per stage, one row per unit and a total, as text; of experts what moved."""
        width = max([len(unit) for unit in self.by_unit] + [5])
        head = f"{'unit':<{width}}" + "".join(f"{stage + ' ms':>15}" for stage in STAGES)
        rows = [
            f"{unit:<{width}}" + "".join(f"{times[stage] * 1e3:>15.2f}" for stage in STAGES)
            for unit, times in self.by_unit.items()
        ]
        total = f"{'total':<{width}}" + "".join(f"{self.totals[stage].seconds * 1e3:>15.2f}" for stage in STAGES)
        experts = experts_line(self.summary())
        return "\n".join([head, *rows, total, *([experts] if experts else [])])

    def chrome_events(self) -> Iterable[dict[str, Any]]:
        """The spans in the Trace Event Format, microseconds, one row per stage."""
        for row, stage in enumerate(STAGES):
            yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": stage}}
        for span in self.recent():
            yield {
                "ph": "X", "name": span.unit, "cat": span.stage, "pid": 1, "tid": STAGES.index(span.stage),
                "ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6,
                "args": {"bytes": span.nbytes, "sweep": span.sweep},
            }  # fmt: skip
        for seconds, asked, hits in list(self._routed):
            yield {"ph": "C", "name": "experts", "pid": 1, "ts": seconds * 1e6,
                   "args": {"cached": hits, "moved": asked - hits}}  # fmt: skip
        for sample in self.memory:
            yield {"ph": "C", "name": "device memory", "pid": 1, "ts": sample.seconds * 1e6,
                   "args": {name: value for name, value in sample._asdict().items() if name != "seconds"}}  # fmt: skip

    def to_chrome(self, path: str | Path) -> Path:
        """Write a JSON file that Perfetto and ``chrome://tracing`` open; returns its path."""
        path = Path(path)
        path.write_text(json.dumps({"traceEvents": list(self.chrome_events())}), encoding="utf-8")
        return path


def _copied(changing: deque[T]) -> list[T]:
    """A list of what another thread appends to."""
    while True:
        try:
            return list(changing)
        except RuntimeError:  # it grew meanwhile
            continue


def prediction(seconds: float, bound_by: str | None = None) -> str:
    """``"predicted 0.71 s a token (link-bound)"``"""
    return f"predicted {format_seconds(seconds)} a token" + (f" ({bound_by}-bound)" if bound_by else "")


def speed_line(summary: Mapping[str, Any]) -> str:
    """``"predicted 0.71 s a token (link-bound), achieved 0.74 s (96%)"``, as far as :meth:`Trace.summary` knows it."""
    predicted, achieved = summary["predicted_sweep_seconds"], summary["sweep_seconds"]
    if not predicted:
        return f"{format_seconds(achieved)} a token" if achieved else "no sweep finished"
    text = prediction(predicted, summary["bound_by"])
    return f"{text}, achieved {format_seconds(achieved)} ({predicted / achieved:.0%})" if achieved else text


def result_parts(result: Any) -> list[str]:
    """``["48 tokens", "12.3 tok/s", "predicted … a token"]`` of a generation's result."""
    tokens = f"{len(result.token_ids)} token{'s' * (len(result.token_ids) != 1)}"
    summary = result.trace.summary()
    parts = [tokens, f"{result.tokens_per_second:.3g} tok/s", speed_line(summary), experts_line(summary)]
    return [part for part in parts if part]


def stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """``("read", "1.204 s in 80 reads, 3.22 GB at 2.7 GB/s")`` for each stage of a summary that had anything to do."""
    rows = []
    for stage, total in stages.items():
        speed = f" at {total['gb_per_second']:.1f} GB/s" if total["gb_per_second"] else ""
        moved = f", {total['bytes'] / 1e9:.3g} GB{speed}" if total["bytes"] else ""
        if total["count"]:
            rows.append((stage, f"{total['seconds']:.3f} s in {total['count']:,} {COUNTED[stage]}{moved}"))
    return rows
