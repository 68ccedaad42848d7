"""Pictures of a sweep: what disk, link and compute did at the same time."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..config import format_seconds
from ..timeline import SweepView, union, verdict, zoom
from ..trace import Span
from . import canvas
from .canvas import Entry, Look, Picture

LEFT, RIGHT, ROW = 122, 132, 27
PLOT = canvas.WIDTH - LEFT - RIGHT
# Bars of one lane in one colour: about five pixels each.
MOST_BARS = 120
NO_SWEEP = "No sweep is recorded yet."


class Bar(NamedTuple):
    """A piece of a lane as it is drawn."""

    start: float
    end: float
    look: Look


class Lane(NamedTuple):
    """One row: its name, what it did, its share of the sweep, and bytes a second where bytes moved."""

    name: str
    bars: list[Bar]
    share: float
    rate: float


def overlap(
    view: SweepView | None, title: str = "", plan: Mapping[str, Any] | None = None, figure: Figure | None = None
) -> Picture:
    """What disk, link and compute did in one sweep, all of it and a few units in its middle.

    Parameters
    ----------
    view
        See :func:`~airllm_nb.timeline.last_sweep`.
    title
        Above the picture.
    plan
        :attr:`Trace.plan <airllm_nb.trace.Trace.plan>`, for the remedy in the text below.
    figure
        Of an earlier picture: it is cleared and drawn on, which is faster.
    """
    if view is None or not view.lanes:
        return canvas.nothing(NO_SWEEP if view is None else verdict(view, plan), figure)
    close, rows = zoom(view), lanes(view)
    text = canvas.wrapped(verdict(view, plan), canvas.WIDTH - 28)
    entries, has_close = _legend(view), close is not view and "compute" in close.lanes
    top, tall = 51 + (canvas.key_height(entries, LEFT) or -7), ROW * len(rows)
    below = top + tall + (65 + tall + 40 if has_close else 0) + 52
    with matplotlib.rc_context(canvas.STYLE):
        figure = canvas.sheet(below + 34 + 19 * len(text), figure)
        canvas.write(figure, 14, 12, title or "One sweep", fontsize=canvas.LARGE, weight="bold")
        canvas.write(figure, canvas.WIDTH - 14, 13, _headline(view), ha="right")
        canvas.key(figure, LEFT, 44, entries)
        scale = _scale(view.seconds)
        axes = canvas.panel(figure, LEFT, top, PLOT, tall)
        _draw(axes, view, rows, view.start, scale)
        if has_close:
            _mark(axes, view, close, scale)
            top += tall + 65
            canvas.write(
                figure, LEFT, top - 22, f"{len(close.lanes['compute'])} units from the middle", color=canvas.MUTED
            )
            axes = canvas.panel(figure, LEFT, top, PLOT, tall + 40)
            _draw(axes, close, lanes(close), view.start, scale, units=True)
        _time_label(axes, scale)
        name = "Overlap efficiency" if view.streams else "Computing"
        canvas.write(
            figure, 14, below, f"{name} {view.efficiency:.0%}", fontsize=canvas.LARGE, weight="bold", color=canvas.BLUE
        )
        for at, line in enumerate(text):
            canvas.write(figure, 14, below + 25 + 19 * at, line)
    return Picture(figure, overlap_text(view, title, plan))


def compare(views: Sequence[SweepView | None], titles: Sequence[str]) -> Picture:
    """Runs one above the other, on one scale of seconds since their sweep began."""
    runs = [(view, title) for view, title in zip(views, titles, strict=True) if view is not None and view.lanes]
    if not runs:
        return canvas.nothing(NO_SWEEP)
    rows = [lanes(view) for view, _ in runs]
    longest = max(view.seconds for view, _ in runs)
    entries = list(dict.fromkeys(entry for view, _ in runs for entry in _legend(view)))
    scale, top = _scale(longest), 23 + canvas.key_height(entries, LEFT)
    tall = [22.0 * len(row) for row in rows]
    with matplotlib.rc_context(canvas.STYLE):
        figure = canvas.sheet(top + sum(tall) + 58 * len(runs) + 22)
        canvas.key(figure, LEFT, 12, entries)
        for (view, title), row, height in zip(runs, rows, tall, strict=True):
            canvas.write(figure, 14, top, title, weight="bold")
            canvas.write(figure, canvas.WIDTH - 14, top, _headline(view), ha="right")
            axes = canvas.panel(figure, LEFT, top + 24, PLOT, height)
            _draw(axes, view, row, view.start, scale, length=longest)
            top += height + 58
        _time_label(axes, scale)
    texts = [overlap_text(view, title) for view, title in runs]
    return Picture(figure, "\n".join(texts))


def overlap_text(view: SweepView, title: str = "", plan: Mapping[str, Any] | None = None) -> str:
    """The alt text of :func:`overlap`."""
    parts = [f"{lane.name} {lane.share:.0%}" + (f" at {_rate(lane.rate)}" if lane.rate else "") for lane in lanes(view)]
    head = f"{title}: " if title else ""
    return f"{head}{_headline(view)}. Share of the sweep: {', '.join(parts)}. {verdict(view, plan)}"


def lanes(view: SweepView) -> list[Lane]:
    """The rows of a picture, from top to bottom; those that do not exist are left out."""
    window, rows = (view.start, view.end), []
    for stage, spans in view.lanes.items():
        if stage == "wait":  # the host's; what compute waited for is in the gaps
            continue
        rate = view.nbytes[stage] / view.busy[stage] if view.busy[stage] else 0.0
        bars = thin(spans, window, _looks(stage, view.tiers))
        rows.append(Lane(canvas.LANE_NAMES[stage], bars, view.busy[stage] / view.seconds, rate))
    if view.streams and "compute" in view.lanes:
        bars = thin(view.gaps, window, lambda gap: canvas.WAITS[gap.stage])
        rows.append(Lane(canvas.LANE_NAMES["wait"], bars, sum(view.waited.values()) / view.seconds, 0.0))
    return rows


def thin(
    spans: Sequence[Span], window: tuple[float, float], look: Callable[[Span], Look], most: int = MOST_BARS
) -> list[Bar]:
    """The bars of one lane: where there are more than ``most`` spans, neighbours of one look are added up.

    Each look keeps its total: what is drawn of it is as long as what it took.
    """
    if len(spans) <= most:
        return [Bar(span.start, span.end, look(span)) for span in spans]
    width = (window[1] - window[0]) / most
    bars: list[Bar] = []
    for _, near in itertools.groupby(spans, key=lambda span: int((span.start - window[0]) / width)):
        looks: dict[Look, list[Span]] = defaultdict(list)
        for span in near:
            looks[look(span)].append(span)
        for name, members in looks.items():
            start = max(members[0].start, bars[-1].end if bars else window[0])
            bars.append(Bar(start, start + sum(last - first for first, last in union(members)), name))
    return bars


def _looks(stage: str, tiers: Mapping[str, str]) -> Callable[[Span], Look]:
    if stage not in ("read", "copy"):
        return lambda span: canvas.LANES[stage]
    looks = {tier: canvas.moved(stage, tier) for tier in (None, *canvas.TIERS)}
    return lambda span: looks[tiers.get(span.unit)]


def _legend(view: SweepView) -> list[Entry]:
    """What the colours say that the names of the rows do not."""
    entries = []
    for stage, text, tiers in (("copy", "from {}", ("disk", "ram")), ("read", "read, then kept in {}", ("ram",))):
        moving = {view.tiers.get(span.unit) for span in view.lanes.get(stage, ())}
        entries += [
            Entry(canvas.moved(stage, tier), text.format(canvas.TIER_NAMES[tier])) for tier in tiers if tier in moving
        ]
    if view.streams:
        waited = view.waited
        entries += [Entry(canvas.WAITS[cause], name) for cause, name in canvas.WAIT_NAMES.items()
                    if waited[cause] >= 0.005 * view.seconds]  # fmt: skip
    return entries


def _headline(view: SweepView) -> str:
    so_far = " so far" if view.running else " a sweep"
    overlapped = f", overlap {view.efficiency:.0%}" if view.streams else ""
    # Where nothing is busy most of the time, nothing bounds the sweep.
    bound = f", {view.bound_by}-bound" if view.efficiency >= 0.7 or not view.streams else ""
    return f"{format_seconds(view.seconds)}{so_far}{overlapped}{bound}"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.3g} MB/s"


# ---- axes


def _scale(seconds: float) -> tuple[float, str]:
    return (1.0, "seconds") if seconds >= 1 else (1e3, "milliseconds")


def _time_label(axes: Axes, scale: tuple[float, str]) -> None:
    axes.set_xlabel(f"{scale[1]} since the sweep began", labelpad=3)


def _draw(
    axes: Axes,
    view: SweepView,
    rows: Sequence[Lane],
    origin: float,
    scale: tuple[float, str],
    units: bool = False,
    length: float | None = None,
) -> None:
    factor, count = scale[0], len(rows)
    end = view.start + (length or view.seconds)
    axes.set_xlim((view.start - origin) * factor, (end - origin) * factor)
    axes.set_ylim(count + (1.45 if units else 0), 0)
    canvas.bare(axes)
    canvas.ticks(axes.xaxis, 6)
    axes.grid(axis="x", color=canvas.FAINT, linewidth=0.6)
    for at, lane in enumerate(rows):
        looks: dict[Look, list[Bar]] = defaultdict(list)
        for bar in lane.bars:
            looks[bar.look].append(bar)
        for look, bars in looks.items():
            boxes = [((bar.start - origin) * factor, (bar.end - origin) * factor, at + 0.14, at + 0.86) for bar in bars]
            canvas.fill(axes, boxes, look, lane.name)
        around = {
            "transform": axes.get_yaxis_transform(),
            "va": "center",
            "fontsize": canvas.SMALL,
            "color": canvas.INK,
        }
        axes.text(-0.012, at + 0.5, lane.name, ha="right", **around)
        rate = f"  {_rate(lane.rate)}" if lane.rate else ""
        axes.text(1.012, at + 0.5, f"{lane.share:.0%}{rate}", ha="left", **around)
    if units:
        _name_units(axes, view, count, origin, factor)


def _mark(axes: Axes, view: SweepView, close: SweepView, scale: tuple[float, str]) -> None:
    """Where the close-up is in the whole sweep."""
    start, end = ((moment - view.start) * scale[0] for moment in (close.start, close.end))
    axes.axvspan(start, end, facecolor="none", edgecolor=canvas.INK, linewidth=1.2, zorder=3)


def _name_units(axes: Axes, view: SweepView, row: int, origin: float, factor: float) -> None:
    """A row of the units that compute, from the wait for each to its end, in the colour of its tier."""
    spans = view.lanes["compute"]
    starts = [view.start, *(span.end for span in spans[:-1])]
    blocks: dict[Look, list[tuple[float, float, float, float]]] = defaultdict(list)
    for span, start, name in zip(spans, starts, _short([span.unit for span in spans]), strict=True):
        look = canvas.TIERS.get(view.tiers.get(span.unit, ""), canvas.LANES["compute"])
        blocks[look].append(((start - origin) * factor, (span.end - origin) * factor, row + 0.2, row + 1.4))
        width = max(canvas.text_width(line, canvas.TINY) for line in name.split("\n"))
        if width + 4 <= (span.end - start) / view.seconds * PLOT:
            middle = (start + span.end) / 2
            axes.text((middle - origin) * factor, row + 0.8, name, ha="center", va="center", fontsize=canvas.TINY,
                      linespacing=1.15)  # fmt: skip
    for look, boxes in blocks.items():
        canvas.fill(axes, boxes, look._replace(hatch=""), "unit").set(alpha=0.3, linewidth=0.8)
    axes.text(-0.012, row + 0.8, "unit", transform=axes.get_yaxis_transform(), ha="right", va="center",
              fontsize=canvas.SMALL)  # fmt: skip


def _short(names: Sequence[str]) -> Iterator[str]:
    """What tells the units apart: the number of the layer, and below it the last part of the name."""
    for name in names:
        parts = name.split(".")
        number = next((part for part in parts if part.isdigit()), "")
        last = parts[-1] if parts[-1] != number else ""
        yield f"{number}\n{last}" if number and last else number or last
