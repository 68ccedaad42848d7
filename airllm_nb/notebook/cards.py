"""Facts as a small table that reads as text and as HTML, in notebooks without widgets too."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import format_bytes
from ..flags import in_flags
from ..routed import expert_table, expert_use, experts_line
from ..timeline import last_sweep, verdict
from ..trace import Trace, speed_line, stage_rows

if TYPE_CHECKING:
    from ..bench import BenchResult
    from ..engine.facade import StreamedModel
    from .registry import Entry


class Card:
    """A title and rows of a label and a value, as text/plain and text/html.

    ``details`` is a label and a long text that HTML folds away, and plain text leaves out.
    """

    def __init__(self, title: str, rows: Sequence[tuple[str, str]], details: tuple[str, str] | None = None):
        self.title, self.rows, self.details = title, list(rows), details

    def __repr__(self) -> str:
        width = max([len(label) for label, _ in self.rows] + [0])
        indent = "\n" + " " * (width + 4)
        lines = [f"  {label:<{width}}  {value}".replace("\n", indent) for label, value in self.rows]
        return "\n".join([self.title, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(label)}</th>'
            f'<td style="text-align:left;white-space:pre-wrap">{html.escape(value)}</td></tr>'
            for label, value in self.rows
        )
        table = f'<table><caption style="text-align:left"><b>{html.escape(self.title)}</b></caption>{rows}</table>'
        if self.details is None:
            return table
        label, text = self.details
        return f"{table}<details><summary>{html.escape(label)}</summary><pre>{html.escape(text)}</pre></details>"


class Line:
    """One line of text that stays apart from streamed text, so that the answer can be copied alone."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<small>{html.escape(self.text)}</small>"


def model_card(name: str, model: StreamedModel) -> Card:
    """What a model is, where its weights are and how fast it will be."""
    status, plan = model.status(), model.plan
    unpacked = status["unpacked_bytes"]
    weights = sum(tier["bytes"] for tier in status["plan"]["tiers"].values()) + status["plan"]["small_bytes"]
    size = [format_bytes(weights), status["compression"] or "not compressed"]
    if not status["compression"]:
        size.insert(0, f"{count(model.num_parameters())} parameters")
    rows = [
        ("model", f"{status['name']} ({', '.join(size)})"),
        ("runs on", f"{status['device']}, {status['dtype']}"),
        *([("chosen", status["chosen"])] if status["chosen"] else []),
        *([("adapter", status["adapter"])] if status["adapter"] else []),
        *([("left on disk", status["left_on_disk"])] if status["left_on_disk"] else []),
        *([("unpacked", f"{format_bytes(unpacked)} of RAM keep the packed matrices unpacked")] if unpacked else []),
        *plan.rows,
    ]
    return Card(f"{status['name']} is loaded as {name!r}", rows, _units(plan))


def plan_card(model: str, plan: Any) -> Card:
    """What would go where, and whether there is room for it."""
    return Card(f"{model}: the plan", [(label, in_flags(text)) for label, text in plan.rows], _units(plan))


def _units(plan: Any) -> tuple[str, str]:
    return f"where each of the {len(plan.units)} units is", plan.table()


def status_card(entries: Sequence[Entry]) -> Card:
    """Loaded models with budgets, tiers and last speed."""
    rows = []
    for entry in entries:
        status = entry.model.status()
        what = [status["name"], status["device"], status["dtype"], status["compression"] or "not compressed"]
        state = "generating" if status["busy"] else "ready"
        rows.append((entry.name, f"{', '.join(what)}: {state}\n{entry.model.plan}\n{_last(status['last'])}"))
    return Card(f"{len(rows)} model{'s' * (len(rows) != 1)} loaded; the last is the default", rows)


def _last(summary: dict[str, Any]) -> str:
    if not summary["sweeps"]:
        return "last      nothing generated yet"
    experts = experts_line(summary)
    return f"last      {summary['tokens']} tokens, {speed_line(summary)}" + (f"; {experts}" if experts else "")


def trace_card(trace: Trace, title: str = "") -> Card:
    """Totals of each stage of one generation, and what bounded its last sweep."""
    summary = trace.summary()
    rows = [("speed", f"{summary['tokens']} tokens in {summary['sweeps']} sweeps, {speed_line(summary)}")]
    use = expert_use(trace.experts, trace.sweeps)
    title = title or "the last generation, stage by stage (stages overlap)"
    return Card(title, [*rows, *_trace_rows(trace)], ("experts, by layer", expert_table(use)) if use else None)


def generation_card(trace: Trace, words: str) -> Card:
    """Where the time of a generation went, with its picture in words."""
    return Card("where the time went (stages overlap)", _trace_rows(trace), ("the picture in words", words))


def _trace_rows(trace: Trace) -> list[tuple[str, str]]:
    summary, view = trace.summary(), last_sweep(trace)
    rows = stage_rows(summary["stages"])
    if experts := experts_line(summary):
        rows.append(("experts", experts))
    if summary["peak_device_bytes"]:
        budget = f" of {format_bytes(trace.plan['vram_budget'])}" if trace.of_device else ""
        rows.append(("peak", format_bytes(summary["peak_device_bytes"]) + budget))
    return [*rows, ("verdict", verdict(view, trace.plan))] if view else rows


def bench_card(result: BenchResult) -> Card:
    """How fast a model runs."""
    return Card(result.title, result.rows)


def count(number: float) -> str:
    """``1.5 B``, ``135 M``"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"
