"""Where streamed units lie in a fixed memory that they pass through: a pure placement.

A sweep visits the same units in the same order for ever, so every unit gets one fixed place in the arena, the same in
each sweep. What may be overwritten when is then known beforehand: a unit waits for the last unit before it, counted
cyclically, that shares bytes with it.
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
    """A unit's bytes in the arena.

    Attributes
    ----------
    offset, nbytes
        Where it lies.
    distance
        How many steps before, in the cyclic schedule, the latest unit was that shares bytes with this one; that step
        must be over before this one is overwritten. It is the length of the schedule when only the unit itself does.
    """

    offset: int
    nbytes: int
    distance: int


def align(size: int, to: int = PAGE) -> int:
    """``size`` rounded up to a multiple of ``to``."""
    return -(-size // to) * to


def host_room(nbytes: int) -> int:
    """What a unit takes of the ring: it lies in its page as its file does, for direct reads."""
    return align(nbytes) + PAGE


def place(sizes: Sequence[int], capacity: int, leads: Sequence[int] = ()) -> list[Place]:
    """Lay out a cyclic schedule of units in ``capacity`` bytes, one after the other, wrapping at the end.

    ``leads`` says how far into a cache line each begins.

    Raises
    ------
    ValueError
        If a unit alone is larger than the arena.
    """
    offsets, cursor = [], 0
    for index, (size, lead) in enumerate(zip(sizes, leads or [0] * len(sizes), strict=True)):
        room = align(size)
        if lead + room > capacity:
            raise ValueError(f"unit {index} takes {lead + room:,} bytes, the arena has {capacity:,}")
        cursor += (lead - cursor) % CACHE_LINE
        if cursor + room > capacity:
            cursor = lead
        offsets.append(cursor)
        cursor += room
    return [
        Place(offset, size, _distance(index, offsets, sizes))
        for index, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
    ]


def _distance(index: int, offsets: Sequence[int], sizes: Sequence[int]) -> int:
    begin, end, count = offsets[index], offsets[index] + sizes[index], len(sizes)
    for distance in range(1, count):
        other = (index - distance) % count
        if offsets[other] < end and begin < offsets[other] + sizes[other]:
            return distance
    return count
