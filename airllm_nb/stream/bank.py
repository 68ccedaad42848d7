"""The experts of one layer as bytes: equal sets of extents, and slots for whole experts.

A *bank* has E experts, and each expert a piece of every *part*: of a stack ``[E, rows, columns]``, or of the stacks
that such a one is packed in. *Slots* hold some of them, in one stack a part, which code that knows stacks computes on.
:mod:`.experts` fills them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..tensors.dtypes import torch_dtype
from ..tensors.index import Extent, TensorInfo
from .ring import align
from .unit import ALIGNMENT


class Part(NamedTuple):
    """What one expert has of a stack: the module's name of the stack, and its dtype, shape and bytes at rest.

    Where a CPU computes with it, it begins ``lead`` bytes into a cache line, as it does in its file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    lead: int = 0


class Run(NamedTuple):
    """Bytes of one expert that lie together: of which part, from where on in it, and where they are."""

    part: int
    offset: int
    extent: Extent


@dataclass(frozen=True)
class Bank:
    """The experts of one layer.

    Attributes
    ----------
    parts
        What each expert has.
    runs
        By expert, where that is.
    """

    name: str
    parts: tuple[Part, ...]
    runs: tuple[tuple[Run, ...], ...]

    @classmethod
    def of(cls, name: str, experts: int, stacks: Mapping[str, tuple[TensorInfo, int]]) -> Bank:
        """The bank of ``stacks``, by the module's names, each with its lead.

        The first dimension of each is ``experts`` or a multiple.
        """
        parts, runs = [], [list[Run]() for _ in range(experts)]
        for number, (attribute, (info, lead)) in enumerate(stacks.items()):
            shape = (info.shape[0] // experts, *info.shape[1:])
            parts.append(Part(attribute, torch_dtype(info), shape, info.nbytes // experts, lead))
            for expert, run in _split(number, info, info.nbytes // experts):
                runs[expert].append(run)
        return cls(name, tuple(parts), tuple(map(tuple, runs)))

    @property
    def experts(self) -> int:
        return len(self.runs)

    @property
    def expert_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def room(self, slots: int) -> int:
        """Bytes of so many slots."""
        return sum(align(part.lead + slots * part.nbytes, ALIGNMENT) for part in self.parts)

    def fitting(self, nbytes: int) -> int:
        """How many slots have room in ``nbytes``."""
        return max((nbytes - ALIGNMENT * len(self.parts)) // self.expert_bytes, 0)


def _split(number: int, info: TensorInfo, size: int) -> Iterable[tuple[int, Run]]:
    """The extents of a stack, cut where an expert of ``size`` bytes ends; each with its expert."""
    at = 0
    for extent in info.extents:
        done = 0
        while done < extent.nbytes:
            expert, offset = divmod(at + done, size)
            take = min(size - offset, extent.nbytes - done)
            yield expert, Run(number, offset, Extent(extent.path, extent.offset + done, take))
            done += take
        at += extent.nbytes


class Slots:
    """Room for some experts of a bank in ``memory`` (uint8): a stack a part.

    Attributes
    ----------
    stacks
        By part, as it is stored: ``[slots * shape[0], *shape[1:]]``.
    """

    def __init__(self, bank: Bank, memory: torch.Tensor, count: int):
        self.bank, self.count, self.memory = bank, count, memory
        self.stacks: list[torch.Tensor] = []
        self._starts: list[int] = []
        cursor = 0
        for part in bank.parts:
            start, nbytes = cursor + part.lead, count * part.nbytes
            stack = memory[start : start + nbytes].view(part.dtype)
            self.stacks.append(stack.view(count * part.shape[0], *part.shape[1:]))
            self._starts.append(start)
            cursor = align(start + nbytes, ALIGNMENT)

    @property
    def by_name(self) -> dict[str, torch.Tensor]:
        """The stacks, by the module's names."""
        return {part.name: stack for part, stack in zip(self.bank.parts, self.stacks, strict=True)}

    def at(self, run: Run, slot: int) -> int:
        """Where in the memory the bytes of ``run`` belong for an expert in ``slot``."""
        return self._starts[run.part] + slot * self.bank.parts[run.part].nbytes + run.offset

    def targets(self, run: Run) -> torch.Tensor:
        """Where the bytes of ``run`` belong, of every slot: ``[slots, nbytes]``."""
        start, size = self._starts[run.part], self.bank.parts[run.part].nbytes
        every = self.memory[start : start + self.count * size].view(self.count, size)
        return every[:, run.offset : run.offset + run.extent.nbytes]

    def target(self, run: Run, slot: int) -> torch.Tensor:
        start = self.at(run, slot)
        return self.memory[start : start + run.extent.nbytes]
