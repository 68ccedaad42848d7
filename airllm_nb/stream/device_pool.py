"""Slots for whole experts of one layer in device memory, with tables that live there too.

What a token is routed to is looked up, makes room and is copied by kernels, from memory that the device can read: the
host learns nothing of it and waits for nothing, so that a graph of launches may hold it all. ``lru.py`` says what the
tables do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..encoding.kernels.slots import run

MOST_IDS = 64  # in a call
_PROGRAMS, _BLOCK = 128, 512  # of the kernel that copies: so many at a time, each 16 · so many bytes


@dataclass(frozen=True)
class BankPart:
    """One of the tensors that each expert of a layer has.

    Attributes
    ----------
    shape, dtype
        Of one expert's.
    addresses
        Of each expert's bytes, in memory that the device reads by the host's address: registered, or its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    addresses: Sequence[int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def width(self) -> int:
        """What every address and the size are a multiple of: 16 bytes at most."""
        return math.gcd(16, self.nbytes, *self.addresses)


@dataclass(frozen=True)
class Counts:
    """What a pool was asked for: experts of all calls that were there and that were not, and how often each."""

    hits: int
    misses: int
    routed: list[int]


class DevicePool:
    """A cache of experts that works without the host.

    Its memory is that of ``stacks`` and some kilobytes. The bytes at the addresses have to stay.

    Parameters
    ----------
    parts
        By attribute.
    slots
        How many experts have room.
    stacks
        Memory for the slots, where there is some already: of each part ``[slots, *shape]``, perhaps with gaps between
        slots.
    keeps
        Whether an expert stays for the next call; not where layers share the memory.

    Attributes
    ----------
    stacks
        Attribute → ``[slots, *shape]`` on the device.
    table_of_counts
        What :meth:`counts` reads, on the device.
    """

    def __init__(
        self, parts: Mapping[str, BankPart], experts: int, slots: int, device: torch.device,
        stacks: Mapping[str, torch.Tensor] | None = None, keeps: bool = True,
    ):  # fmt: skip
        if any(len(part.addresses) != experts for part in parts.values()):
            raise ValueError(f"each part needs the addresses of {experts} experts")
        self.experts, self.slots, self._keeps = experts, slots, keeps
        self.stacks = stacks if stacks is not None else {
            name: torch.empty(slots, *part.shape, dtype=part.dtype, device=device) for name, part in parts.items()
        }  # fmt: skip
        if any(self.stacks[name].shape != (slots, *part.shape) for name, part in parts.items()):
            raise ValueError("the stacks have another shape")
        strides = {name: stack.stride(0) * stack.itemsize for name, stack in self.stacks.items()}
        self._widths = tuple(
            math.gcd(part.width, strides[name], self.stacks[name].data_ptr()) for name, part in parts.items()
        )
        self._strides = torch.tensor([strides[name] for name in parts], dtype=torch.int64, device=device)
        rows = [list(part.addresses) for part in parts.values()]
        self._addresses = torch.tensor(rows, dtype=torch.int64, device=device)
        self._to = torch.tensor([self.stacks[name].data_ptr() for name in parts], dtype=torch.int64, device=device)
        self._sizes = torch.tensor([part.nbytes for part in parts.values()], dtype=torch.int64, device=device)
        absent, numbers = torch.full((experts + slots,), -1, dtype=torch.int32), torch.arange(slots, dtype=torch.int32)
        self._empty = torch.cat([absent, numbers]).to(device)
        self._tables = self._empty.clone()
        self._slot_of, self._expert_of, self._order = self._tables.split([experts, slots, slots])
        self._moves = torch.zeros(1 + 2 * MOST_IDS, dtype=torch.int32, device=device)
        self.table_of_counts = torch.zeros(2 + experts, dtype=torch.int64, device=device)

    def ensure_and_gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Bring the experts that are missing into slots.

        Parameters
        ----------
        ids
            Of an integer dtype, on the device; others than an expert's are padding.

        Returns
        -------
        torch.Tensor
            Of each id its slot, in int32; -1 of padding. Its shape is that of ``ids``.

        Raises
        ------
        ValueError
            More ids than may be asked for at once, or than there may be slots for.
        """
        number = ids.numel()
        if number > MOST_IDS or min(number, self.experts) > self.slots:
            raise ValueError(f"{number} experts of {self.experts} at once; {self.slots} slots, {MOST_IDS} ids at most")
        slots = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
        if not number:
            return slots
        try:
            self._ensure(ids.contiguous(), slots)
            self._gather(number)
        except BaseException:  # Ctrl-C too: the tables would say what was never copied
            self._tables.copy_(self._empty)
            raise
        return slots

    def _ensure(self, ids: torch.Tensor, slots: torch.Tensor) -> None:
        from ..encoding.kernels import triton_slots

        run(triton_slots.ensure, (1,), slots, ids, self._slot_of, self._expert_of, self._order, slots, self._moves,
            self.table_of_counts, self.table_of_counts[2:], ids.numel(), self.experts, self.slots,
            IDS=_power(ids.numel()), SLOTS=_power(self.slots), KEEPS=self._keeps,
            num_warps=4 if ids.numel() <= 16 else 8)  # fmt: skip

    def _gather(self, number: int) -> None:
        """What was found missing among so many ids."""
        from ..encoding.kernels import triton_slots

        run(triton_slots.gather, (_PROGRAMS,), self._moves, self._moves, self._addresses, self._to, self._sizes,
            self._strides, self.experts, IDS=_power(number), WIDTHS=self._widths, BLOCK=_BLOCK)  # fmt: skip

    def counts(self) -> Counts:
        """Since the beginning, or :meth:`reset`; waits for the device."""
        hits, misses, *routed = self.table_of_counts.tolist()
        return Counts(hits, misses, routed)

    def cached(self) -> dict[int, int]:
        """Expert → slot, from what was used longest ago on; waits for the device."""
        experts = self._expert_of.tolist()
        return {experts[slot]: slot for slot in self._order.tolist() if experts[slot] >= 0}

    def reset(self) -> None:
        """Forget what is in the slots, and the counts; memory stays where it is, as graphs know it."""
        self._tables.copy_(self._empty)
        self.table_of_counts.zero_()


def _power(count: int) -> int:
    """A power of two that is no less."""
    return 1 << (count - 1).bit_length()
