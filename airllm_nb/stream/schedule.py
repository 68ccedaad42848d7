"""The stops of one sweep, and what follows from their order alone: which step overwrites which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .page_cache import CachedPieces
from .ring import Place
from .unit import Unit


@dataclass
class Stop:
    """One stop of the schedule: a unit, where it is in host memory and where it is computed.

    Attributes
    ----------
    unit
        What is streamed.
    host
        Its host memory, uint8 ``[unit.nbytes]``: its own (``keep``) or a place in the ring; ``None`` with ``pages``.
    device
        Its place in device memory, uint8 ``[unit.nbytes]``, ``None`` where compute runs on ``host``.
    host_place, device_place
        Distances to the stop whose bytes are overwritten; ``host_place`` is ``None`` for a unit of its own memory.
    keep
        The unit stays in ``host`` between sweeps: it is read once.
    loaded
        Its host memory holds the unit for good.
    pages
        Its pieces in the page cache, in the place of ``host``.
    lock
        Called once a kept unit is read, on the thread that read it.
    """

    unit: Unit
    host: torch.Tensor | None
    device: torch.Tensor | None
    host_place: Place | None
    device_place: Place | None
    keep: bool
    loaded: bool = False
    pages: CachedPieces | None = None
    lock: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.into: Any = self.pages if self.host is None else memoryview(self.host.numpy())
        self.sources: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        if self.device is not None and self.pages is not None:
            self.sources = self.pages.views
            self.targets = [self.device[p.offset : p.offset + p.extent.nbytes] for p in self.unit.pieces]
        elif self.device is not None and self.host is not None:
            self.sources, self.targets = [self.host], [self.device]


@dataclass(frozen=True)
class Moved:
    """One finished movement for the trace; ``start`` and ``end`` are marks for a copy, seconds for a read."""

    stage: str
    unit: Unit
    start: Any
    end: Any


class Schedule:
    """The same stops round and round; step ``s`` is stop ``s % len(self)``."""

    def __init__(self, stops: Sequence[Stop]):
        self.stops = list(stops)
        self._ring = [index for index, stop in enumerate(self.stops) if stop.host_place is not None]
        self._rank = {index: rank for rank, index in enumerate(self._ring)}

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, step: int) -> Stop:
        return self.stops[step % len(self.stops)]

    def host_owner(self, step: int) -> int | None:
        """The step whose host bytes the read of ``step`` overwrites; ``None`` where it has memory of its own."""
        place, count = self[step].host_place, len(self.stops)
        if place is None:
            return None
        # Distances count the stops that use the ring, not all of them.
        rank = self._rank[step % count] - place.distance
        sweep = step // count if rank >= 0 else step // count - 1
        return sweep * count + self._ring[rank % len(self._ring)]

    def device_owner(self, step: int) -> int | None:
        """The step whose device bytes the copy of ``step`` overwrites; ``None`` where nothing is copied."""
        place = self[step].device_place
        return None if place is None else step - place.distance
