"""In which order units are visited, as a value; what follows from that order alone; and where each unit stops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .page_cache import CachedPieces
from .ring import Place
from .unit import Unit


@dataclass
class Stop:
    """Where a unit stops on its way to compute: its places in host memory and in device memory.

    Attributes
    ----------
    unit
        What is streamed.
    host
        Its host memory, uint8 ``[unit.nbytes]``: its own (``keep``) or a place in the ring; ``None`` with ``pages``.
    device
        Its place in device memory, uint8 ``[unit.nbytes]``, ``None`` where compute runs on ``host``.
    host_place, device_place
        What they are of the ring and of the arena that others pass through too; ``None`` for memory of its own.
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
    lock: Callable[[], object] | None = None

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
    """One finished movement for the trace; ``start`` and ``end`` are marks for a copy, seconds for a read.

    ``nbytes`` says how much of the unit it was; ``None``: all of it.
    """

    stage: str
    unit: Unit
    start: Any
    end: Any
    nbytes: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Visits of units, round and round: step ``s`` is visit ``s % len(schedule)``, for ever.

    Attributes
    ----------
    visits
        Indices of units: any part of them, in any order, each as often as is wanted. All of them forwards is a sweep of
        decoding; forwards and then backwards, one with gradients.
    """

    visits: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.visits:
            raise ValueError("a schedule visits one unit at least")

    @classmethod
    def of(cls, visits: Iterable[int]) -> Schedule:
        """The schedule of these visits: ``Schedule.of(range(n))`` is a sweep over ``n`` units."""
        return cls(tuple(visits))

    def __len__(self) -> int:
        return len(self.visits)

    def unit(self, step: int) -> int:
        """The unit that ``step`` visits."""
        return self.visits[step % len(self.visits)]

    def next_visit(self, unit: int, step: int) -> int:
        """The first step from ``step`` on that visits ``unit``.

        Raises
        ------
        ValueError
            If none does.
        """
        for ahead in range(step, step + len(self.visits)):
            if self.unit(ahead) == unit:
                return ahead
        raise ValueError(f"unit {unit} is not visited by this schedule")

    def distances(self, places: Sequence[Place | None]) -> tuple[int | None, ...]:
        """For each visit, how many steps before it the latest visit was whose unit shares bytes with its own.

        That step must be over before this one is overwritten. It is at most the length of the schedule: a round ago
        the same unit was visited. ``None`` for units without a place, whose memory is their own.
        """
        return tuple(self._distance(at, places) for at in range(len(self.visits)))

    def _distance(self, at: int, places: Sequence[Place | None]) -> int | None:
        place = places[self.unit(at)]
        if place is None:
            return None
        for distance in range(1, len(self.visits)):
            other = places[self.unit(at - distance)]
            if other is not None and place.shares(other):
                return distance
        return len(self.visits)
