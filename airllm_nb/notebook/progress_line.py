"""One line that says how far long work is, and goes away: in a notebook, in a terminal, or nowhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from IPython.display import display

from ..config import format_bytes
from ..progress import Meter, Progress
from .environment import output_of

# Redraws a second are bounded: a front end falls behind otherwise.
INTERVAL = 0.25


class Sink:
    """Where the line is drawn: here nowhere, and only what remains is shown."""

    def draw(self, text: str) -> None: ...

    def erase(self) -> None:
        self.draw("")

    def replace(self, shown: Any) -> None:
        """Leave ``shown`` where the line was."""
        self.erase()
        display(shown)


class KernelSink(Sink):
    """A display that is updated in place."""

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, text: str) -> None:
        self._put({"text/plain": text}, raw=True)

    def replace(self, shown: Any) -> None:
        self._put(shown)

    def _put(self, shown: Any, **how: Any) -> None:
        if self._handle is None:
            self._handle = display(shown, display_id=True, **how)
        else:
            self._handle.update(shown, **how)


class TerminalSink(Sink):
    """A line that is written over itself, cut to the width of the terminal."""

    def draw(self, text: str) -> None:
        import shutil

        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write(f"\r\x1b[K{text[:width]}")
        sys.stdout.flush()


class ProgressLine:
    """Draws at most four times a second; main thread only.

    Parameters
    ----------
    sink
        Where.
    clock
        Monotonic seconds.
    """

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.monotonic):
        self._sink, self._clock = sink, clock
        self._shown, self._next = "", 0.0

    @property
    def in_place(self) -> bool:
        """Whether the line keeps its place when other output follows it."""
        return isinstance(self._sink, KernelSink)

    def show(self, text: str) -> None:
        """Draw ``text`` unless the last drawing was just now."""
        if text == self._shown or self._clock() < self._next:
            return
        self._sink.draw(text)
        self._shown, self._next = text, self._clock() + INTERVAL

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._sink.erase()
            self._shown, self._next = "", 0.0

    def replace(self, shown: Any) -> None:
        """Put ``shown`` in the line's place, to stay."""
        self._sink.replace(shown)
        self._shown = ""


def progress_line(shell: Any, dashboard: str = "bar") -> ProgressLine:
    """The line that fits where this cell's output goes; ``dashboard="none"`` shows no progress at all."""
    where = "captured" if dashboard == "none" else output_of(shell)
    sinks: dict[str, type[Sink]] = {"kernel": KernelSink, "terminal": TerminalSink, "captured": Sink}
    return ProgressLine(sinks[where]())


def progress_text(meter: Meter, progress: Progress | None) -> str:
    """``"download · ███░░░░░░░ · 1.2 GiB of 4.0 GiB · 95.0 MiB/s · 0:30 left"``"""
    if progress is None:
        return "loading …"
    meter.see(progress)
    rate, left = meter.speed(progress) or (None, None)
    unit = "" if progress.unit == "bytes" or not progress.amount else f" {progress.unit}"
    parts = [progress.what, drawn_bar(progress.done / progress.total) if progress.total > 1 else ""]
    parts.append(progress.amount + unit)
    parts.append(f"{format_bytes(rate)}/s" if rate else "")
    parts.append(f"{clock_time(left)} left" if left is not None else "")
    return " · ".join(filter(None, parts))


def drawn_bar(share: float, width: int = 20) -> str:
    """``"███░░░░░░░"``"""
    full = round(min(max(share, 0.0), 1.0) * width)
    return "█" * full + "░" * (width - full)


def clock_time(seconds: float) -> str:
    """Seconds as ``"1:05"`` or ``"2:01:05"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
