"""Where figures are drawn: a white sheet of :data:`WIDTH` pixels, laid out by hand in pixels, without pyplot.

Layout by hand, since matplotlib's own takes longer than the drawing.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from PIL import Image, PngImagePlugin

from ..errors import OptionError

# ---- colours and hatches: Okabe–Ito's, told apart by colour-blind people, in print and on a dark page
#
# A colour never says anything alone: each comes with a hatch of its own, or with a label beside it. In the lanes of a
# sweep the colour is the tier that the bytes come from, the hatch is what happens to them.

BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
INK, MUTED, FAINT, PAPER = "#222222", "#555555", "#D4D4D4", "#FFFFFF"


class Look(NamedTuple):
    """How an area is filled; the hatch is drawn in the colour of the edge."""

    face: str
    edge: str
    hatch: str = ""


_RISING, _FALLING = "////", "\\\\\\\\"
_DARK = {
    ORANGE: "#7A5200", SKY: "#0B5C8A", GREEN: "#005C43", PURPLE: "#7A2F55", YELLOW: "#857B00", VERMILLION: "#7A3600",
}  # fmt: skip

TIERS = {
    "gpu": Look(GREEN, _DARK[GREEN]),
    "ram": Look(SKY, _DARK[SKY], _FALLING),
    "disk": Look(ORANGE, _DARK[ORANGE], _RISING),
}
TIER_NAMES = {"gpu": "GPU", "ram": "RAM", "disk": "disk"}

LANES = {
    "read": Look(ORANGE, _DARK[ORANGE], _RISING),
    "copy": Look(SKY, _DARK[SKY], _FALLING),
    "dequantise": Look(PURPLE, _DARK[PURPLE], "xxxx"),
    "compute": Look(BLUE, BLUE),
}
LANE_NAMES = {
    "read": "disk read",
    "copy": "host to device",
    "dequantise": "dequantise",
    "compute": "compute",
    "wait": "compute waits",
}
WAITS = {
    "read": Look(VERMILLION, _DARK[VERMILLION], _RISING),
    "copy": Look("#F3BE9B", _DARK[VERMILLION], _FALLING),
    "host": Look(FAINT, MUTED),
}
WAIT_NAMES = {"read": "waits for a read", "copy": "waits for a copy", "host": "idle otherwise"}

PARTS = {
    "weights": TIERS["gpu"],
    "slots": Look(SKY, _DARK[SKY], _FALLING),
    "idle slots": Look("#E3F2FB", _DARK[SKY]),
    "experts": Look(VERMILLION, _DARK[VERMILLION], "oo"),
    "staging": Look("#F3BE9B", _DARK[VERMILLION], "++"),
    "kv cache": Look(PURPLE, _DARK[PURPLE], "xxxx"),
    "activations": Look(YELLOW, _DARK[YELLOW], "...."),
    "scratch": Look(ORANGE, _DARK[ORANGE], "----"),
    "unused": Look("#F4F4F4", "#BBBBBB", "//"),
    "others": Look("#DDDDDD", "#AAAAAA", ".."),
    "free": Look(PAPER, MUTED),
    "process": Look(BLUE, BLUE),
}


def moved(stage: str, tier: str | None) -> Look:
    """A read or a copy of a unit that lives in ``tier``."""
    lane, home = LANES[stage], TIERS.get(tier or "", LANES[stage])
    return Look(home.face, home.edge, lane.hatch)


# ---- the sheet

WIDTH, DPI = 900, 100
TINY, SMALL, NORMAL, LARGE = 8.5, 9.5, 10.5, 12.0  # points; half as wide they are still read
# A picture of few colours is a third as large when saved with as many as it needs.
COLOURS = 48
# What a user may have set otherwise, in a style sheet for instance.
STYLE = {
    "font.family": ["DejaVu Sans"], "font.size": NORMAL, "text.color": INK, "text.usetex": False,
    "text.hinting": "none",  # twice as fast, and no worse at twice the size
    "hatch.linewidth": 0.7, "path.simplify": True, "svg.fonttype": "path", "svg.hashsalt": "airllm_nb",
    "savefig.facecolor": "auto", "savefig.edgecolor": "auto", "savefig.bbox": None, "savefig.transparent": False,
    "axes.facecolor": PAPER, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.grid": False,
    "axes.linewidth": 0.8, "axes.axisbelow": True, "axes.unicode_minus": True, "axes.xmargin": 0, "axes.ymargin": 0,
    "axes.formatter.useoffset": False, "axes.spines.left": True, "axes.spines.bottom": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.labelsize": SMALL,
    "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
    "xtick.direction": "out", "ytick.direction": "out", "xtick.minor.visible": False, "ytick.minor.visible": False,
    "figure.facecolor": PAPER, "figure.edgecolor": PAPER, "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}  # fmt: skip


class Picture(NamedTuple):
    """A figure, and what it shows as text with the numbers."""

    figure: Figure
    alt: str

    def png(self, scale: float = 2) -> bytes:
        """The picture as PNG, ``scale`` times :data:`WIDTH` pixels wide."""
        canvas = FigureCanvasAgg(self.figure)
        self.figure.set_dpi(DPI * scale)
        try:
            with matplotlib.rc_context(STYLE):
                canvas.draw()
            image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        finally:
            self.figure.set_dpi(DPI)
            FigureCanvasAgg(self.figure)  # a picture that is kept shall not keep its pixels, 8 MB of them
        about, into = PngImagePlugin.PngInfo(), io.BytesIO()
        about.add_itxt("Description", self.alt)
        few = image.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        palette, white = few.getpalette() or [], 3 * int(np.asarray(few)[0, 0])
        few.putpalette([*palette[:white], 255, 255, 255, *palette[white + 3 :]])  # what the average missed by a little
        few.save(into, "png", pnginfo=about, compress_level=6)
        return into.getvalue()

    def save(self, path: str | FilePath) -> FilePath:
        """Write a ``.png`` or ``.svg`` file; returns its path."""
        path = FilePath(path)
        if path.suffix.lower() not in (".png", ".svg"):
            raise OptionError(f"{path.name!r} is no picture's name; end it with .png or .svg")
        if path.suffix.lower() == ".png":
            path.write_bytes(self.png())
        else:
            with matplotlib.rc_context(STYLE):
                self.figure.savefig(path, format="svg", metadata={"Date": None, "Description": self.alt})
        return path


def sheet(height: float, figure: Figure | None = None) -> Figure:
    """An empty white figure of ``height`` pixels; ``figure`` is cleared for it where there is one."""
    if figure is None:
        figure = Figure(dpi=DPI)
        FigureCanvasAgg(figure)
    for axes in list(figure.axes):  # Figure.clear() would first draw up each of them again, empty
        figure.delaxes(axes)
    figure.clear()
    figure.set_size_inches(WIDTH / DPI, height / DPI)
    figure.set_facecolor(PAPER)
    return figure


def panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels, counted from the upper left corner."""
    full = figure.get_size_inches()[1] * DPI
    return figure.add_axes((left / WIDTH, 1 - (top + height) / full, width / WIDTH, height / full))


def write(figure: Figure, left: float, top: float, text: str, **options: Any) -> None:
    """Text whose upper left corner (or what ``ha`` and ``va`` say) is at a place in pixels."""
    full = figure.get_size_inches()[1] * DPI
    figure.text(left / WIDTH, 1 - top / full, text, **{"va": "top", "fontsize": NORMAL, "color": INK} | options)


def ticks(axis: Any, most: int) -> None:
    """At most ``most`` round numbers along an axis."""
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))


def bare(axes: Axes) -> None:
    """Nothing to the left: rows have names, not numbers."""
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_visible(False)


def fill(axes: Axes, boxes: Iterable[tuple[float, float, float, float]], look: Look, label: str = "") -> PathPatch:
    """Many boxes ``(x0, x1, y0, y1)`` as one artist: a hundred times faster than one each.

    Not snapped to pixels, so that thin boxes keep their share of the area.
    """
    corners = np.array(list(boxes), dtype=float).reshape(-1, 4)
    vertices = corners[:, [0, 2, 1, 2, 1, 3, 0, 3, 0, 2]].reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(corners))
    patch = PathPatch(
        Path(vertices, codes), facecolor=look.face, edgecolor=look.edge, hatch=look.hatch or None, linewidth=0,
        label=label, snap=False,
    )  # fmt: skip
    axes.add_artist(patch)  # add_patch() would look at every corner for the limits, which are set anyway
    return patch


class Entry(NamedTuple):
    """A line of a legend."""

    look: Look
    text: str


def key(figure: Figure, left: float, top: float, entries: Sequence[Entry]) -> None:
    """A legend from a place in pixels on: matplotlib's own takes longer to draw than everything else."""
    full = figure.get_size_inches()[1] * DPI
    for (look, text), (x, y) in zip(entries, _places(entries, left), strict=True):
        figure.add_artist(Rectangle(
            (x / WIDTH, 1 - (top + y + 13) / full), 22 / WIDTH, 12 / full, transform=figure.transFigure, linewidth=0.8,
            facecolor=look.face, edgecolor=look.edge, hatch=look.hatch or None,
        ))  # fmt: skip
        write(figure, x + 29, top + y, text, fontsize=SMALL)


def key_height(entries: Sequence[Entry], left: float) -> float:
    """Pixels from the top of a legend to the end of its last row."""
    return max([y + 21 for _, y in _places(entries, left)], default=0.0)


def _places(entries: Sequence[Entry], left: float) -> Iterator[tuple[float, float]]:
    x, y = left, 0.0
    for _, text in entries:
        width = 29 + text_width(text)
        if x > left and x + width > WIDTH - 14:
            x, y = left, y + 21
        yield x, y
        x += width + 20


@functools.lru_cache(maxsize=2048)
def text_width(text: str, size: float = SMALL) -> float:
    """Pixels that a line of text takes."""
    font = get_font(findfont(FontProperties(family=STYLE["font.family"])))
    font.set_size(size, DPI)
    font.set_text(text, 0.0)
    return float(font.get_width_height()[0]) / 64


def wrapped(text: str, width: float, size: float = NORMAL) -> list[str]:
    """Lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def nothing(text: str, figure: Figure | None = None) -> Picture:
    """A small sheet that says why it is empty."""
    with matplotlib.rc_context(STYLE):
        figure = sheet(80, figure)
        write(figure, WIDTH / 2, 40, text, ha="center", va="center", color=MUTED)
    return Picture(figure, text)
