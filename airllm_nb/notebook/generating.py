"""One generation in a cell: shown as it comes, and a partial answer when it is stopped or interrupted."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from ..routed import experts_line
from ..trace import result_parts
from .progress_line import ProgressLine
from .registry import Entry

if TYPE_CHECKING:
    from ..engine.facade import StreamedModel

POLL = 0.1
# Seconds without text before the line appears.
PATIENCE = 2.0
# A model this slow gets the line at once: one that appears later would cut the text in two.
SLOW_SWEEP = 1.0


class View(Protocol):
    """What shows a generation; all of it is called in the cell's thread."""

    def begin(self) -> None:
        """It is about to start."""

    def got(self, chunk: Any) -> None:
        """Text or tokens arrived."""

    def waited(self) -> None:
        """A moment passed without any."""

    def stopping(self) -> None:
        """It was asked to end, and will."""

    def end(self, result: Any) -> None:
        """It is over; ``result`` is ``None`` where it failed, or was left to end by itself."""


def generate(entry: Entry, generation: Any, view: View) -> Any:
    """Stream a generation to the cell; main thread only.

    Returns
    -------
    GenerationResult or None
        Also of an interrupted generation. ``None`` where a second interrupt left it to end by itself.
    """
    entry.unfinished = generation
    try:
        view.begin()
        try:
            while True:
                chunk = generation.poll(POLL)
                view.waited() if chunk is None else view.got(chunk)
        except StopIteration:
            pass
        except KeyboardInterrupt:
            view.stopping()
            _end(generation)
    except KeyboardInterrupt:
        view.end(None)
        return None
    except BaseException as error:
        try:
            view.end(None)
        except Exception as another:
            raise error from another
        raise
    finally:
        if generation.result is not None:
            entry.unfinished = None
        else:
            generation.stop()
    with contextlib.suppress(KeyboardInterrupt):  # it is over: an interrupt now would only lose the answer
        view.end(generation.result)
    return generation.result


def _end(generation: Any) -> None:
    """Stop it and take what it still brings."""
    generation.stop()
    try:
        while True:
            generation.poll(POLL)
    except StopIteration:
        pass


class TextView:
    """The text as plain output, and a line while nothing comes."""

    def __init__(self, model: StreamedModel, line: ProgressLine):
        self._line, self._waiting, self._shown = line, Waiting(model), 0

    def begin(self) -> None: ...

    def got(self, chunk: Any) -> None:
        self._waiting.got(chunk.tokens, bool(chunk.text))
        if chunk.text:
            self._line.clear()
            _write(chunk.text)
            self._shown += len(chunk.text)

    def waited(self) -> None:
        if text := self._waiting.text(self._line.in_place):
            self._line.show(text)

    def stopping(self) -> None:
        # In a terminal the line would be drawn over the last line of the answer.
        if self._line.in_place or not self._shown:
            self._line.show("stopping after the unit that runs …")

    def end(self, result: Any) -> None:
        self._line.clear()
        if result is not None:
            text = result.text
            # Closing brings what was held back: the bytes of a character that an interrupt cut.
            _write(text[self._shown :] + "\n" * bool(text and not text.endswith("\n")))


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
        if experts := experts_line(self._model.trace.summary()):
            parts.append(experts)
        parts.append(f"{seconds:.0f} s of about {self._predicted:.2g} s")
        parts.append("stop with the interrupt button" if in_place else "stop with Ctrl-C")
        return " · ".join(parts)


def summary_line(result: Any) -> str:
    """``"48 tokens · 12.3 tok/s · predicted 0.08 s a token (link-bound), achieved 0.09 s (89%) · ended by itself"``"""
    tokens, *rest = result_parts(result)
    by_user = result.stopped_by == "user"
    return " · ".join([f"stopped by you after {tokens}", *rest] if by_user else [tokens, *rest, result.ended])
