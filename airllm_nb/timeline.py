"""What one sweep looked like, computed from a :class:`~airllm_nb.trace.Trace` that may still be written.

Seconds are those of the trace. On a GPU the host runs ahead, and its own waits say little: where the time went shows in
the idle time of the compute lane. Resident units of a GPU are not timed, so their time counts as idle too.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .trace import Span, Trace

LANES = ("read", "copy", "dequantise", "compute", "wait")
CAUSES = ("read", "copy", "host")
# The resource that a lane keeps busy, and what it does; dequantisation is part of computing.
RESOURCES = {"read": "disk", "copy": "link", "compute": "compute"}
DOING = {"read": "reading", "copy": "copying", "compute": "computing"}
# Marks of one device agree to this many seconds.
TOLERANCE = 1e-6

Interval = tuple[float, float]


@dataclass(frozen=True)
class SweepView:
    """One sweep, or a part of it.

    Attributes
    ----------
    start, end
        Seconds since the trace began.
    running
        The sweep is not over: this is the part so far.
    lanes
        Spans of each stage that has any, in the order of :data:`LANES`, clipped to ``start`` … ``end``.
    gaps
        The idle time of the compute lane: ``stage`` is what it was for, ``"read"``, ``"copy"`` or ``"host"`` (anything
        else), ``unit`` the unit that came next.
    busy, nbytes
        Seconds in which a lane did something, and the bytes that it moved.
    tiers
        ``"gpu"``, ``"ram"`` or ``"disk"`` of each unit by name.
    """

    start: float
    end: float
    running: bool
    lanes: Mapping[str, tuple[Span, ...]]
    gaps: tuple[Span, ...]
    busy: Mapping[str, float]
    nbytes: Mapping[str, int]
    tiers: Mapping[str, str]

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def streams(self) -> bool:
        """Whether any weights moved."""
        return "read" in self.lanes or "copy" in self.lanes

    @property
    def waited(self) -> dict[str, float]:
        """Idle seconds of the compute lane by what they were for."""
        waited = dict.fromkeys(CAUSES, 0.0)
        for gap in self.gaps:
            waited[gap.stage] += gap.end - gap.start
        return waited

    @property
    def busiest(self) -> str | None:
        """The lane that bounds the sweep: ``"read"``, ``"copy"`` or ``"compute"``; ``None`` where none is known."""
        return max((lane for lane in RESOURCES if lane in self.busy), key=lambda lane: self.busy[lane], default=None)

    @property
    def bound_by(self) -> str:
        """``"disk"``, ``"link"`` or ``"compute"``."""
        return RESOURCES[self.busiest or "compute"]

    @property
    def efficiency(self) -> float:
        """What the busiest lane needs by itself over what the sweep took; 0 where no lane is known."""
        return self.busy[self.busiest] / self.seconds if self.busiest and self.seconds else 0.0


def last_sweep(trace: Trace) -> SweepView | None:
    """The last finished sweep; while the first one runs, that one as far as it is recorded.

    ``None`` before anything is recorded. Spans count by their time: they are added late, after their sweep.
    """
    window, spans = trace.last_window, trace.recent()
    if window is not None:
        return _view(window, False, spans, trace.tiers)
    start = trace.began
    end = max((span.end for span in spans), default=start)
    return _view((start, end), True, spans, trace.tiers) if end > start else None


def zoom(view: SweepView, units: int = 12) -> SweepView:
    """A close-up of ``units`` units that follow each other, from the middle of the sweep."""
    spans = view.lanes.get("compute") or view.lanes.get("copy") or view.lanes.get("read") or ()
    if len(spans) <= units:
        return view
    first = (len(spans) - units) // 2
    # The gap before the first unit is its own: that is where the unit was waited for.
    start = spans[first - 1].end if first else view.start
    start, end = min(start, spans[first].start), spans[first + units - 1].end
    lanes = {stage: tuple(_clipped(spans, start, end)) for stage, spans in view.lanes.items()}
    return _measured((start, end), view.running, lanes, tuple(_clipped(view.gaps, start, end)), view.tiers)


def _view(window: Interval, running: bool, spans: Iterable[Span], tiers: Mapping[str, str]) -> SweepView:
    lanes: dict[str, list[Span]] = {stage: [] for stage in LANES}
    for span in _clipped(spans, *window):
        lanes[span[0]].append(span)
    found = {stage: tuple(sorted(spans, key=lambda span: span[2:4])) for stage, spans in lanes.items() if spans}
    return _measured(window, running, found, tuple(_gaps(window, running, found)), dict(tiers))


def _measured(
    window: Interval,
    running: bool,
    lanes: Mapping[str, tuple[Span, ...]],
    gaps: tuple[Span, ...],
    tiers: Mapping[str, str],
) -> SweepView:
    lanes = {stage: spans for stage, spans in lanes.items() if spans}
    busy = {stage: sum(end - start for start, end in union(spans)) for stage, spans in lanes.items()}
    nbytes = {stage: sum(span.nbytes for span in spans) for stage, spans in lanes.items()}
    return SweepView(*window, running, lanes, gaps, busy, nbytes, tiers)


def _clipped(spans: Iterable[Span], start: float, end: float) -> Iterator[Span]:
    """What lies within; of a span that is cut, the bytes in proportion."""
    for span in spans:
        _, _, first, last, nbytes, _ = span
        if first >= end or last <= start:
            continue
        if first < start or last > end:
            share = (min(last, end) - max(first, start)) / (last - first)
            span = span._replace(start=max(first, start), end=min(last, end), nbytes=round(nbytes * share))
        yield span


def union(spans: Sequence[Span]) -> list[Interval]:
    """Times in which any of the spans is under way; ``spans`` in the order of their starts."""
    merged: list[Interval] = []
    for span in spans:
        first, last = span[2], span[3]
        if merged and first <= merged[-1][1]:
            if last > merged[-1][1]:
                merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


# ---- what compute waited for


def _gaps(window: Interval, running: bool, lanes: Mapping[str, tuple[Span, ...]]) -> Iterator[Span]:
    moving = {stage: union(lanes.get(stage, ())) for stage in ("read", "copy")}
    arrivals = {stage: _ends(lanes.get(stage, ())) for stage in moving}
    cursor = window[0]
    for span in lanes.get("compute", ()):
        if span.start > cursor:
            arrived = {stage: _last(arrivals[stage].get(span.unit, ()), span.start) for stage in moving}
            yield from _causes(cursor, span, arrived, moving)
        cursor = max(cursor, span.end)
    # What the next unit of a sweep that still runs waits for is not recorded yet.
    if "compute" in lanes and not running and window[1] > cursor:
        yield Span("host", "", cursor, window[1], 0, lanes["compute"][-1].sweep)


def _ends(spans: Iterable[Span]) -> dict[str, list[float]]:
    ends: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        ends[span.unit].append(span.end)
    return ends


def _last(ends: Sequence[float], until: float) -> float:
    at = bisect_right(ends, until + TOLERANCE)
    return ends[at - 1] if at else 0.0


def _causes(
    start: float, wanted: Span, arrived: Mapping[str, float], moving: Mapping[str, list[Interval]]
) -> Iterator[Span]:
    """Cut the gap before ``wanted`` where its read and its copy were over."""
    for stage in ("read", "copy"):
        end = min(arrived[stage], wanted.start)
        if end > start:
            for first, last, covered in _covered(moving[stage], start, end):
                yield Span(stage if covered else "host", wanted.unit, first, last, 0, wanted.sweep)
            start = end
    if wanted.start > start:
        yield Span("host", wanted.unit, start, wanted.start, 0, wanted.sweep)


def _covered(intervals: list[Interval], start: float, end: float) -> Iterator[tuple[float, float, bool]]:
    at = max(bisect_left(intervals, (start, start)) - 1, 0)
    for first, last in itertools.islice(intervals, at, None):
        if first >= end:
            break
        if last <= start:
            continue
        if first > start:
            yield start, first, False
        start = max(start, first)
        yield start, min(last, end), True
        start = min(last, end)
    if start < end:
        yield start, end, False


# ---- in words

_NAMES = {"disk": "the disk", "link": "the link", "compute": "computing"}
_WAITS = {"read": "reads", "copy": "copies"}


def verdict(view: SweepView, plan: Mapping[str, Any] | None = None) -> str:
    """What bounds the sweep, how well the lanes overlap, and what would help, in two or three sentences.

    Parameters
    ----------
    view
        A sweep.
    plan
        :attr:`Trace.plan <airllm_nb.trace.Trace.plan>`; without it no remedy is named.
    """
    so_far = "So far: " if view.running else ""
    if not view.streams:
        return f"{so_far}Nothing streams: compute-bound."
    return " ".join([f"{so_far}{_bound(view)}", *_remedies(view, plan or {})])


def _bound(view: SweepView) -> str:
    lanes = [lane for lane in DOING if lane in view.busy]
    doing, resource, efficiency = _listed([DOING[lane] for lane in lanes]), _NAMES[view.bound_by], view.efficiency
    shares = {cause: seconds / view.seconds for cause, seconds in view.waited.items()}
    reasons = [f"{shares[cause]:.0%} {{}}for {name}" for cause, name in _WAITS.items() if shares[cause] >= 0.005]
    waits = _listed([text.format("" if at else "of the sweep waits ") for at, text in enumerate(reasons)])
    spans = itertools.chain.from_iterable(view.lanes[lane] for lane in lanes)
    together = sum(end - start for start, end in union(sorted(spans, key=lambda span: span[2:4])))
    if len(lanes) > 1 and efficiency < 0.85 and sum(view.busy[lane] for lane in lanes) < 1.1 * together:
        told = f"{doing} take turns: " + (f"{waits}, and " if waits else "")
        return f"{_upper(told)}{resource} alone would need {efficiency:.0%} of the time."
    if efficiency < 0.7 and shares["host"] > 0.3:
        return (f"Nothing is busy all the time: for {shares['host']:.0%} of the sweep compute stands still while no "
                f"weights that it needs are moving. {_upper(resource)} is the busiest, with "
                f"{efficiency:.0%}.")  # fmt: skip
    told = f"{view.bound_by}-bound: {waits}." if waits else f"{view.bound_by}-bound."
    allows = f"{_upper(doing)} overlap to {efficiency:.0%} of what {resource} allows."
    return f"{_upper(told)} {allows}" if len(lanes) > 1 else _upper(told)


def _remedies(view: SweepView, plan: Mapping[str, Any]) -> Iterator[str]:
    read, copied = ({span.unit for span in view.lanes.get(stage, ())} for stage in ("read", "copy"))
    again = {unit for unit in read if view.tiers.get(unit) == "disk"}
    kept = {unit for unit in read if view.tiers.get(unit) == "ram"}
    if kept:
        yield f"{_units(kept)} of those read {'stay' if len(kept) > 1 else 'stays'} in RAM."
    if not plan:
        return
    if view.bound_by == "disk" and again:
        yield f"A larger --ram would keep {_some(again)} from disk each time."
    elif view.bound_by == "link" and copied and plan.get("vram_budget"):
        yield f"A larger --vram would keep {_some(copied, 'cross')} the link each time."


def _some(units: Collection[str], verb: str = "come") -> str:
    if len(units) == 1:
        return f"the one unit that {verb}{'es' if verb.endswith('s') else 's'}"
    return f"some of the {len(units)} units that {verb}"


def _units(units: Collection[str]) -> str:
    return f"{len(units)} unit{'s' * (len(units) != 1)}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), *words[-1:]] if len(words) > 1 else words)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
