"""Layers of a cache at fixed addresses, and what an ordinary layer is while its content lies in one.

Each can :meth:`take` what an ordinary layer has, and :meth:`give` it back, and says which layers :meth:`match` it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)


class FixedLayer(CacheLayerMixin):
    """Keys and values ``[batch, heads, capacity, dim]``.

    Windows need nothing of their own: all positions have rows, and the mask hides what has moved out.

    Parameters
    ----------
    like
        The layer that it stands for.
    counter
        The row that is written next, ``[1]``; all layers have the same.
    """

    is_compileable = True  # masks are made in full, and from numbers on the device

    def __init__(self, like: Any, capacity: int, counter: torch.Tensor):
        super().__init__()
        self.is_sliding, self.capacity, self._counter = like.is_sliding, capacity, counter
        self.keys, self.values = _rows(like.keys, capacity), _rows(like.values, capacity)
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True

    # --- what transformers asks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """It is there."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write one token's row; returns all rows."""
        self.keys.index_copy_(2, self._counter, key_states)
        self.values.index_copy_(2, self._counter, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_seq_length(self) -> Any:
        return self._counter[0]

    def get_max_length(self) -> int:
        return self.capacity

    # --- what a loan asks

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values]

    def matches(self, layer: Any) -> bool:
        """Whether the content of ``layer`` has a place here."""
        if not has_keys(layer):
            return False
        pairs = ((layer.keys, self.keys), (layer.values, self.values))
        return all(mine.shape[:2] == its.shape[:2] and mine.shape[3] == its.shape[3] and mine.dtype == its.dtype
                   for mine, its in pairs)  # fmt: skip

    def take(self, layer: Any, loan: Any) -> None:
        """The content of ``layer`` comes here; to touch it ends ``loan``."""
        first = loan.length - layer.keys.shape[2]
        self.keys[:, :, first : loan.length].copy_(layer.keys)
        self.values[:, :, first : loan.length].copy_(layer.values)
        layer.__class__, layer._loan = LENT[type(layer)], loan
        for name in ("keys", "values", "cumulative_length"):
            vars(layer).pop(name, None)

    def give(self, layer: Any, length: int) -> None:
        """It goes back, ``length`` tokens now."""
        first = max(length - layer.sliding_window + 1, 0) if self.is_sliding else 0
        keys, values = self.keys[:, :, first:length].clone(), self.values[:, :, first:length].clone()
        layer.__class__ = ORDINARY.get(type(layer), type(layer))
        vars(layer).pop("_loan", None)
        layer.keys, layer.values = keys, values
        if self.is_sliding:
            layer.cumulative_length = length

    def rows(self, first: int, last: int) -> list[torch.Tensor]:
        """Copies of what is in some rows."""
        return [each[:, :, first:last].clone() for each in self.tensors]

    def put_rows(self, first: int, rows: list[torch.Tensor]) -> None:
        """What :meth:`rows` gave, back to where it was."""
        for each, row in zip(self.tensors, rows, strict=True):
            each[:, :, first : first + row.shape[2]].copy_(row)


class FixedStates(LinearAttentionLayer):
    """Recurrent states. They are written in place, so that the ordinary layer has the same tensors while it is lent."""

    def __init__(self, like: Any):
        super().__init__(number_of_states=like.number_of_states)
        for name, value in vars(like).items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)
        with torch.inference_mode(False):
            for held, key in _places(self):
                held[key] = held[key].clone()

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [held[key] for held, key in _places(self)]

    def matches(self, layer: Any) -> bool:
        its = states_of(layer) if is_recurrent(layer) else []
        return [(each.shape, each.dtype) for each in its] == [(each.shape, each.dtype) for each in self.tensors]

    def take(self, layer: Any, loan: Any) -> None:
        for (held, key), mine in zip(_places(layer), self.tensors, strict=True):
            mine.copy_(held[key])
            held[key] = mine

    def give(self, layer: Any, length: int) -> None:
        ours = {id(each) for each in self.tensors}
        for held, key in list(_places(layer)):
            if id(held[key]) in ours:  # else somebody has put others there
                held[key] = held[key].clone()

    def rows(self, first: int, last: int) -> list[torch.Tensor]:
        return [each.clone() for each in self.tensors]

    def put_rows(self, first: int, rows: list[torch.Tensor]) -> None:
        for each, row in zip(self.tensors, rows, strict=True):
            each.copy_(row)


def fixed(layer: Any, capacity: int, counter: torch.Tensor) -> Any:
    """What stands for ``layer`` in a fixed cache; one that is empty (others' keys are used) stands for itself."""
    if has_keys(layer):
        return FixedLayer(layer, capacity, counter)
    if is_recurrent(layer):
        return FixedStates(layer)
    return layer if type(layer) not in LENT else type(layer)(sliding_window=getattr(layer, "sliding_window", None))


def is_plain(layer: Any, length: int) -> bool:
    """Whether it has the keys of ``length`` tokens, of the last ones at least; or states; or nothing, all the time."""
    if getattr(layer, "record_past", False):
        return False
    if is_recurrent(layer):
        return all(layer.has_previous_state.values())
    if not has_keys(layer):
        is_empty = getattr(layer, "keys", None) is None
        return is_empty and (type(layer) in LENT or type(layer).__name__ == "DummyLayer")
    if type(layer) in ORDINARY:
        return True
    if layer.is_sliding and layer.sliding_window < 2:
        return False
    kept = min(length, layer.sliding_window - 1) if layer.is_sliding else length
    return bool(layer.get_seq_length() == length and layer.keys.shape[2] == kept)


def has_keys(layer: Any) -> bool:
    """Whether it is of a kind that can be lent, and something is in it."""
    return type(layer) in ORDINARY or (type(layer) in LENT and layer.is_initialized)


def is_recurrent(layer: Any) -> bool:
    """Whether it has states and no keys."""
    return type(layer) is LinearAttentionLayer


def states_of(layer: Any) -> list[torch.Tensor]:
    """Its states."""
    return [held[key] for held, key in _places(layer)]


def _places(layer: Any) -> Iterator[tuple[dict[int, Any], int]]:
    for held in (layer.conv_states, layer.recurrent_states):
        for key, state in held.items():
            if state is not None:
                yield held, key


def _rows(like: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, _, dim = like.shape
    with torch.inference_mode(False):
        return torch.zeros(batch, heads, capacity, dim, dtype=like.dtype, device=like.device)


# --- what an ordinary layer is while it is lent


def _given_back(name: str) -> property:
    def get(layer: Any) -> Any:
        layer._loan.end()
        return getattr(layer, name)

    def put(layer: Any, value: Any) -> None:
        layer._loan.end()
        setattr(layer, name, value)

    return property(get, put)


def _length(layer: Any) -> int:
    return int(layer._loan.length)


def _reduce(layer: Any, protocol: Any) -> Any:
    """Whoever copies or pickles it gets an ordinary layer."""
    layer._loan.end()
    return layer.__reduce_ex__(protocol)


def _lent(ordinary: type) -> type:
    """To touch what is lent is to have it back, and the ordinary class with it."""
    members: dict[str, Any] = {"keys": _given_back("keys"), "values": _given_back("values"), "get_seq_length": _length,
                               "__reduce_ex__": _reduce, "__module__": __name__}  # fmt: skip
    if issubclass(ordinary, DynamicSlidingWindowLayer):
        members["cumulative_length"] = property(_length, _given_back("cumulative_length").fset)
    return type(f"Lent{ordinary.__name__}", (ordinary,), members)


# What an ordinary layer is while it is lent, and the other way round.
LENT = {ordinary: _lent(ordinary) for ordinary in (DynamicLayer, DynamicSlidingWindowLayer)}
ORDINARY = {lent: ordinary for ordinary, lent in LENT.items()}
