"""One generation in a cell: text as it comes, a line while nothing comes, a partial answer when it is interrupted."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from ..trace import speed_line
from .progress_line import ProgressLine
from .registry import Entry

if TYPE_CHECKING:
    from ..engine import StreamedModel

POLL = 0.1
# Seconds without text before the line appears.
PATIENCE = 2.0
# A model this slow gets the line at once: one that appears later would cut the text in two.
SLOW_SWEEP = 1.0


def generate(entry: Entry, generation: Any, line: ProgressLine) -> Any:
    """Stream a generation to the cell; main thread only.

    Returns
    -------
    GenerationResult or None
        Also of an interrupted generation. ``None`` where a second interrupt left it to end by itself.
    """
    entry.unfinished = generation
    waiting, shown = Waiting(entry.model), 0
    try:
        try:
            while True:
                shown += _step(generation, line, waiting)
        except StopIteration:
            pass
        except KeyboardInterrupt:
            # In a terminal the line would be drawn over the last line of the answer.
            if line.in_place or not shown:
                line.show("stopping after the unit that runs …")
            _end(generation)
    except KeyboardInterrupt:
        line.clear()
        return None
    finally:
        if generation.result is not None:
            entry.unfinished = None
        else:
            generation.stop()
    line.clear()
    text = generation.result.text
    # Closing brings what was held back: the bytes of a character that an interrupt cut.
    _write(text[shown:] + "\n" * bool(text and not text.endswith("\n")))
    return generation.result


def _end(generation: Any) -> None:
    """Stop it and take what it still brings."""
    generation.stop()
    try:
        while True:
            generation.poll(POLL)
    except StopIteration:
        pass


def _step(generation: Any, line: ProgressLine, waiting: Waiting) -> int:
    """Wait a moment; returns how many characters came."""
    chunk = generation.poll(POLL)
    if chunk is None:
        if text := waiting.text(line.in_place):
            line.show(text)
        return 0
    waiting.got(chunk.tokens, bool(chunk.text))
    if chunk.text:
        line.clear()
        _write(chunk.text)
    return len(chunk.text)


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


class Waiting:
    """What to say while nothing comes."""

    def __init__(self, model: StreamedModel, clock: Any = time.monotonic):
        self._model, self._clock = model, clock
        self._predicted = model.plan.sweep_seconds
        self._tokens, self._any_text, self._since = 0, False, clock()

    def got(self, tokens: int, has_text: bool) -> None:
        """Tokens arrived."""
        self._tokens, self._any_text, self._since = tokens, self._any_text or has_text, self._clock()

    def text(self, in_place: bool) -> str:
        """The line; empty while patience lasts, and where it would be drawn over the answer's own line."""
        seconds = self._clock() - self._since
        at_once = in_place and not self._any_text and self._predicted > SLOW_SWEEP
        if (seconds < PATIENCE and not at_once) or (self._any_text and not in_place):
            return ""
        unit, units = self._model.position
        parts = [f"token {self._tokens + 1}" if self._tokens else "reading the prompt", f"unit {unit} of {units}"]
        parts.append(f"{seconds:.0f} s of about {self._predicted:.2g} s")
        parts.append("stop with the interrupt button" if in_place else "stop with Ctrl-C")
        return " · ".join(parts)


def summary_line(result: Any) -> str:
    """``"48 tokens · 12.3 tok/s · predicted 0.08 s a token (link-bound), achieved 0.09 s (89%) · ended by itself"``"""
    ends = {"end": "ended by itself", "length": "ended by the length (-n)", "user": "stopped by you"}
    tokens = len(result.token_ids)
    parts = [f"{tokens} token{'s' * (tokens != 1)}", f"{result.tokens_per_second:.3g} tok/s",
             speed_line(result.trace.summary()), ends.get(result.stopped_by, result.stopped_by)]  # fmt: skip
    if result.stopped_by == "user":
        parts = [f"stopped by you after {parts[0]}", *parts[1:-1]]
    return " · ".join(parts)
