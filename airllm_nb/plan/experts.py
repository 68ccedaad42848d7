"""What a cache of experts is worth, and how its slots are shared out: pure, like all of the plan.

Each layer has slots of its own for whole experts, of which the least recently used is given up. What has no slot passes
through staging, in rounds of some experts, two of which are there at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# Fraction of a layer's experts that are cached → share of the routed ones that are among them, on real text: published
# for caches of the least recently used (512 experts, 10 routed).
_HITS = ((0.0, 0.0), (0.18, 0.43), (0.36, 0.62), (0.54, 0.72), (0.73, 0.79), (1.0, 1.0))
# Bytes of a round, where single experts are not larger: enough that a copy runs at the speed of the link, and that
# launches are few. And what stacks take for their alignment, at most.
ROUND_BYTES, SLACK = 64 << 20, 4 << 10


@dataclass(frozen=True)
class Experts:
    """Of one layer: how many there are, how many a token is routed to, and the bytes of each."""

    count: int
    routed: int
    nbytes: int

    def moved(self, *slots: int) -> float:
        """Bytes a token that are not found in any of these caches, which hold the latest; so the largest counts."""
        most = max(slots, default=0)
        share = 0.0 if most < self.routed else hits(most / self.count)
        return self.used * (1 - share)

    @property
    def used(self) -> int:
        """Bytes that a token computes with."""
        return self.routed * self.nbytes


def hits(cached: float) -> float:
    """The share of routed experts that are found where this fraction of a layer's is cached."""
    for (low, worse), (high, better) in itertools.pairwise(_HITS):
        if cached <= high:
            return worse + (better - worse) * (cached - low) / (high - low)
    return 1.0


def staging(banks: Sequence[Experts], room: int) -> tuple[int, int]:
    """Bytes of staging in ``room``, and the least that it can do with: two rounds of an expert each."""
    least = 2 * max((bank.nbytes + SLACK for bank in banks), default=0)
    most = max((_round(bank) * bank.nbytes + SLACK for bank in banks), default=0)
    return max(min(2 * most, room), least), least


def _round(bank: Experts) -> int:
    # Of two halves, which together hold what a token is routed to.
    return min(max(ROUND_BYTES // bank.nbytes, -(-bank.routed // 2)), bank.count)


def share(room: int, banks: Sequence[Experts]) -> list[int]:
    """Slots of each layer, of ``room`` bytes: the same for all, but none for some where that would be too few.

    Fewer than a token is routed to would be overwritten before they are asked for again.
    """
    if not banks:
        return []
    room -= SLACK * len(banks)
    each = room // sum(bank.nbytes for bank in banks)
    if each >= max(bank.routed for bank in banks):
        return [min(each, bank.count) for bank in banks]
    slots = []
    for bank in banks:
        fits = bank.used <= room
        slots.append(bank.routed if fits else 0)
        room -= bank.used if fits else 0
    return slots
