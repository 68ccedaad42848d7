"""A generation as records: text and tokens as they come, and one result at the end."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import GenerationStopped
from ..trace import Trace
from .loop import End, start


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of the answer.

    Attributes
    ----------
    text
        New text; empty while a character is not complete.
    token_ids
        The new tokens.
    seconds
        Since the generation began.
    tokens
        How many tokens there are so far.
    """

    text: str
    token_ids: tuple[int, ...]
    seconds: float
    tokens: int


_ENDS = {
    "end": "ended by itself", "length": "ended by the length (-n)", "context": "ended because the context is full",
    "user": "stopped by you",
}  # fmt: skip


@dataclass(frozen=True)
class GenerationResult:
    """A finished, or stopped, generation.

    Attributes
    ----------
    prompt, text
        What went in (after the chat template, if any) and the answer alone.
    token_ids
        The answer's tokens.
    prompt_tokens
        Length of the prompt.
    stopped_by
        ``"end"`` (the model's own end, or a stop string), ``"length"`` (as many tokens as were asked for),
        ``"context"`` (there was room for no more) or ``"user"``.
    seconds
        From call to end.
    trace
        What happened meanwhile.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stopped_by: str
    seconds: float
    trace: Trace = field(repr=False)

    @property
    def ended(self) -> str:
        """Why it ended, in words."""
        return _ENDS[self.stopped_by]

    @property
    def tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Of the answer, prefill included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def sweep_seconds(self) -> float | None:
        """The median sweep."""
        return self.trace.median_sweep()

    @property
    def peak_bytes(self) -> int:
        """Peak memory: of the device, or the resident set of the process on a CPU."""
        return self.trace.peak_bytes

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "…"
        return (f"GenerationResult({text!r}, {self.tokens} tokens, {self.tokens_per_second:.2f} tok/s, "
                f"stopped_by={self.stopped_by!r})")  # fmt: skip

    def __str__(self) -> str:
        return self.text


class Runs(Protocol):
    """What a generation needs of a model."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def trace(self) -> Trace: ...

    def run(self, kwargs: dict[str, Any], cancel: threading.Event) -> Any: ...


class Generation:
    """A generation under way: iterate it for chunks, best in ``with``, so that leaving early ends it.

    ``is_cut`` says that ``max_new_tokens`` was more, and the context has no room for it.

    It runs in a worker thread from the first chunk asked for. Closing stops the worker within one unit; what the worker
    raises is raised here, except a stop that was asked for, which is a normal end.

    Attributes
    ----------
    result
        The :class:`GenerationResult`, also of a stopped generation; ``None`` before the end.
    """

    def __init__(
        self, model: Runs, prompt: str, kwargs: dict[str, Any], stops: Sequence[str] = (), is_cut: bool = False
    ):
        self._model, self._prompt, self._kwargs, self._is_cut = model, prompt, kwargs, is_cut
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._text, self._parts = StopText(Detokenizer(model.tokenizer), stops), [""]
        self._ids: list[int] = []
        self._cancel, self._start = threading.Event(), time.perf_counter()
        self.result: GenerationResult | None = None

    @property
    def limit(self) -> int | None:
        """How many tokens it may make: what was asked for, as far as the context has room."""
        return self._kwargs.get("max_new_tokens")

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> GenerationChunk:
        try:
            while (chunk := self.poll(0.1)) is None:
                pass
            return chunk
        except StopIteration:
            raise
        except BaseException:
            # Ctrl-C in a plain loop: nobody else is left to stop the worker.
            self.close()
            raise

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._cancel.set()

    def poll(self, seconds: float) -> GenerationChunk | None:
        """The next chunk, or ``None`` if none comes within ``seconds``; raises ``StopIteration`` after the last."""
        if self.result is not None:
            raise StopIteration
        if self._worker is None:
            self._begin()
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(event, End):
            return self._finish(event)
        self._ids.extend(event)
        return self._chunk(self._text.add(event), event)

    def stop(self) -> None:
        """Ask it to end within one unit, from any thread; what it has so far is kept."""
        self._cancel.set()

    def close(self) -> None:
        """Stop it if it runs, wait until it has, and fill in ``result``. Safe to call twice."""
        if self.result is not None:
            return
        self.stop()
        if self._worker is None:
            self._complete(Trace())
        while self.result is None:
            with contextlib.suppress(StopIteration):
                self.poll(0.1)

    def _begin(self) -> None:
        self._start = time.perf_counter()
        self._worker = start(self._model.run, self._kwargs, self._cancel, self._events)

    def _chunk(self, text: str, ids: list[int]) -> GenerationChunk:
        self._parts.append(text)
        return GenerationChunk(text, tuple(ids), time.perf_counter() - self._start, len(self._ids))

    def _finish(self, end: End) -> GenerationChunk:
        if self._worker is not None:
            self._worker.join(1)
        rest = self._text.rest()
        chunk = self._chunk(rest, []) if rest else None
        failed = end.error is not None and not isinstance(end.error, GenerationStopped)
        self._complete(Trace() if failed else self._model.trace)
        if failed and end.error is not None:
            raise end.error
        if chunk is None:
            raise StopIteration
        return chunk

    def _complete(self, trace: Trace) -> None:
        trace.tokens = len(self._ids)
        by_length = self.limit is not None and len(self._ids) >= self.limit
        end = ("context" if self._is_cut else "length") if by_length else "end"
        self.result = GenerationResult(
            prompt=self._prompt, text="".join(self._parts), token_ids=tuple(self._ids),
            prompt_tokens=int(self._kwargs["input_ids"].shape[-1]),
            stopped_by="user" if self._cancel.is_set() else end,
            seconds=time.perf_counter() - self._start, trace=trace,
        )  # fmt: skip


class Detokenizer:
    """Tokens → text as far as it is final: bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._shown, self._from = tokenizer, 0, 0
        self._ids: list[int] = []

    def add(self, ids: list[int]) -> str:
        """New text after ``ids``."""
        self._ids.extend(ids)
        # Decoding from a few tokens back keeps the blanks that depend on the neighbour.
        before = self._decode(self._ids[self._from : self._shown])
        after = self._decode(self._ids[self._from :])
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def rest(self) -> str:
        """What was held back, as it is."""
        before = self._decode(self._ids[self._from : self._shown])
        return self._decode(self._ids[self._from :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StopText:
    """Holds back text that may be the beginning of a stop string, and drops the stop string itself."""

    def __init__(self, text: Detokenizer, stops: Sequence[str]):
        self._detokenizer, self._stops, self._held = text, tuple(stops), ""

    def add(self, ids: list[int]) -> str:
        self._held += self._detokenizer.add(ids)
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        cut = min(found) if found else len(self._held) - self._overlap()
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def _overlap(self) -> int:
        """The longest end of the held text that a stop string begins with."""
        lengths = [size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])]
        return max(lengths, default=0)

    def rest(self) -> str:
        held = self._held + self._detokenizer.rest()
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        return held[: min(found)] if found else held
