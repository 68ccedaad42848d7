"""Which experts of a layer are in its slots: least recently used out first. A state machine over numbers, no bytes.

The kernel that keeps the same tables on a device (``encoding/kernels/triton_slots.py``) is tested against this one.
"""

from __future__ import annotations

from collections.abc import Iterable


class LRU:
    """Slots for whole experts of one layer.

    Experts of one call are used in the order in which it first names them. Slots fill from the first on; then what was
    used longest ago leaves, but nothing that the call names.

    Parameters
    ----------
    experts
        How many there are; other ids are padding and have no slot.
    slots
        How many of them have room.

    Attributes
    ----------
    hits, misses
        Experts of all calls that were there, and that were not; one that a call repeats is counted once.
    """

    def __init__(self, experts: int, slots: int):
        self.experts, self.slots = experts, slots
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.hits = self.misses = 0
        self._slot_of: dict[int, int] = {}  # from what was used longest ago on
        self._free = list(range(self.slots))[::-1]

    def ensure(self, ids: Iterable[int]) -> tuple[list[int], dict[int, int]]:
        """Give each of these experts a slot.

        Returns
        -------
        slots
            Of each id, in their order; -1 of padding.
        missing
            Expert → slot of what has to be brought there, in order of use.

        Raises
        ------
        ValueError
            More experts than there are slots; nothing is changed then.
        """
        ids = list(ids)
        wanted = dict.fromkeys(expert for expert in ids if 0 <= expert < self.experts)
        if len(wanted) > self.slots:
            raise ValueError(f"{len(wanted)} experts do not fit into {self.slots} slots")
        # What is left when these are out is what may leave.
        there = {expert: self._slot_of.pop(expert) for expert in wanted if expert in self._slot_of}
        missing = {expert: self._room() for expert in wanted if expert not in there}
        self._slot_of |= {expert: there[expert] if expert in there else missing[expert] for expert in wanted}
        self.hits += len(there)
        self.misses += len(missing)
        return [self._slot_of.get(expert, -1) for expert in ids], missing

    def _room(self) -> int:
        """A free slot, or that of the expert that was used longest ago."""
        return self._free.pop() if self._free else self._slot_of.pop(next(iter(self._slot_of)))

    def forget(self, experts: Iterable[int]) -> None:
        """Of these nothing is there, after all: bringing them has failed."""
        for expert in experts:
            if expert in self._slot_of:
                self._free.append(self._slot_of.pop(expert))

    @property
    def free(self) -> int:
        """Slots that no expert is in."""
        return len(self._free)

    @property
    def cached(self) -> dict[int, int]:
        """Expert → slot, from what was used longest ago on; a copy."""
        return dict(self._slot_of)
