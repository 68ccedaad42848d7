"""How tokens are made: one generation, from the arguments of ``generate`` to its last token.

1. :func:`start` lets a worker run the model, with a streamer that passes on each token.
2. The model takes its turn and calls :func:`make_tokens`. The work that the :class:`Request` asks for is given room: a
   session, in which weights stream.
3. In it the native ``generate`` makes the tokens. The prompt goes through the model in as few chunks as fit, then every
   forward, one sweep, gives the next token. Whoever sets ``cancel`` ends it before the next unit.
4. Where device memory runs out there is another attempt, under a smaller budget: with the random numbers of the first
   and its tokens, of which none is given out twice.
"""

from __future__ import annotations

import atexit
import copy
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..plan.work import Work
from .prefill import of_generation

# What a run that failed half-way leaves changed.
_CHANGED = ("past_key_values", "cache_params", "logits_processor", "stopping_criteria", "custom_generate")


class Rooms(Protocol):
    """Where a model lives, as far as a generation asks."""

    def attempts(self, work: Work, repeatable: bool) -> Iterator[AbstractContextManager[Any]]: ...

    def session(self, work: Work, cancel: threading.Event) -> AbstractContextManager[tuple[Any, int]]: ...


def make_tokens(generate: Callable[..., Any], request: Request, rooms: Rooms, cancel: threading.Event) -> Any:
    """What the native ``generate`` returns; ``cancel`` ends it within one unit, by a ``GenerationStopped``."""
    for attempt in rooms.attempts(request.work, request.repeatable):
        with attempt, rooms.session(request.work, cancel) as (_, tokens):
            return generate(**request.arguments(tokens))
    raise AssertionError("an attempt returns or raises")


class Request:
    """The arguments of a ``generate`` that can be called again, and goes on then where the streamer was.

    It draws the same random numbers. Tokens that were given out are forced, so that the text stays one even where other
    kernels round otherwise.

    Parameters
    ----------
    native
        The model; random numbers are its device's.
    kwargs
        The arguments.

    Attributes
    ----------
    work
        What it asks for.
    repeatable
        Whether a second call starts from the same state.
    """

    def __init__(self, native: Any, kwargs: Mapping[str, Any]):
        self._kwargs, self._device = dict(kwargs), native.device
        self.work = of_generation(native, kwargs)
        self.repeatable = all(kwargs.get(name) is None for name in _CHANGED)
        self._random: tuple[torch.Tensor, ...] = ()
        self._streamer = _Once(kwargs["streamer"]) if kwargs.get("streamer") is not None else None

    def arguments(self, tokens: int) -> dict[str, Any]:
        """For the next call, with ``tokens`` of the prompt at a time."""
        kwargs = self._settled(tokens)
        if self._streamer is not None:
            kwargs["streamer"] = self._streamer
        if self._random:
            self._rewind(kwargs)
        else:
            self._random = _random_state(self._device)
        return kwargs

    def _settled(self, tokens: int) -> dict[str, Any]:
        # Compiled code would keep the addresses of parameters that are bound anew in every sweep.
        kwargs = dict(self._kwargs)
        settings: dict[str, Any] = {"disable_compile": True}
        if tokens < self.work.prompt and not self.work.chunk:
            kwargs.pop("prefill_chunk_size", None)
            settings["prefill_chunk_size"] = tokens
        if (config := kwargs.get("generation_config")) is None:
            return settings | kwargs
        # Settings beside a config would get a warning from transformers.
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].update(**settings)
        return kwargs

    def _rewind(self, kwargs: dict[str, Any]) -> None:
        from transformers import LogitsProcessorList

        torch.set_rng_state(self._random[0])
        for state in self._random[1:]:
            torch.cuda.set_rng_state(state, self._device)
        if self._streamer is not None and self._streamer.given is not None:
            self._streamer.rewind()
            kwargs["logits_processor"] = LogitsProcessorList([_Forced(self._streamer.given)])


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    on_device = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *on_device)


class _Once:
    """Passes to a streamer what it has not had yet. ``given`` is the prompt and those tokens, ``[batch, tokens]``."""

    def __init__(self, streamer: Any):
        self._streamer, self._seen = streamer, 0
        self.given: torch.Tensor | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.given is None:
            self.given = value
            self._seen = value.shape[1]
            self._streamer.put(value)
            return
        tokens = value.reshape(self.given.shape[0], -1)
        had = min(max(self.given.shape[1] - self._seen, 0), tokens.shape[1])
        self._seen += tokens.shape[1]
        if had < tokens.shape[1]:
            self.given = torch.cat([self.given, tokens[:, had:].to(self.given.device)], 1)
            self._streamer.put(tokens[:, had:] if had else value)

    def end(self) -> None:
        self._streamer.end()

    def rewind(self) -> None:
        self._seen = 0


class _Forced:
    """A logits processor that leaves only the tokens that were given out, as far as they go."""

    def __init__(self, given: torch.Tensor):
        self._given = given

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1]
        if at >= self._given.shape[1]:
            return scores
        only = self._given[:, at, None].to(scores.device)
        return torch.full_like(scores, -float("inf")).scatter_(1, only, 0)


# --- the worker


@dataclass(frozen=True)
class End:
    """The worker is over."""

    error: BaseException | None = None


# Whoever runs when the interpreter ends would be cut off in the middle of native code, which crashes.
_workers: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


@atexit.register
def _end_workers() -> None:
    workers = dict(_workers)
    for cancel in workers.values():
        cancel.set()
    for worker in workers:
        worker.join(10)


def start(
    run: Callable[[dict[str, Any], threading.Event], Any], kwargs: dict[str, Any], cancel: threading.Event,
    events: queue.SimpleQueue[Any],
) -> threading.Thread:  # fmt: skip
    """Run a generation on a worker: ``events`` gets new tokens, a list at a time, and an :class:`End`."""
    worker = threading.Thread(target=_work, args=(run, kwargs, cancel, events), name="airllm-generate", daemon=True)
    worker.start()
    _workers[worker] = cancel
    return worker


def _work(
    run: Callable[[dict[str, Any], threading.Event], Any], kwargs: dict[str, Any], cancel: threading.Event,
    events: queue.SimpleQueue[Any],
) -> None:  # fmt: skip
    try:
        run({**kwargs, "streamer": _Tokens(events.put)}, cancel)
        events.put(End())
    except BaseException as error:  # raised again in the caller's thread
        events.put(End(error))


class _Tokens:
    """A streamer for ``generate``: passes tokens on, the prompt left out."""

    def __init__(self, put: Callable[[list[int]], None]):
        self._put, self._prompt_seen = put, False

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._put(value.reshape(-1).tolist())

    def end(self) -> None:
        """The worker reports the end."""
