"""What goes where, and how long a sweep will take: a pure function of sizes, budgets and bandwidths.

Time model: ``sweep = max(disk bytes / disk bandwidth, (ram + disk bytes) / link bandwidth, compute)``. Memory is given
out in the order of what it saves: fixed needs, an arena that keeps the link busy, then resident units; what is left
streams, from a fixed RAM set as far as the RAM budget goes, else from disk, the disk units spread evenly so that
reading one overlaps with copying many.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import format_bytes, format_seconds, size_option
from ..errors import BudgetError
from ..stream.ring import LOCKED, PAGEABLE, align, host_room

# Units in flight that keep a link busy: one computing, one arriving, one waiting.
IN_FLIGHT = 3


@dataclass(frozen=True)
class UnitSize:
    """What the plan knows of a unit: its name, bytes, and ``"block"``, ``"head"`` or ``"embedding"``."""

    name: str
    nbytes: int
    kind: str = "block"


@dataclass(frozen=True)
class Needs:
    """Device bytes that are no streamed weights.

    Attributes
    ----------
    small
        Norms, biases, buffers.
    kv_cache, activations, scratch
        For the planned length and batch; dequantisation and casts.
    """

    small: int = 0
    kv_cache: int = 0
    activations: int = 0
    scratch: int = 0

    @property
    def total(self) -> int:
        return self.small + self.kv_cache + self.activations + self.scratch


@dataclass(frozen=True)
class Machine:
    """What the machine can do; bytes a second.

    Attributes
    ----------
    has_device
        Weights are copied to a memory of its own (a GPU); ``False`` where compute runs on host memory.
    disk, link, memory
        Bandwidth of reading the checkpoint, of copying host to device, and of the memory that compute reads.
    ram
        How RAM units lie in host memory, see :mod:`~airllm_nb.stream.memory`.
    direct
        Files are read past the page cache.
    overhead
        Seconds a forward that no weights account for: launching its operations, norms, attention.
    """

    has_device: bool
    disk: float
    link: float
    memory: float
    ram: str = LOCKED
    direct: bool = False
    overhead: float = 0.0

    @property
    def copies_ram(self) -> bool:
        """Whether RAM units pass through the ring as those on disk do."""
        return self.has_device and self.ram == PAGEABLE


@dataclass(frozen=True)
class ResidencyPlan:
    """Where every unit lives between sweeps, and the predicted time of a sweep.

    Attributes
    ----------
    units, tiers
        In the order of the schedule; a tier is ``"gpu"``, ``"ram"`` or ``"disk"``.
    arena_bytes, ring_bytes
        Device memory that streamed units pass through, and host memory that disk units pass through.
    """

    units: tuple[UnitSize, ...]
    tiers: tuple[str, ...]
    needs: Needs
    machine: Machine
    vram_budget: int
    ram_budget: int
    arena_bytes: int
    ring_bytes: int

    def tier_bytes(self, tier: str) -> int:
        """Bytes of the units in one tier."""
        return sum(unit.nbytes for unit, where in zip(self.units, self.tiers, strict=True) if where == tier)

    def swept_bytes(self, *tiers: str) -> int:
        """Bytes of the tiers' units that a sweep reads whole; of embedding tables it reads rows only."""
        placed = zip(self.units, self.tiers, strict=True)
        return sum(unit.nbytes for unit, tier in placed if tier in tiers and unit.kind != "embedding")

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross the link in a sweep (that come from disk, where there is no link)."""
        return self.swept_bytes("ram", "disk") if self.machine.has_device else self.swept_bytes("disk")

    @property
    def device_bytes(self) -> int:
        """Device memory that the plan uses."""
        return self.needs.total + self.arena_bytes + self.tier_bytes("gpu")

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds a sweep that each resource needs by itself."""
        overhead, products = self.machine.overhead, self.swept_bytes("gpu", "ram", "disk") / self.machine.memory
        # A GPU computes while the host launches; a CPU does one after the other.
        compute = max(overhead, products) if self.machine.has_device else overhead + products
        seconds = {"disk": self.swept_bytes("disk") / self.machine.disk, "compute": compute}
        if self.machine.has_device:
            seconds["link"] = self.streamed_bytes / self.machine.link
        return seconds

    @property
    def bound_by(self) -> str:
        """The resource that bounds a sweep: ``"disk"``, ``"link"`` or ``"compute"``."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def sweep_seconds(self) -> float:
        """Predicted seconds a sweep: of one forward, so of one token without speculation."""
        return max(self.bounds.values())

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {
            "tiers": {
                tier: {"bytes": self.tier_bytes(tier), "units": self.tiers.count(tier)}
                for tier in ("gpu", "ram", "disk")
            },
            "device_bytes": self.device_bytes,
            "arena_bytes": self.arena_bytes,
            "ring_bytes": self.ring_bytes,
            "kv_cache_bytes": self.needs.kv_cache,
            "activation_bytes": self.needs.activations,
            "scratch_bytes": self.needs.scratch,
            "small_bytes": self.needs.small,
            "vram_budget": self.vram_budget if self.machine.has_device else None,
            "ram_budget": self.ram_budget,
            "sweep_seconds": self.sweep_seconds,
            "bound_by": self.bound_by,
        }

    def table(self) -> str:
        """One row a unit: name, bytes, tier."""
        width = max([len(unit.name) for unit in self.units] + [4])
        rows = [
            f"{unit.name:<{width}} {format_bytes(unit.nbytes):>10}  {tier}"
            for unit, tier in zip(self.units, self.tiers, strict=True)
        ]
        return "\n".join(rows)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """A label and what is planned, for people; the prediction is the last."""
        parts = [f"{tier} {format_bytes(self.tier_bytes(tier))} ({self.tiers.count(tier)} units)"
                 for tier in ("gpu", "ram", "disk") if tier in self.tiers]  # fmt: skip
        rows = [("weights", " | ".join(parts))]
        if self.machine.has_device:
            rows.append((
                "VRAM",
                f"{format_bytes(self.device_bytes)} of {format_bytes(self.vram_budget)}: "
                f"KV cache {format_bytes(self.needs.kv_cache)}, "
                f"activations {format_bytes(self.needs.activations)}, "
                f"scratch {format_bytes(self.needs.scratch)}, arena {format_bytes(self.arena_bytes)}",
            ))  # fmt: skip
        host = self.tier_bytes("ram") + self.ring_bytes
        rows.append(("RAM", f"{format_bytes(host)} of {format_bytes(self.ram_budget)}"))
        return [*rows, ("predicted", f"{format_seconds(self.sweep_seconds)} a token ({self.bound_by}-bound)")]

    def __str__(self) -> str:
        return "\n".join(f"{label:<10}{text}" for label, text in self.rows)


def make_plan(
    units: Sequence[UnitSize], needs: Needs, machine: Machine, vram_budget: int, ram_budget: int
) -> ResidencyPlan:
    """Place every unit once, within both budgets.

    Parameters
    ----------
    units
        In the order of the schedule.
    needs
        Device memory that is no streamed weights.
    machine
        Bandwidths, and whether there is a device memory at all.
    vram_budget, ram_budget
        Bytes. Where ``machine.has_device`` is false only ``ram_budget`` counts.

    Raises
    ------
    BudgetError
        If nothing fits; the message says the smallest budget that does.
    """
    tiers, arena = _place_on_device(units, needs, vram_budget) if machine.has_device else ([""] * len(units), 0)
    ring = _place_in_host(units, tiers, ram_budget, machine.copies_ram)
    return ResidencyPlan(tuple(units), tuple(tiers), needs, machine, vram_budget, ram_budget, arena, ring)


def _place_on_device(units: Sequence[UnitSize], needs: Needs, budget: int) -> tuple[list[str], int]:
    left, sizes = budget - needs.total, [align(unit.nbytes) for unit in units]
    if sum(sizes) <= left:
        return ["gpu"] * len(units), 0
    order = _order(units)
    largest = max(sizes[index] for index in order)
    if largest > left:
        smallest = needs.total + largest
        raise BudgetError(f"vram_budget={format_bytes(budget)} is too small for this model; the smallest that works is "
                          f"{size_option(smallest)} ({format_bytes(needs.total)} for KV cache, activations, scratch "
                          f"and norms, {format_bytes(largest)} for the largest unit); shorten max_seq_len or "
                          "raise the budget", "vram_budget")  # fmt: skip
    # The head is the largest unit of many models: once it is resident, it needs no room in the arena.
    heads = [index for index in order if units[index].kind == "head"]
    blocks = window([sizes[index] for index in sorted(order) if index not in heads])
    if sum(sizes[index] for index in heads) + blocks <= left:
        resident = _prefix(order, sizes, left - blocks)
    else:
        resident = _prefix(heads, sizes, left - window([sizes[index] for index in sorted(order)]))
    streamed = [sizes[index] for index in sorted(order) if index not in resident]
    arena = min(window(streamed), left - sum(sizes[index] for index in resident))
    return ["gpu" if index in resident else "" for index in range(len(units))], arena


def _place_in_host(units: Sequence[UnitSize], tiers: list[str], budget: int, copies_ram: bool) -> int:
    """Fill ``tiers`` with ``"ram"`` and ``"disk"`` where they are empty; returns the bytes of the ring."""
    sizes = [align(unit.nbytes) for unit in units]
    tables = [index for index, tier in enumerate(tiers) if not tier and units[index].kind == "embedding"]
    order = _order(units)
    rest = [index for index in order if not tiers[index]]
    # Of all units, whichever stream: so that more VRAM never makes the ring larger.
    most = window([host_room(sizes[index]) for index in sorted(order)])
    ring = most if copies_ram and rest else 0
    left = budget - ring - sum(sizes[index] for index in rest)
    for index in [*rest, *tables]:
        # Only rows of a table are read, from the mapped file: it takes what is left, or no place at all.
        tiers[index] = "ram" if left >= 0 and (index in rest or sizes[index] <= left) else "disk"
    if left >= 0:
        return ring
    largest = max(host_room(sizes[index]) for index in rest)
    if largest > budget:
        raise BudgetError(f"ram_budget={format_bytes(budget)} is too small for this model; the smallest that works is "
                          f"{size_option(largest)}, for the largest unit that passes through it",
                          "ram_budget")  # fmt: skip
    for index in _prefix(rest, sizes, budget - most):
        tiers[index] = "ram"
    return min(most, budget)


def window(sizes: Sequence[int]) -> int:
    """The most bytes that neighbours in the cyclic schedule have together, as many as are in flight."""
    if not sizes:
        return 0
    count = min(IN_FLIGHT, len(sizes))
    return max(sum(sizes[(first + step) % len(sizes)] for step in range(count)) for first in range(len(sizes)))


def _order(units: Sequence[UnitSize]) -> list[int]:
    """What streams, first what is best kept: the head, then blocks, each as far from those before it as can be.

    Every tier takes what comes next in this order, so that more memory never takes fewer bytes, and what is left to the
    disk is spread evenly over the schedule.
    """
    heads = [index for index, unit in enumerate(units) if unit.kind == "head"]
    blocks = [index for index, unit in enumerate(units) if unit.kind == "block"]
    bits = max(len(blocks) - 1, 1).bit_length()
    return heads + [blocks[at] for at in sorted(range(len(blocks)), key=lambda at: int(f"{at:0{bits}b}"[::-1], 2))]


def _prefix(order: Sequence[int], sizes: Sequence[int], room: int) -> set[int]:
    """The first units in ``order`` that fit ``room`` together."""
    total = itertools.accumulate(sizes[index] for index in order)
    return {index for index, end in zip(order, total, strict=True) if end <= room}
