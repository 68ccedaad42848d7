"""The live view of one generation: where it is, a Stop button, two pictures, the text; static once it is over.

Widgets while the cell runs, because only they can be clicked; when it ends, also by an error, what is left in the
notebook is Markdown, PNG and a table, which every viewer shows.
"""

from __future__ import annotations

import base64
import html
import logging
import time
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from ..timeline import last_sweep
from ..trace import Trace
from . import memory_figures, sweep_figures
from .cards import Line
from .generating import summary_line
from .live import Facts, facts
from .markdown import safe_markdown
from .pictures import Still
from .pump import pump_widget_events

log = logging.getLogger(__name__)

# Seconds between two updates of text and of pictures at least, and the part of the time that each may take.
TEXT_EVERY, TEXT_SHARE, PICTURE_EVERY, PICTURE_SHARE = 0.25, 0.02, 1.0, 0.02
WIDTH = "900px"
# A generation that is over before that is not worth a live picture.
FIRST_PICTURE = 0.5
STOP_HINT = "Stop the generation after the unit that runs; the notebook's interrupt button does the same"


class Throttle:
    """Says when the next drawing is due.

    Parameters
    ----------
    every
        Seconds between two at least.
    share
        Part of the time that drawing may take: it holds the interpreter, which compute needs too.
    first
        Seconds until the first.
    clock
        Monotonic seconds.
    cost
        Seconds that this thread has computed; waiting for others costs nobody anything.
    """

    def __init__(
        self, every: float, share: float = 1.0, first: float = 0.0, clock: Callable[[], float] = time.monotonic,
        cost: Callable[[], float] = time.thread_time,
    ):  # fmt: skip
        self._every, self._share, self._clock, self._cost = every, share, clock, cost
        self._next = clock() + first

    def run(self, draw: Callable[[], object]) -> bool:
        """Call ``draw`` if it is due; whether it was."""
        start = self._clock()
        if start < self._next:
            return False
        before = self._cost()
        draw()
        self._next = start + max(self._every, (self._cost() - before) / self._share)
        return True


class Dashboard:
    """Shows one generation; implements :class:`~airllm_nb.notebook.generating.View`.

    Parameters
    ----------
    model, generation
        What runs.
    clock
        Monotonic seconds.
    """

    def __init__(self, model: Any, generation: Any, clock: Callable[[], float] = time.monotonic):
        self._model, self._generation, self._clock = model, generation, clock
        # Until this generation has begun, the model's trace is that of the one before.
        self._before = model.trace
        self._tokens, self._parts, self._start = 0, [], clock()  # type: int, list[str], float
        self._text_due = Throttle(TEXT_EVERY, TEXT_SHARE, clock=clock)
        self._pictures_due = Throttle(PICTURE_EVERY, PICTURE_SHARE, FIRST_PICTURE, clock)
        self._drawn: dict[str, Any] = {}
        self._places: list[Any] = []
        self._all: list[Any] = []
        self._shown, self._stopped = 0, False

    # --- a generation's view

    def begin(self) -> None:
        """Three places below each other: progress and Stop, the text, the pictures."""
        self._start = self._clock()
        self._build()
        for shown in (view_of(self._bar, "generating …"), {"text/plain": ""}, view_of(self._pictures, "")):
            self._places.append(display(shown, raw=True, display_id=True))

    def got(self, chunk: Any) -> None:
        self._tokens = chunk.tokens
        if chunk.text:
            self._parts.append(chunk.text)
        self.waited()

    def waited(self) -> None:
        if self._stopped:
            self._stop.disabled, self._stop.description = True, "Stopping …"
        self._text_due.run(self._refresh)
        self._pictures_due.run(self._draw)
        pump_widget_events()

    def stopping(self) -> None:
        self._stopped = True
        self.waited()

    def end(self, result: Any) -> None:
        """Leave a line, the answer and the picture of the last sweep, and nothing that lives."""
        text, trace = (result.text, result.trace) if result else ("".join(self._parts), self._trace)
        static = [(Line(summary_line(result) if result else "no result"), {}), (_answer(text), {"raw": True})]
        try:
            for place, (shown, how) in zip(self._places, static, strict=False):
                place.update(shown, **how)
            if len(self._places) > len(static):
                self._leave_pictures(trace)
        finally:
            for widget in self._all:
                close(widget)
            self._drawn.clear()

    def _leave_pictures(self, trace: Trace) -> None:
        data, metadata = {"text/plain": ""}, {}  # type: dict[str, Any], dict[str, Any]
        try:
            if still := Still.of(trace, self._model.name):
                data, metadata = still.bundle()
            memory = Still.of_memory(trace)
        except (Exception, KeyboardInterrupt):  # no picture is worth an answer
            log.debug("no picture of this generation", exc_info=True)
            memory = None
        self._places[-1].update(data, metadata=metadata, raw=True)
        if memory:
            display(memory)

    # --- drawing

    def _build(self) -> None:
        htmls = self._all = [widgets.HTML() for _ in range(4)]
        self._header, self._progress, self._vram, self._overlap = htmls
        self._stop = widgets.Button(description="Stop", icon="stop", tooltip=STOP_HINT)
        self._stop.layout.width, self._stop.layout.flex, self._progress.layout.flex = "110px", "0 0 auto", "1 1 auto"
        self._stop.on_click(self._clicked)
        row = widgets.HBox([self._progress, self._stop], layout={"align_items": "center"})
        self._bar = widgets.VBox([self._header, row], layout={"max_width": WIDTH})
        self._pictures = widgets.VBox([self._overlap, self._vram], layout={"max_width": WIDTH})
        names = {"dashboard": self._bar, "stop": self._stop, "pictures": self._pictures, "vram": self._vram,
                 "overlap": self._overlap}  # fmt: skip
        for name, widget in names.items():
            widget.add_class(f"airllm-{name}")
        self._all = [*htmls, self._stop, row, self._bar, self._pictures]
        self._refresh()

    def _clicked(self, _: Any) -> None:
        # On some kernels in a thread of its own: the cell's thread draws.
        self._stopped = True
        self._generation.stop()

    @property
    def _trace(self) -> Trace:
        return Trace() if self._model.trace is self._before else self._model.trace

    def _refresh(self) -> None:
        limit = self._generation.limit or 0
        now = facts(self._model, self._trace, self._tokens, limit, self._clock() - self._start)
        self._header.value = header_html(now, self._stopped)
        self._progress.value = progress_html(now)
        if len(self._parts) > self._shown:
            self._shown, text = len(self._parts), "".join(self._parts)
            shown = f'<div class="airllm-text" style="white-space:pre-wrap">{html.escape(text)}</div>'
            self._places[1].update({"text/plain": text, "text/html": shown}, raw=True)

    def _draw(self) -> None:
        try:
            self._draw_pictures()
        except Exception:  # no picture is worth a generation
            log.debug("this generation goes on without pictures", exc_info=True)
            self._pictures_due = Throttle(float("inf"), first=float("inf"))

    def _draw_pictures(self) -> None:
        trace = self._trace
        # An interrupt in the middle leaves a figure half drawn: it is not used again.
        vram, overlap = self._drawn.pop("vram", None), self._drawn.pop("overlap", None)
        if trace.memory:
            self._show(self._vram, "vram", memory_figures.vram_timeline(trace, figure=vram))
        if (view := last_sweep(trace)) is not None:
            self._show(self._overlap, "overlap", sweep_figures.overlap(view, plan=trace.plan, figure=overlap))

    def _show(self, widget: Any, name: str, picture: Any) -> None:
        widget.value = image_html(picture.png(), picture.alt)
        self._drawn[name] = picture.figure


def header_html(now: Facts, stopped: bool = False) -> str:
    """What runs, and where it is: two lines, so that nothing below them jumps."""
    where = "stopping after the unit that runs …" if stopped else now.where
    lines = f"<b>{html.escape(now.title)}</b><br>{html.escape(where)}"
    return f'<div class="airllm-header" style="line-height:1.4">{lines}</div>'


def progress_html(now: Facts) -> str:
    """The bar and the numbers."""
    what = html.escape(now.this_sweep if now.is_slow else now.where)
    return (
        f'<progress class="airllm-sweep" style="width:100%;height:14px" max="100" value="{now.share * 100:.0f}" '
        f'aria-label="{what}" title="{what}"></progress>'
        f'<div class="airllm-numbers" style="line-height:1.4">{html.escape(now.numbers)}</div>'
    )


def _answer(text: str) -> dict[str, Any]:
    return {"text/plain": text} | ({"text/markdown": safe_markdown(text)} if text else {})


def image_html(png: bytes, alt: str) -> str:
    """A picture that screen readers can read; for widgets, whose HTML is not sanitised as an output's is."""
    data = base64.b64encode(png).decode()
    style = "width:100%;height:auto;background:#fff;border-radius:4px"
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" style="{style}">'


def view_of(widget: Any, text: str) -> dict[str, Any]:
    """What shows a widget, ``text`` elsewhere; to be sent raw: ``display(widget, display_id=True)`` drops the id with
    ipywidgets 7."""
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"text/plain": text, "application/vnd.jupyter.widget-view+json": view}


def close(widget: Any) -> None:
    """Free a widget with its layout and style, which are widgets of their own and would stay for ever.

    Programs that execute notebooks save the last state of closed widgets too: pictures are emptied first.
    """
    if isinstance(widget, widgets.HTML):
        widget.value = ""
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if part is not None:
            part.close()
