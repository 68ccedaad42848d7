"""Where streamed units lie in a fixed memory that they pass through: a pure placement, and the memory itself.

A sweep visits the same units in the same order for ever, so every unit gets one fixed place in the arena, the same in
each sweep. What may be overwritten when is then known beforehand: a unit waits for the last unit before it, counted
cyclically, that shares bytes with it.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ClosedError

if TYPE_CHECKING:
    import torch

PAGE = 4096


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


def place(sizes: Sequence[int], capacity: int) -> list[Place]:
    """Lay out a cyclic schedule of units in ``capacity`` bytes, one after the other, wrapping at the end.

    Raises
    ------
    ValueError
        If a unit alone is larger than the arena.
    """
    offsets, cursor = [], 0
    for index, size in enumerate(sizes):
        room = align(size)
        if room > capacity:
            raise ValueError(f"unit {index} takes {room:,} bytes, the arena has {capacity:,}")
        if cursor + room > capacity:
            cursor = 0
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


class HostArena:
    """Page-aligned anonymous host memory in one mapping, given back on :meth:`close`.

    Parameters
    ----------
    nbytes
        Size; rounded up to a page.
    pin
        Lock it, so that copies to a GPU run at the speed of the link. Where the system refuses, the memory stays
        pageable and :attr:`pinned` says so.
    """

    def __init__(self, nbytes: int, pin: bool = False):
        import torch

        self.nbytes = align(max(nbytes, PAGE))
        self._map: mmap.mmap | None = mmap.mmap(-1, self.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Fewer page faults: reading into fresh memory is faster with huge pages; a refusal changes nothing.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._tensor: torch.Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)
        self.pinned = pin and _register(self._tensor)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """A uint8 tensor over ``nbytes`` from ``offset``; valid until :meth:`close`."""
        if self._tensor is None:
            raise ClosedError("the host memory was given back")
        return self._tensor[offset : offset + nbytes]

    def close(self) -> None:
        """Unlock and drop the memory; it is unmapped when the last view of it is gone."""
        if self._tensor is not None and self.pinned:
            import torch

            torch.cuda.cudart().cudaHostUnregister(self._tensor.data_ptr())
        self._tensor = self._map = None


def _register(memory: torch.Tensor) -> bool:
    """Lock existing pages for the GPU. Registering is faster than CUDA's own allocation, and rounds nothing up."""
    import torch

    # Pages are locked faster when they are there already.
    memory[::PAGE].zero_()
    return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0
