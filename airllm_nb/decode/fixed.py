"""Keys and values at fixed addresses, for a step that a graph replays: lent by an ordinary cache, and given back.

A graph knows addresses and no Python numbers, so its cache has a row for every position up to a *capacity*, and a
counter on the device says which row is written next; masks are made from that counter, and hide the rows after it.
Windows need nothing of their own: all positions have rows, and the mask hides what has moved out.

The cache that ``generate`` holds stays transformers' own. While it is *lent*, its layers know their length only;
whoever asks one for more (keys, a crop, another order, more than one token) has all of it back before.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class FixedLayer(CacheLayerMixin):
    """One layer: keys and values ``[batch, heads, capacity, dim]``.

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


class FixedCache(Cache):
    """The cache that a graph computes with.

    Parameters
    ----------
    like
        An ordinary cache of the same layers.

    Attributes
    ----------
    counter
        Tokens that are in it, ``[1]`` on the device.
    """

    is_compileable = True

    def __init__(self, like: DynamicCache, capacity: int):
        device = next(layer.keys.device for layer in like.layers if _has_keys(layer))
        with torch.inference_mode(False):  # what was made in it could not be written outside of it
            self.counter = torch.zeros(1, dtype=torch.long, device=device)
        self.capacity = capacity
        self._loan: weakref.ref[Loan] | None = None
        # Lent layer by layer, so that there is never more than one of them twice.
        loan, layers = Loan(like), list[Any]()
        try:
            for layer in like.layers:
                layers.append(FixedLayer(layer, capacity, self.counter) if _has_keys(layer) else _empty(layer))
                if isinstance(layers[-1], FixedLayer):
                    loan.take(layer, layers[-1])
        except BaseException:
            loan.end()
            raise
        self._loan = weakref.ref(loan)
        super().__init__(layers=layers)

    def borrow(self, cache: DynamicCache) -> Loan:
        """Have what is in ``cache``, which :func:`fits`."""
        if (loan := self.loan) is not None:
            loan.end()
        loan = Loan(cache)
        for layer, fixed in zip(cache.layers, self.layers, strict=True):
            if isinstance(fixed, FixedLayer):
                loan.take(layer, fixed)
        self._loan = weakref.ref(loan)
        return loan

    @property
    def loan(self) -> Loan | None:
        """What it has now; whoever drops the cache that it is from ends it."""
        return None if self._loan is None else self._loan()

    def close(self) -> None:
        """Give back what it has."""
        if (loan := self.loan) is not None:
            loan.end()

    def rows(self, first: int, last: int) -> list[torch.Tensor]:
        """Copies of what is in some rows."""
        return [each[:, :, first:last].clone() for each in self._tensors]

    def put_rows(self, first: int, rows: list[torch.Tensor]) -> None:
        """What :meth:`rows` gave, back to where it was."""
        for each, row in zip(self._tensors, rows, strict=True):
            each[:, :, first : first + row.shape[2]].copy_(row)

    def put_edge(self, edge: Edge) -> None:
        """What :func:`edge` gave, to its positions."""
        windows = [layer for layer in self.layers if isinstance(layer, FixedLayer) and layer.is_sliding]
        for layer, (first, keys, values) in zip(windows, edge, strict=True):
            layer.keys[:, :, first : first + keys.shape[2]].copy_(keys)
            layer.values[:, :, first : first + keys.shape[2]].copy_(values)

    @property
    def _tensors(self) -> list[torch.Tensor]:
        fixed = [layer for layer in self.layers if isinstance(layer, FixedLayer)]
        return [each for layer in fixed for each in (layer.keys, layer.values)]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._tensors)


class Loan:
    """The content of an ordinary cache, while it lies in a fixed one. The lent layers hold it, and it holds none.

    Attributes
    ----------
    length
        Tokens a sequence.
    """

    def __init__(self, cache: DynamicCache):
        self.length, self._cache = int(cache.get_seq_length()), weakref.ref(cache)
        self._lent: list[tuple[weakref.ref[Any], FixedLayer]] = []

    def take(self, layer: Any, fixed: FixedLayer) -> None:
        """The content of ``layer`` goes to ``fixed``."""
        first = self.length - layer.keys.shape[2]
        fixed.keys[:, :, first : self.length].copy_(layer.keys)
        fixed.values[:, :, first : self.length].copy_(layer.values)
        self._lent.append((weakref.ref(layer), fixed))
        layer.__class__, layer._loan = _LENT[type(layer)], self
        for name in ("keys", "values", "cumulative_length"):
            vars(layer).pop(name, None)

    def end(self) -> None:
        """All goes back, to those who are still there."""
        lent, self._lent = self._lent, []
        while lent:
            reference, fixed = lent.pop()
            layer = reference()
            if layer is None:
                continue
            try:
                first = max(self.length - layer.sliding_window + 1, 0) if fixed.is_sliding else 0
                keys = fixed.keys[:, :, first : self.length].clone()
                values = fixed.values[:, :, first : self.length].clone()
            except BaseException:
                self._lent = [*lent, (reference, fixed)]  # no memory: it may be tried again
                raise
            layer.__class__ = _ORDINARY.get(type(layer), type(layer))
            vars(layer).pop("_loan", None)
            layer.keys, layer.values = keys, values
            if fixed.is_sliding:
                layer.cumulative_length = self.length

    def holds(self, cache: Any) -> bool:
        """Whether it is that of ``cache``, and has not ended."""
        return bool(self._lent) and self._cache() is cache


def length_of(cache: Any) -> int:
    """Tokens in a cache that may be lent, as far as its first layer tells; 0 of every other kind."""
    layers = cache.layers if type(cache) is DynamicCache else ()
    return layers[0].get_seq_length() if layers and (type(layers[0]) in _ORDINARY or type(layers[0]) in _LENT) else 0


def fits(cache: Any, like: FixedCache | None = None) -> bool:
    """Whether an ordinary cache can be lent (to ``like``): of plain keys and values, complete windows at most."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or not any(map(_has_keys, cache.layers)):
        return False
    return all(map(_is_plain, cache.layers, itertools.repeat(cache.get_seq_length()))) and (
        like is None or _match(cache, like)
    )


Edge = list[tuple[int, torch.Tensor, torch.Tensor]]


def edge(cache: DynamicCache) -> Edge:
    """The rows that windows forget in the next two steps, with their position: a check of those looks at them again."""
    return [
        (layer.get_seq_length() - layer.keys.shape[2], layer.keys[:, :, :2].clone(), layer.values[:, :, :2].clone())
        for layer in cache.layers if _has_keys(layer) and layer.is_sliding
    ]  # fmt: skip


def bytes_a_token(cache: DynamicCache) -> int:
    """Bytes of all layers' rows for one position, of all sequences."""
    tensors = [each for layer in cache.layers if _has_keys(layer) for each in (layer.keys, layer.values)]
    return sum(each.shape[0] * each.shape[1] * each.shape[3] * each.element_size() for each in tensors)


def _is_plain(layer: Any, length: int) -> bool:
    """Whether it has the keys of ``length`` tokens, of the last ones at least; or none, and others' are used."""
    if not _has_keys(layer):
        is_empty = getattr(layer, "keys", None) is None
        return is_empty and (type(layer) in _LENT or type(layer).__name__ == "DummyLayer")
    if type(layer) in _ORDINARY:
        return True
    if getattr(layer, "record_past", False) or (layer.is_sliding and layer.sliding_window < 2):
        return False
    kept = min(length, layer.sliding_window - 1) if layer.is_sliding else length
    return bool(layer.get_seq_length() == length and layer.keys.shape[2] == kept)


def _match(cache: DynamicCache, like: FixedCache) -> bool:
    if len(cache.layers) != len(like.layers) or int(cache.get_seq_length()) >= like.capacity:
        return False
    for layer, fixed in zip(cache.layers, like.layers, strict=True):
        if _has_keys(layer) != isinstance(fixed, FixedLayer):
            return False
        if isinstance(fixed, FixedLayer):
            for mine, its in ((layer.keys, fixed.keys), (layer.values, fixed.values)):
                if mine.shape[:2] != its.shape[:2] or mine.shape[3] != its.shape[3] or mine.dtype != its.dtype:
                    return False
    return True


def _has_keys(layer: Any) -> bool:
    """Whether it is of a kind that can be lent, and something is in it."""
    return type(layer) in _ORDINARY or (type(layer) in _LENT and layer.is_initialized)


def _empty(layer: Any) -> Any:
    """A layer without keys of its own (others' are used): as it is."""
    return layer if type(layer) not in _LENT else type(layer)(sliding_window=getattr(layer, "sliding_window", None))


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
_LENT = {ordinary: _lent(ordinary) for ordinary in (DynamicLayer, DynamicSlidingWindowLayer)}
_ORDINARY = {lent: ordinary for ordinary, lent in _LENT.items()}
