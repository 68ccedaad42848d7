"""A generation that can be made again from its start, without giving any token out twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .prefill import of_generation

# What a run that failed half-way leaves changed.
_CHANGED = ("past_key_values", "cache_params", "logits_processor", "stopping_criteria", "custom_generate")


class Replay:
    """Calls ``generate``; called again, it draws the same random numbers and goes on where the streamer was.

    Tokens that were given out are forced, so that the text stays one even where other kernels round otherwise.

    Parameters
    ----------
    native
        The model; random numbers are its device's.
    generate
        Its native ``generate``.
    kwargs
        The arguments.

    Attributes
    ----------
    work
        What it asks for.
    repeatable
        Whether a second call starts from the same state.
    """

    def __init__(self, native: Any, generate: Callable[..., Any], kwargs: Mapping[str, Any]):
        self._generate, self._kwargs, self._device = generate, dict(kwargs), native.device
        self.work = of_generation(native, kwargs)
        self.repeatable = all(kwargs.get(name) is None for name in _CHANGED)
        self._random: tuple[torch.Tensor, ...] = ()
        self._streamer = _Once(kwargs["streamer"]) if kwargs.get("streamer") is not None else None

    def __call__(self, tokens: int) -> Any:
        """Generate, with ``tokens`` of the prompt at a time."""
        kwargs = self._settled(tokens)
        if self._streamer is not None:
            kwargs["streamer"] = self._streamer
        if self._random:
            self._rewind(kwargs)
        else:
            self._random = _random_state(self._device)
        return self._generate(**kwargs)

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
