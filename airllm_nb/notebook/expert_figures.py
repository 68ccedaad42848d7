"""A picture of a mixture: how often each expert of each layer was asked for, and which are cached now."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..routed import ExpertUse
from . import canvas
from .canvas import Entry, Look, Picture
from .live import layer_of

LEFT, RIGHT = 62, 62
PLOT = canvas.WIDTH - LEFT - RIGHT
# Pixels: of a row, of all rows, and what a row needs so that a number fits beside each.
TALLEST, MOST_TALL, LEAST_TALL, NUMBERED = 22.0, 480.0, 5.0, 12.0
# From never to most often; each is darker than the one before, so that they are told apart without colours.
SHADES = ("#FFFFFF", "#DCEBF7", "#B6D4EA", "#85B6DB", "#4F93C7", "#1F6CAE", "#08488A", "#022A5C")
CACHED = Look(canvas.ORANGE, "#7A5200")


def expert_map(use: ExpertUse, title: str = "", figure: Figure | None = None) -> Picture:
    """Layers × experts: the darker, the more forwards asked for one; a bar below it says that it is cached now.

    Parameters
    ----------
    use
        See :func:`~airllm_nb.routed.expert_use`.
    title
        Above the picture.
    figure
        Of an earlier picture: it is cleared and drawn on.
    """
    bins = _bins(use.top[2])
    entries = [Entry(Look(SHADES[at], canvas.MUTED), text) for at, text in enumerate(_names(bins))]
    if use.count_cached:
        entries.append(Entry(CACHED, "below it: cached now"))
    count = len(use.layers)
    row = min(TALLEST, max(LEAST_TALL, MOST_TALL / count))
    top = 51 + canvas.key_height(entries, LEFT)
    with matplotlib.rc_context(canvas.STYLE):
        figure = canvas.sheet(top + row * count + 52, figure)
        canvas.write(figure, 14, 12, title or "Experts", fontsize=canvas.LARGE, weight="bold")
        canvas.write(figure, canvas.WIDTH - 14, 13, _headline(use), ha="right")
        canvas.key(figure, LEFT, 44, entries)
        axes = canvas.panel(figure, LEFT, top, PLOT, row * count)
        _draw(axes, use, bins, row)
    return Picture(figure, expert_text(use, title))


def expert_text(use: ExpertUse, title: str = "") -> str:
    """The alt text of :func:`expert_map`."""
    head = f"{title}: " if title else ""
    layer, expert, times = use.top
    text = (f"{head}{len(use.layers)} layers of experts, up to {use.most} each, {_headline(use)}. Most often: expert "
            f"{expert} of {use.layers[layer]}, in {times:,} of {use.sweeps:,} sweeps.")  # fmt: skip
    never = sum(count == 0 for asked in use.asked for count in asked)
    every = sum(map(len, use.asked))
    text += f" {never:,} of {every:,} were never asked for."
    return text if use.count_cached is None else f"{text} {use.count_cached:,} are cached now."


def _headline(use: ExpertUse) -> str:
    return f"asked for {use.total:,} times, {use.share:.0%} were cached"


def _bins(most: int) -> list[int]:
    """Where a darker shade begins: 1, then ever wider apart, as most experts are asked for much less than the first."""
    shades = len(SHADES) - 1
    return sorted({max(math.ceil(most * (at / shades) ** 2), 1) for at in range(shades)})


def _names(bins: Sequence[int]) -> list[str]:
    ends = [after - 1 for after in bins[1:]]
    spans = [f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in zip(bins, ends, strict=False)]
    return ["never", *spans, f"{bins[-1]:,} times or more"]


def _draw(axes: Axes, use: ExpertUse, bins: Sequence[int], row: float) -> None:
    count, most = len(use.layers), use.most
    shades = np.full((count, most), -1)
    for at, asked in enumerate(use.asked):
        shades[at, : len(asked)] = np.searchsorted(bins, asked, side="right")
    axes.pcolormesh(
        np.arange(most + 1) - 0.5, np.arange(count + 1), np.ma.masked_less(shades, 0), cmap=ListedColormap(SHADES),
        vmin=-0.5, vmax=len(SHADES) - 0.5, antialiased=False,
    )  # fmt: skip
    boxes = [
        (expert - 0.4, expert + 0.4, at + 0.68, at + 0.96)
        for at, cached in enumerate(use.cached) for expert in sorted(cached or ())
    ]  # fmt: skip
    if boxes:
        canvas.fill(axes, boxes, CACHED, "cached")
    axes.set_xlim(-0.5, most - 0.5)
    axes.set_ylim(count, 0)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    step = max(1, round(NUMBERED / row + 0.49))
    numbers = [layer_of(name) - 1 if layer_of(name) else at for at, name in enumerate(use.layers)]
    axes.set_yticks([at + 0.5 for at in range(0, count, step)], [str(numbers[at]) for at in range(0, count, step)])
    beside = axes.get_yaxis_transform()
    for at in range(0, count, step):
        total = sum(use.asked[at])
        if total:
            axes.text(1.008, at + 0.5, f"{use.hits[at] / total:.0%}", transform=beside, va="center",
                      fontsize=canvas.TINY, color=canvas.INK)  # fmt: skip
    axes.text(1.008, 1.01, "hits", transform=axes.transAxes, va="bottom", fontsize=canvas.TINY, color=canvas.MUTED)
