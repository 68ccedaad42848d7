"""Where streamed units lie in a fixed memory that they pass through: a pure placement.

Every unit has one fixed place, the same in each sweep. What may be overwritten when then follows from the order of
their visits alone: see :meth:`~airllm_nb.stream.schedule.Schedule.distances`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 4096
# What a CPU's matrix library may choose its kernel by, and what PyTorch's allocator gives there.
CACHE_LINE = 64
# How units of the RAM tier lie in host memory: see :mod:`~airllm_nb.stream.memory`.
PAGE_CACHE, LOCKED, PAGEABLE = "page cache", "locked", "pageable"


@dataclass(frozen=True)
class Place:
    """A unit's bytes in the arena: ``nbytes`` from ``offset`` on."""

    offset: int
    nbytes: int

    def shares(self, other: Place) -> bool:
        """Whether some byte is in both."""
        return self.offset < other.offset + other.nbytes and other.offset < self.offset + self.nbytes


def align(size: int, to: int = PAGE) -> int:
    """``size`` rounded up to a multiple of ``to``."""
    return -(-size // to) * to


def host_room(nbytes: int) -> int:
    """What a unit takes of the ring: it lies in its page as its file does, for direct reads."""
    return align(nbytes) + PAGE


def place(sizes: Sequence[int], capacity: int, leads: Sequence[int] = ()) -> list[Place]:
    """Lay out units in ``capacity`` bytes, one after the other, wrapping at the end.

    ``leads`` says how far into a cache line each begins.

    Raises
    ------
    ValueError
        If a unit alone is larger than the arena.
    """
    places, cursor = [], 0
    for index, (size, lead) in enumerate(zip(sizes, leads or [0] * len(sizes), strict=True)):
        room = align(size)
        if lead + room > capacity:
            raise ValueError(f"unit {index} takes {lead + room:,} bytes, the arena has {capacity:,}")
        cursor += (lead - cursor) % CACHE_LINE
        if cursor + room > capacity:
            cursor = lead
        places.append(Place(cursor, size))
        cursor += room
    return places
