"""Which experts tokens are routed to, made up: how often one is asked for again decides how fast a mixture runs.

Routers with random weights know no text. Evenly distributed experts are what a cache gains least from, and on real text
neighbouring tokens share experts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import OptionError

# name: the probability that an expert of the last tokens is taken again, how many tokens those are, and how unevenly
# the others are distributed. With "local" a cache has the hits that are published of real text: 40 / 62 / 86 %, where
# the 18 / 39 / 73 % of a layer's experts that were used last stay.
ROUTINGS = {"uniform": (0.0, 1, 0.0), "local": (0.25, 4, 0.6)}


def routes(
    tokens: int, layers: int, experts: int, each: int, how: tuple[float, int, float], seed: int = 0
) -> torch.Tensor:
    """The experts of each token of one sequence, ``[tokens, layers, each]``; no token has one twice.

    Parameters
    ----------
    how
        As in :data:`ROUTINGS`: with probability ``again`` one of the experts of the last ``window`` tokens, else the
        ``j``-th most popular of its layer with a weight of ``1 / j ** skew``. Those are the same for all seeds.
    """
    again, window, skew = how
    shuffled, chance = random.Random(0), random.Random(seed)
    popular = [shuffled.sample(range(experts), experts) for _ in range(layers)]
    weights: list[float] = torch.tensor([1 / place**skew for place in range(1, experts + 1)]).cumsum(0).tolist()
    past: list[list[list[int]]] = [[] for _ in range(layers)]
    for _ in range(tokens):
        for ranks, taken in zip(popular, past, strict=True):
            recent, chosen = [expert for token in taken[-window:] for expert in token], list[int]()
            while len(chosen) < each:
                if recent and chance.random() < again:
                    expert = chance.choice(recent)
                else:
                    expert = chance.choices(ranks, cum_weights=weights)[0]
                if expert not in chosen:
                    chosen.append(expert)
            taken.append(chosen)
    return torch.tensor(past).transpose(0, 1).contiguous()


class Routing:
    """While it is entered, the tokens that a model decodes are routed as one of :data:`ROUTINGS`; a prompt's are not.

    The weights of the chosen experts stay the router's. What replaces its choice lies in one buffer on the device, so
    that a step that was captured reads it where a step that is launched does.

    Parameters
    ----------
    name
        One of :data:`ROUTINGS`.
    batch, tokens
        Sequences, and how many tokens of each are decoded.

    Raises
    ------
    OptionError
        If the model is no mixture, or none whose routing can be set.
    """

    def __init__(self, model: Any, name: str, batch: int, tokens: int):
        if name not in ROUTINGS:
            raise OptionError(f"routing={name!r} is not known; use {' or '.join(ROUTINGS)}")
        # As transformers marks those that take the experts' numbers as an argument.
        self._modules: list[Any] = [module for module in model.modules() if hasattr(module, "is_transposed")]
        each = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        if not self._modules or each is None:
            raise OptionError(f"{type(model).__name__} has no experts whose routing could be set; leave routing out")
        layers, experts = len(self._modules), self._modules[0].num_experts
        made = [routes(tokens, layers, experts, each, ROUTINGS[name], seed) for seed in range(batch)]
        self._steps = torch.stack(made, 2)  # [tokens, layers, batch, each]
        self._ids = torch.empty_like(self._steps[0], device=model.device).copy_(self._steps[0])
        self._next, self._hooks = 0, list[Any]()

    def __enter__(self) -> Routing:
        for ids, module in zip(self._ids, self._modules, strict=True):
            # Before all others: they may bring the experts that are chosen.
            self._hooks.append(module.register_forward_pre_hook(_chosen(ids), prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def begin(self) -> None:
        """A prompt comes next, and then the first token again."""
        self._next = 0

    def step(self) -> None:
        """Another token is decoded next, in the stream that is current."""
        self._ids.copy_(self._steps[self._next % len(self._steps)])
        self._next += 1


def _chosen(ids: torch.Tensor) -> Callable[..., tuple[Any, ...] | None]:
    """A hook that gives experts other numbers, ``ids`` of ``[tokens, each]``; those of a prompt are left."""

    def replaced(_: nn.Module, args: Sequence[Any]) -> tuple[Any, ...] | None:
        hidden, index, *weights = args
        return (hidden, ids.to(index.dtype), *weights) if index.shape == ids.shape else None

    return replaced
