"""Pictures of memory: where a plan puts everything, and what device memory was used for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..config import format_bytes, format_seconds
from ..trace import MemorySample, Trace, prediction
from . import canvas
from .canvas import Entry, Picture

PART_NAMES = {
    "weights": "resident weights",
    "slots": "slots in use",
    "idle slots": "slots, idle",
    "experts": "experts, cached",
    "staging": "staging of experts",
    "kv cache": "KV cache",
    "activations": "activations, scratch",
    "unused": "reserved, not used",
    "others": "other programs",
    "process": "this process",
}
MOST_SAMPLES = 500
IN_PLACE = {"gpu": "", "ram": ", computed where it lies", "disk": ", read in each sweep"}


# ---- the plan


def plan_bar(plan: Any, figure: Figure | None = None) -> Picture:
    """The units of a model by tier, and what the VRAM budget is for.

    Parameters
    ----------
    plan
        A :class:`~airllm_nb.plan.residency.ResidencyPlan`.
    figure
        Of an earlier picture: it is cleared and drawn on.
    """
    device, tiers = plan.machine.has_device, [tier for tier in canvas.TIERS if tier in plan.tiers]
    with matplotlib.rc_context(canvas.STYLE):
        parts = _budget_entries(plan) if device else []
        figure = canvas.sheet(267 + canvas.key_height(parts, 14) if device else 158, figure)
        canvas.write(figure, 14, 12, f"Weights: {_tier_total(plan)} in {len(plan.units)} units", weight="bold")
        axes = canvas.panel(figure, 14, 40, canvas.WIDTH - 28, 34)
        factor, unit = _bytes_axis(axes, sum(one.nbytes for one in plan.units))
        _draw_units(axes, plan, tiers, factor)
        axes.set_xlabel(unit, labelpad=1)
        entries = [Entry(canvas.TIERS[tier], _tier_text(plan, tier)) for tier in tiers]
        canvas.key(figure, 14, 124, entries)
        if device:
            _draw_budget(figure, plan)
            canvas.key(figure, 14, 258, parts)
        expected = prediction(plan.sweep_seconds, plan.bound_by)
        canvas.write(figure, canvas.WIDTH - 14, 12, expected, ha="right")
    return Picture(figure, plan_text(plan))


def plan_text(plan: Any) -> str:
    """The alt text of :func:`plan_bar`."""
    tiers = ", ".join(_tier_text(plan, tier) for tier in canvas.TIERS if tier in plan.tiers)
    text = f"Weights {_tier_total(plan)} in {len(plan.units)} units: {tiers}."
    if plan.machine.has_device:
        parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in budget_parts(plan).items())
        text += f" VRAM {format_bytes(plan.device_bytes)} of {format_bytes(plan.vram_budget)}: {parts}."
    expected = prediction(plan.sweep_seconds, plan.bound_by)
    return f"{text} {expected[:1].upper()}{expected[1:]}."


def budget_parts(plan: Any) -> dict[str, int]:
    """Bytes of the VRAM budget by what they are for, ``"free"`` at the end."""
    needs = plan.needs
    experts = {"experts": plan.slots_bytes, "staging": plan.staging_bytes} if plan.staging_bytes else {}
    return {
        "weights": plan.tier_bytes("gpu") + needs.small,
        **experts,
        "slots": plan.arena_bytes,
        "KV cache": needs.kv_cache,
        "activations": needs.activations,
        "scratch": needs.scratch,
        "free": max(plan.vram_budget - plan.device_bytes, 0),
    }


def _tier_total(plan: Any) -> str:
    return format_bytes(sum(unit.nbytes for unit in plan.units))


def _tier_text(plan: Any, tier: str) -> str:
    count = plan.tiers.count(tier)
    meaning = "" if plan.machine.has_device else IN_PLACE[tier]
    units = f"{count} unit{'s' * (count != 1)}"
    return f"{canvas.TIER_NAMES[tier]} {format_bytes(plan.tier_bytes(tier))} ({units}{meaning})"


def _draw_units(axes: Axes, plan: Any, tiers: Sequence[str], factor: float) -> None:
    """One block a unit, grouped by tier; between them a line as long as they are wide enough."""
    at, edges = 0.0, []
    for tier in tiers:
        boxes = []
        for unit, where in zip(plan.units, plan.tiers, strict=True):
            if where == tier:
                boxes.append((at, at + unit.nbytes * factor, 0.0, 1.0))
                at += unit.nbytes * factor
                edges.append(at)
        canvas.fill(axes, boxes, canvas.TIERS[tier], tier)
    axes.set_xlim(0, at or 1)
    wide = (canvas.WIDTH - 28) / max(len(edges), 1)
    axes.vlines(edges[:-1], 0, 1, color="white", linewidth=min(1.2, wide / 8))


def _draw_budget(figure: Figure, plan: Any) -> None:
    used, budget = format_bytes(plan.device_bytes), format_bytes(plan.vram_budget)
    canvas.write(figure, 14, 158, f"VRAM: {used} of {budget}", weight="bold")
    axes = canvas.panel(figure, 14, 184, canvas.WIDTH - 28, 26)
    factor, unit = _bytes_axis(axes, plan.vram_budget)
    at = 0.0
    for name, nbytes in budget_parts(plan).items():
        if nbytes:
            canvas.fill(axes, [(at, at + nbytes * factor, 0.0, 1.0)], canvas.PARTS[name.lower()], name)
        at += nbytes * factor
    axes.set_xlim(0, at or 1)
    axes.set_xlabel(unit, labelpad=1)


def _budget_entries(plan: Any) -> list[Entry]:
    parts = budget_parts(plan).items()
    return [Entry(canvas.PARTS[name.lower()], f"{name} {format_bytes(nbytes)}") for name, nbytes in parts if nbytes]


def _bytes_axis(axes: Axes, largest: float) -> tuple[float, str]:
    """Makes it a bar with bytes below; returns what bytes are multiplied by, and the name of the unit."""
    factor, unit = _scale(largest)
    axes.set_ylim(0, 1)
    canvas.bare(axes)
    canvas.ticks(axes.xaxis, 9)
    return factor, unit


def _scale(largest: float) -> tuple[float, str]:
    power = 3 if largest >= 1000 << 20 else 2 if largest >= 1 << 20 else 1
    return 1 / (1 << 10 * power), ("KiB", "MiB", "GiB")[power - 1]


# ---- memory against time


def vram_timeline(trace: Trace, figure: Figure | None = None) -> Picture:
    """Device memory against time, by what it is used for; on a CPU the resident set of the process.

    Parameters
    ----------
    trace
        May still be written by another thread.
    figure
        Of an earlier picture: it is cleared and drawn on, which is faster.
    """
    samples, plan = sorted(list(trace.memory), key=lambda sample: sample.seconds), trace.plan
    if not samples:
        return canvas.nothing("No memory samples yet.", figure)
    device = trace.of_device
    parts = [memory_parts(sample, plan) if device else {"process": sample.allocated} for sample in samples]
    budget = plan.get("vram_budget") if device else None
    peak = max(samples, key=lambda sample: sample.reserved)
    shown = _every(samples, peak)
    names = [name for name in parts[0] if any(part[name] for part in parts)] or list(parts[0])[:1]
    with matplotlib.rc_context(canvas.STYLE):
        tall = 238 if device else 110
        figure = canvas.sheet(92 + tall, figure)
        title = "VRAM" if device else "Resident set of the process (no GPU memory)"
        canvas.write(figure, 14, 12, title, fontsize=canvas.LARGE, weight="bold")
        axes = canvas.panel(figure, 62, 44, 548, tall)
        top = max([peak.reserved + (peak.others if device else 0), budget or 0]
                  + [sum(part.values()) for part in parts])  # fmt: skip
        factor, unit = _scale(top)
        times = [samples[at].seconds for at in shown]
        _stack(axes, times, [[parts[at][name] * factor for at in shown] for name in names], names)
        axes.set_xlim(0, max(times[-1], 1e-3))
        axes.set_ylim(0, max(top * factor * 1.14, 1e-9))
        axes.set_ylabel(unit)
        axes.set_xlabel("seconds")
        canvas.ticks(axes.xaxis, 7)
        canvas.ticks(axes.yaxis, 6 if device else 3)
        if budget:
            axes.axhline(budget * factor, color=canvas.INK, linewidth=1.4, linestyle=(0, (5, 3)))
        _mark_peak(axes, peak, factor)
        _list_parts(figure, parts[-1], names, budget)
    return Picture(figure, memory_text(trace))


def memory_parts(sample: MemorySample, plan: Mapping[str, Any]) -> dict[str, int]:
    """What device memory is used for, in bytes, from the bottom up; without ``others`` it adds up to ``reserved``.

    ``activations`` is what is allocated for nothing else: scratch too, and whatever this process has besides.
    """
    allocated = left = max(min(sample.allocated, sample.reserved), 0)
    planned = {
        "weights": plan.get("tiers", {}).get("gpu", {}).get("bytes", 0) + plan.get("small_bytes", 0),
        "experts": plan.get("experts_bytes", 0),
        "staging": plan.get("staging_bytes", 0),
        "slots": sample.slots,
        "idle slots": plan.get("arena_bytes", 0) - sample.slots,
        "kv cache": sample.kv_cache,
    }
    parts = {}
    for name, nbytes in planned.items():
        parts[name] = max(min(nbytes, left), 0)
        left -= parts[name]
    return parts | {"activations": left, "unused": sample.reserved - allocated, "others": max(sample.others, 0)}


def memory_text(trace: Trace) -> str:
    """The alt text of :func:`vram_timeline`."""
    samples, plan = sorted(list(trace.memory), key=lambda sample: sample.seconds), trace.plan
    last, peak = samples[-1], max(samples, key=lambda sample: sample.reserved)
    at = f"at its peak {format_bytes(peak.reserved)} after {format_seconds(peak.seconds)}"
    if not trace.of_device:
        return (f"Resident set of the process over {format_seconds(last.seconds)}: now "
                f"{format_bytes(last.allocated)}, {at}. There is no GPU memory.")  # fmt: skip
    parts = ", ".join(f"{PART_NAMES[name]} {format_bytes(nbytes)}"
                      for name, nbytes in memory_parts(last, plan).items() if nbytes)  # fmt: skip
    budget = f" The budget is {format_bytes(plan['vram_budget'])}." if plan.get("vram_budget") else ""
    return (
        f"VRAM over {format_seconds(last.seconds)}: reserved {format_bytes(last.reserved)}, {at}. Now: {parts}.{budget}"
    )


def _every(samples: Sequence[MemorySample], peak: MemorySample) -> list[int]:
    """As many as can be told apart, the peak and the last among them."""
    step = -(-len(samples) // MOST_SAMPLES)
    return sorted({*range(0, len(samples), step), samples.index(peak), len(samples) - 1})


def _stack(axes: Axes, times: Sequence[float], layers: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    below = np.zeros(len(times))
    for name, layer in zip(names, layers, strict=True):
        above, look = below + np.array(layer), canvas.PARTS[name]
        axes.fill_between(
            times, below, above, facecolor=look.face, edgecolor=look.edge, hatch=look.hatch or None, linewidth=0.6,
            label=name,
        )  # fmt: skip
        below = above
    axes.grid(axis="y", color=canvas.FAINT, linewidth=0.6)


def _mark_peak(axes: Axes, peak: MemorySample, factor: float) -> None:
    height, right = peak.reserved * factor, axes.get_xlim()[1]
    axes.plot([peak.seconds], [height], marker="v", color=canvas.INK, markersize=7, clip_on=False, zorder=5)
    side = "left" if peak.seconds < right / 2 else "right"
    away = 9 if side == "left" else -9
    axes.annotate(
        f"peak {format_bytes(peak.reserved)}", (peak.seconds, height), xytext=(away, 7), textcoords="offset points",
        ha=side, va="center", fontsize=canvas.SMALL, zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )  # fmt: skip


def _list_parts(figure: Figure, now: Mapping[str, int], names: Sequence[str], budget: int | None) -> None:
    """The legend, in the order of the stack, with what each part takes now."""
    left, right, top = 634, canvas.WIDTH - 14, 46.0
    if budget:
        canvas.write(figure, left + 11, top + 6, "– –", weight="bold", ha="center", va="center")
        canvas.write(figure, left + 29, top, "budget", fontsize=canvas.SMALL)
        canvas.write(figure, right, top, format_bytes(budget), fontsize=canvas.SMALL, ha="right")
        top += 30
    canvas.write(figure, right, top, "now", fontsize=canvas.SMALL, color=canvas.MUTED, ha="right")
    for name in reversed(names):
        top += 21
        canvas.key(figure, left, top, [Entry(canvas.PARTS[name], PART_NAMES[name])])
        canvas.write(figure, right, top, format_bytes(now[name]), fontsize=canvas.SMALL, ha="right")
