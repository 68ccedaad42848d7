"""One decode step that was recorded, with its cache, its inputs and its check.

A step is one new token a sequence with an ordinary cache, as ``generate`` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .made_of import MadeOf
from .recording import NoHostWaits, NumbersOnDevice, Record

if TYPE_CHECKING:
    from .fixed import Edge, FixedCache

# How far logits may be off, as a part of their spread: attention over masked rows rounds in another order.
_CLOSE, _ROUNDED = 1e-3, 0.06
_TENSORS = ("input_ids", "attention_mask", "position_ids")
_AS_EVER = {"output_attentions": False, "output_hidden_states": False, "use_cache": True, "return_dict": True}

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Step:
    """One decode step, as it is asked for.

    Attributes
    ----------
    cache
        With ``length`` tokens in it before the step.
    tensors, rest
        Arguments of the forward. Tensors may change from step to step.
    """

    cache: Any
    length: int
    tensors: Mapping[str, torch.Tensor]
    rest: Mapping[str, Any]

    @property
    def key(self) -> Any:
        """What it has in common with others that the same record serves."""
        shapes = tuple((name, each.dtype, each.shape[:-1]) for name, each in self.tensors.items())
        return shapes, tuple(self.rest.items())

    def follows(self, other: Step) -> bool:
        """Whether it is the next one after ``other``, and the same record serves both."""
        return self.cache is other.cache and self.length == other.length + 1 and self.key == other.key


class Ran(NamedTuple):
    """A step that ran as ever: a copy of it, what it gave, and what it made the cache forget."""

    step: Step
    logits: torch.Tensor
    edge: Edge


def read_step(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Step | None:
    """What a forward asks for, if it is a decode step and nothing else."""
    from .fixed import length_of

    ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    if args or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or torch.is_grad_enabled():
        return None
    if not (length := length_of(cache)):
        return None
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            is_mask = name == "attention_mask"
            if (
                name not in _TENSORS
                or value.shape[-1] != (length + 1 if is_mask else 1)
                or (is_mask and value.dim() != 2)
            ):
                return None
            tensors[name] = value
        elif name != "past_key_values":
            if not isinstance(value, (bool, int, float, str, type(None))):
                return None
            if value is not None and value != _AS_EVER.get(name, value):
                return None
            rest[name] = value
    return Step(cache, length, tensors, rest)


class Graph:
    """A record of the native ``forward``.

    Parameters
    ----------
    model
        Whose forward.
    cache
        What it computes with; it has the tokens of ``ran``.
    first, ran
        Where it is recorded, and the step after, which has run: where it is checked.
    output
        Of which class outputs are.

    Attributes
    ----------
    nbytes
        Device memory that it takes, its cache included.

    Raises
    ------
    Exception
        Of any class, if it cannot be recorded, or gives other logits.
    """

    def __init__(
        self, model: Any, forward: Forward, cache: FixedCache, first: Step, ran: Ran, output: type, record: Record
    ):
        last = ran.step
        self.cache, self.key, self._output = cache, last.key, output
        self.made_of, self._at = MadeOf(model), -1
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = {name: each.clone() for name, each in last.tensors.items()}
            if (mask := self._inputs.get("attention_mask")) is not None:
                self._inputs["attention_mask"] = mask.new_zeros(mask.shape[0], cache.capacity)

            inputs = {**self._inputs, **last.rest, "past_key_values": cache}

            def run() -> Any:
                with NumbersOnDevice():
                    output = forward(**inputs)
                cache.counter.add_(1)
                return output

            now = cache.rows(first.length, last.length + 1)
            try:
                # What it computes at this position is dropped: a number that it reads here is another one there.
                self._put(first, anew=True)
                with NoHostWaits():
                    run()
                self._put(first, anew=True)
                recorded = record(run)
                self._replay, self._logits = recorded.replay, recorded.output.logits
                cache.put_rows(now)
                cache.put_rows(ran.edge)
                self._put(last, anew=True)
                self._replay()
                _compare(self._logits, ran.logits)
            finally:
                cache.put_rows(now)
        self._at = last.length + 1
        cache.counter.fill_(self._at)
        self.nbytes = cache.nbytes + max(recorded.nbytes, 0)

    def serves(self, step: Step) -> bool:
        """Whether the record gives what ``step`` asks for; its cache is lent then."""
        from .fixed import fits

        if step.key != self.key or step.length >= self.cache.capacity:
            return False
        loan = self.cache.loan
        if loan is not None and loan.holds(step.cache):
            return True
        if not fits(step.cache, self.cache):
            return False
        self.cache.borrow(step.cache)
        if (mask := self._inputs.get("attention_mask")) is not None:
            mask.zero_()
        return True

    def step(self, step: Step) -> Any:
        """Replay; ``None``, and nothing done, if the model is no longer what was recorded."""
        self._put(step)
        self._replay()
        if not self.made_of.still():  # asked while the device computes
            self._at = -1
            return None
        self._at += 1
        loan = self.cache.loan
        assert loan is not None, "it serves the step"
        loan.length = self._at
        return self._output(logits=self._logits.clone(), past_key_values=step.cache)

    def _put(self, step: Step, anew: bool = False) -> None:
        for name, tensor in step.tensors.items():
            into = self._inputs[name]
            (into[:, : tensor.shape[-1]] if name == "attention_mask" else into).copy_(tensor)
        if anew or self._at != step.length:
            self.cache.counter.fill_(step.length)
            self._at = step.length


def _compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises ``ValueError`` if the difference is no rounding."""
    a, b = found.float(), expected.float()
    spread = (b - b.mean(-1, keepdim=True)).norm()
    off = float((a - b).norm() / spread)
    if not off <= (_CLOSE if found.dtype in (torch.float32, torch.float64) else _ROUNDED):
        raise ValueError(f"a replay gives other logits: off by {off:.2g} of their spread")
