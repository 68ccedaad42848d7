"""Staging: device memory that experts without a slot pass through, those of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .bank import Bank, Slots
from .copier import Copied, Copier, Mark
from .experts import Source
from .unit import ALIGNMENT


@dataclass
class Round:
    """Experts that are computed with together.

    Attributes
    ----------
    slots, experts
        Where they are, and in which slot each of them is.
    copied
        What compute waits for.
    """

    slots: Slots
    experts: dict[int, int]
    copied: Copied | None = None


class Staging:
    """Two halves of device memory that experts without a slot pass through in turn, those of all layers.

    Parameters
    ----------
    memory
        Where compute runs, uint8.
    """

    def __init__(self, memory: torch.Tensor):
        half = len(memory) // 2 // ALIGNMENT * ALIGNMENT
        self._whole, self._halves = memory, (memory[:half], memory[half : 2 * half])
        self._used: list[Mark | None] = [None, None]
        self._next = 0
        self._lent_by: Copier | None = None
        # Copied ahead of its layer: the bank, and the round.
        self._ahead: tuple[Bank, Round] | None = None

    def room(self, bank: Bank) -> int:
        """Experts of a round."""
        return max(min(bank.fitting(len(half)) for half in self._halves), 1)

    def as_slots(self, bank: Bank) -> Slots:
        """All of it as slots, for what a layer needs at once and nobody needs afterwards."""
        return Slots(bank, self._whole, min(bank.fitting(len(self._whole)), bank.experts))

    def lend(self, copier: Copier) -> None:
        """Nothing is on its way here any more, where :meth:`as_slots` is written to next."""
        if self._ahead is not None and (copied := self._ahead[1].copied) is not None:
            copier.wait(copied.end)
        self._ahead, self._lent_by = None, copier

    def issue(self, bank: Bank, experts: Sequence[int], source: Source) -> Round:
        """Copy experts into the half whose turn it is."""
        number, self._next = self._next, 1 - self._next
        slots = Slots(bank, self._halves[number], len(experts))
        self._ahead = None  # it may be what is overwritten
        wanted = [(expert, slot) for slot, expert in enumerate(experts)]
        if self._lent_by is not None:  # kernels that are queued may still read both halves
            self._used, self._lent_by = [self._lent_by.mark()] * 2, None
        return Round(slots, dict(wanted), source.load(wanted, slots, self._used[number]))

    def issue_ahead(self, bank: Bank, experts: Sequence[int], source: Source) -> Round:
        """The same for the layer that comes next, of whose routing nothing is known yet."""
        made = self.issue(bank, experts, source)
        self._ahead = bank, made
        return made

    def take_ahead(self, bank: Bank) -> Round | None:
        """What was copied ahead for ``bank``, if it is still there."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] is bank else None

    def done(self, used: Round, mark: Mark) -> None:
        """Compute on a round is queued, up to ``mark``."""
        for number, half in enumerate(self._halves):
            if used.slots.memory is half:
                self._used[number] = mark
