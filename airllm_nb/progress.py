"""Reports of long work, and how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from .config import format_bytes


class Progress(NamedTuple):
    """One report of long work (download, conversion, load).

    ``done`` and ``total`` are in ``unit`` (``"bytes"`` or a plural noun); ``total`` is 0 when unknown.
    """

    stage: str
    done: int
    total: int
    unit: str = "bytes"
    detail: str = ""

    @property
    def what(self) -> str:
        """``"download org/name"``"""
        return f"{self.stage} {self.detail}".strip()

    @property
    def amount(self) -> str:
        """``"1.2 GiB of 4.0 GiB"``; empty where there is one thing alone to be done."""
        if self.unit != "bytes" and self.total <= 1:
            return ""
        text = format_bytes if self.unit == "bytes" else "{:,.0f}".format
        return text(self.done) + (f" of {text(self.total)}" if self.total else "")


class Meter:
    """How fast long work goes: counted from the first report of a stage, so that earlier attempts do not flatter it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._stage = clock, ("", 0)
        self._first = self._last = self._since = 0.0

    def see(self, progress: Progress) -> bool:
        """Take a report in; whether a stage begins with it: of another name or total, or less is done than before."""
        stage, last = (progress.stage, progress.total), self._last
        self._last, is_new = progress.done, stage != self._stage or progress.done < last
        if is_new:
            self._stage, self._first, self._since = stage, progress.done, self._clock()
        return is_new

    def speed(self, progress: Progress) -> tuple[float, float | None] | None:
        """Bytes a second, and the seconds left where the total is known; ``None`` while there is nothing to say."""
        moved, seconds = progress.done - self._first, self._clock() - self._since
        if progress.unit != "bytes" or moved <= 0 or seconds <= 0.5:
            return None
        return moved / seconds, (progress.total - progress.done) * seconds / moved if progress.total else None


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A progress callback that shows nothing."""
