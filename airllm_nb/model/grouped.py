"""A few tokens through packed experts: products with the matrices that each is routed to, by kernels alone.

The native code's loop asks the host which experts are hit, and unpacks each of them. Here nothing waits for the host,
and a matrix is read once, as it is packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..encoding.kernels import launch
from ..encoding.linear import EncodedWeight

# Tokens at once, and pairs of a token and one of its experts: for more, unpacking is not slower.
MOST_TOKENS, MOST_PAIRS = 8, 64

Stacks = Mapping[str, torch.Tensor | nn.Parameter | None]


class PackedExperts:
    """The forward of an experts module of transformers' interface, for a few tokens.

    Parameters
    ----------
    module
        Whose class says gate, bias and transposition by attributes.

    Raises
    ------
    ValueError
        If its matrices are not all packed so that a kernel multiplies them.
    """

    def __init__(self, module: Any):
        self._module, self._up = module, "gate_up_proj" if module.has_gate else "up_proj"
        self._views: dict[str, EncodedWeight] = {}
        for name in (self._up, "down_proj"):
            view = vars(module).get(name)
            if not isinstance(view, EncodedWeight) or not view.multiplies(module.is_transposed):
                raise ValueError(f"no kernel multiplies the experts' {name} as it lies")
            self._views[name] = view

    def takes(self, index: torch.Tensor) -> bool:
        """Whether these are few enough: ``index`` is ``[tokens, k]``."""
        return len(index) <= MOST_TOKENS and 0 < index.numel() <= MOST_PAIRS and not torch.is_grad_enabled()

    def __call__(
        self, hidden: torch.Tensor, index: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, stacks: Stacks
    ) -> torch.Tensor | None:
        """``[tokens, hidden]``; ``None`` where a kernel fails.

        Parameters
        ----------
        hidden
            ``[tokens, hidden]``.
        index, slots, weights
            ``[tokens, k]``: which experts, where in the stacks their matrices are, and what each counts.
        stacks
            By the module's names, the parts of the matrices, and biases.
        """
        (tokens, each), module = slots.shape, self._module
        flat = slots.reshape(-1)
        x = hidden if tokens == 1 else hidden[:, None].expand(-1, each, -1).reshape(tokens * each, -1)
        states = self._multiply(self._up, x, flat, stacks)
        if states is None:
            return None
        states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
        states = self._multiply("down_proj", states, flat, stacks)
        if states is None:
            return None
        if getattr(module, "has_post_expert_norm", False):
            states = module.post_expert_norm(states)
        return added_up(states, index, weights, hidden.dtype, is_eager=True)

    def _multiply(self, name: str, x: torch.Tensor, slots: torch.Tensor, stacks: Stacks) -> torch.Tensor | None:
        view = self._views[name]
        parts = {part: stacks[bound] for part, bound in view.names.items()}
        rows = view.shape[-1] if self._module.is_transposed else view.shape[-2]
        out = torch.empty(len(slots), rows, dtype=view.dtype, device=x.device)
        pieces = view.encodings
        for number, (encoding, below) in enumerate(zip(pieces, out.chunk(len(pieces), 1), strict=True)):
            at = slots if len(pieces) == 1 else torch.where(slots < 0, slots, slots * len(pieces) + number)
            if not launch.multiply_slots(encoding, x.to(view.dtype), parts, at, below):  # type: ignore[arg-type]
                return None
        bias = stacks.get(f"{name}_bias") if self._module.has_bias else None
        return out if bias is None else out + bias[slots.clamp_min(0).long()]


def added_up(
    states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype, is_eager: bool
) -> torch.Tensor:
    """What experts have given each token, weighted and added up as native code does: ``[tokens, hidden]`` of ``dtype``.

    Parameters
    ----------
    states
        ``[tokens · k, hidden]``.
    index, weights
        ``[tokens, k]``.
    is_eager
        As its loop does, which rounds what each expert gives, in the order of the experts; grouped products add up
        first.
    """
    tokens, each = index.shape
    weighted = states.view(tokens, each, states.shape[-1]) * weights.reshape(tokens, each, 1)
    if not is_eager:
        return weighted.sum(1).to(dtype)
    order = index.argsort(1)[:, :, None].expand_as(weighted)
    first, *others = weighted.to(dtype).gather(1, order).unbind(1)
    for other in others:
        first = first + other
    return first


class ResidentExperts:
    """The experts of a module of which all are bound: a few tokens by kernels, more as ever."""

    def __init__(self, module: Any):
        self._module, self._few, self._native = module, PackedExperts(module), type(module).forward
        module.forward = self.forward

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As the module's own."""
        if self._few.takes(index):
            result = self._few(hidden, index, index, weights, self._module._parameters)
            if result is not None:
                return result
        result = self._native(self._module, hidden, index, weights)
        assert isinstance(result, torch.Tensor)
        return result

    def close(self) -> None:
        """The module computes by its own forward."""
        self._module.__dict__.pop("forward", None)
