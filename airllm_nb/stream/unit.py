"""The smallest thing that is streamed, seen as bytes: a name, a size, and the extents that fill it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..tensors.index import Extent

# Device kernels want 16-byte aligned rows; 256 is what the allocators of PyTorch and CUDA give.
ALIGNMENT = 256


@dataclass(frozen=True)
class Piece:
    """An extent and where its bytes go in the unit."""

    extent: Extent
    offset: int


@dataclass(frozen=True)
class Unit:
    """One unit: ``pieces`` fill ``nbytes`` of a slot. Gaps between pieces are padding and hold nothing.

    Where a CPU computes in the slot, it begins ``lead`` bytes into a cache line.
    """

    name: str
    nbytes: int
    pieces: tuple[Piece, ...]
    lead: int = 0

    @property
    def read_bytes(self) -> int:
        """Bytes that come from disk; less than ``nbytes`` by the padding."""
        return sum(piece.extent.nbytes for piece in self.pieces)


def merge(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Join neighbours that are contiguous both in the file and in the unit, so that they are read as one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.extent.path == piece.extent.path
            and last.extent.offset + last.extent.nbytes == piece.extent.offset
            and last.offset + last.extent.nbytes == piece.offset
        ):
            extent = Extent(last.extent.path, last.extent.offset, last.extent.nbytes + piece.extent.nbytes)
            joined[-1] = Piece(extent, last.offset)
        elif piece.extent.nbytes:
            joined.append(piece)
    return tuple(joined)
