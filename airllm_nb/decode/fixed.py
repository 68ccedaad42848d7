"""Keys and values at fixed addresses, for a step that a graph replays: lent by an ordinary cache, and given back.

A graph knows addresses and no Python numbers, so its cache has a row for every position up to a *capacity*, and a
counter on the device says which row is written next; masks are made from that counter, and hide the rows after it.

The cache that ``generate`` holds stays transformers' own. While it is *lent*, its layers know their length only;
whoever asks one for more (keys, a crop, another order, more than one token) has all of it back before.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from .fixed_layers import LENT, ORDINARY, FixedLayer, FixedStates, fixed, has_keys, is_plain, is_recurrent, states_of

# What the next steps overwrite or forget, a layer: the position of rows, and the rows, or states.
Edge = list[tuple[int, list[torch.Tensor]]]


class FixedCache(Cache):
    """The cache that a graph computes with.

    Parameters
    ----------
    like
        An ordinary cache of the same layers; it is lent to this one.

    Attributes
    ----------
    counter
        Tokens that are in it, ``[1]`` on the device.
    """

    is_compileable = True

    def __init__(self, like: DynamicCache, capacity: int):
        device = next(layer.keys.device for layer in like.layers if has_keys(layer))
        with torch.inference_mode(False):  # what was made in it could not be written outside of it
            self.counter = torch.zeros(1, dtype=torch.long, device=device)
        self.capacity = capacity
        # Lent layer by layer, so that there is never more than one of them twice.
        loan, layers = Loan(like), list[Any]()
        self._loan = weakref.ref(loan)
        try:
            for layer in like.layers:
                layers.append(fixed(layer, capacity, self.counter))
                loan.take(layer, layers[-1])
        except BaseException:
            loan.end()
            raise
        super().__init__(layers=layers)

    def borrow(self, cache: DynamicCache) -> None:
        """Have what is in ``cache``, which :func:`fits`."""
        self.close()
        loan = Loan(cache)
        self._loan = weakref.ref(loan)
        for layer, mine in zip(cache.layers, self.layers, strict=True):
            loan.take(layer, mine)

    @property
    def loan(self) -> Loan | None:
        """What it has now; whoever drops the cache that it is from ends it."""
        return self._loan()

    def close(self) -> None:
        """Give back what it has."""
        if (loan := self.loan) is not None:
            loan.end()

    def rows(self, first: int, last: int) -> Edge:
        """Copies of what is in some rows, and of all states."""
        return [(first, layer.rows(first, last)) for layer in self._fixed]

    def put_rows(self, edge: Edge) -> None:
        """What :meth:`rows` or :func:`edge` gave, back to where it was."""
        for layer, (first, rows) in zip(self._fixed, edge, strict=True):
            layer.put_rows(first, rows)

    @property
    def _fixed(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, (FixedLayer, FixedStates))]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for layer in self._fixed for each in layer.tensors)


class Loan:
    """The content of an ordinary cache, while it lies in a fixed one. The lent layers hold it, and it holds none.

    Attributes
    ----------
    length
        Tokens a sequence.
    """

    def __init__(self, cache: DynamicCache):
        self.length, self._cache = int(cache.get_seq_length()), weakref.ref(cache)
        self._lent: list[tuple[weakref.ref[Any], Any]] = []

    def take(self, layer: Any, mine: Any) -> None:
        """The content of ``layer`` goes to ``mine``, if that is a fixed one."""
        if isinstance(mine, (FixedLayer, FixedStates)):
            self._lent.append((weakref.ref(layer), mine))
            try:
                mine.take(layer, self)
            except Exception:
                self._lent.pop()
                raise

    def end(self) -> None:
        """All goes back, to those who are still there."""
        lent, self._lent = self._lent, []
        while lent:
            reference, mine = lent.pop()
            try:
                if (layer := reference()) is not None:
                    mine.give(layer, self.length)
            except BaseException:
                self._lent = [*lent, (reference, mine)]  # no memory: it may be tried again
                raise

    def holds(self, cache: Any) -> bool:
        """Whether it is that of ``cache``, and has not ended."""
        return bool(self._lent) and self._cache() is cache


def length_of(cache: Any) -> int:
    """Tokens in a cache that may be lent, as far as its first layer of keys tells; 0 of every other kind."""
    for layer in cache.layers if type(cache) is DynamicCache else ():
        if type(layer) in ORDINARY or type(layer) in LENT:
            return int(layer.get_seq_length())
    return 0


def fits(cache: Any, like: FixedCache | None = None) -> bool:
    """Whether an ordinary cache can be lent (to ``like``): of plain keys and values, complete windows, and states."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or not any(map(has_keys, cache.layers)):
        return False
    length = int(cache.get_seq_length())
    if not all(map(is_plain, cache.layers, itertools.repeat(length))):
        return False
    if like is None:
        return True
    if len(cache.layers) != len(like.layers) or length >= like.capacity:
        return False
    return all(
        mine.matches(layer) if isinstance(mine, (FixedLayer, FixedStates)) else type(mine) is type(layer)
        for layer, mine in zip(cache.layers, like.layers, strict=True)
    )


def edge(cache: DynamicCache) -> Edge:
    """What the next step makes a cache forget: a check of it needs that again."""
    edge: Edge = []
    for layer in cache.layers:
        if is_recurrent(layer):
            edge.append((0, [each.clone() for each in states_of(layer)]))
        elif has_keys(layer):
            rows = int(layer.is_sliding)
            edge.append((layer.get_seq_length() - layer.keys.shape[2],
                         [each[:, :, :rows].clone() for each in (layer.keys, layer.values)]))  # fmt: skip
    return edge


def bytes_of_states(cache: DynamicCache) -> int:
    """Bytes of all recurrent states."""
    return sum(each.nbytes for layer in cache.layers if is_recurrent(layer) for each in states_of(layer))


def bytes_a_token(cache: DynamicCache) -> int:
    """Bytes of all layers' rows for one position, of all sequences."""
    tensors = [each for layer in cache.layers if has_keys(layer) for each in (layer.keys, layer.values)]
    return sum(each.shape[0] * each.shape[1] * each.shape[3] * each.element_size() for each in tensors)
