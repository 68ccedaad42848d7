"""The residency plan as a pure function of sizes, budgets and bandwidths.

Memory is given out in the order of what it saves: fixed needs, an arena that keeps the link busy, then resident units,
then slots for experts; what is left streams, from a fixed RAM set as far as the RAM budget goes, else from disk, the
disk units spread evenly so that reading one overlaps with copying many.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ..config import format_bytes, size_option
from ..errors import BudgetError
from ..stream.ring import align, host_room
from . import experts as caching
from .experts import Experts
from .residency import Machine, Needs, ResidencyPlan, UnitSize

# Units in flight that keep a link busy: one computing, one arriving, one waiting.
IN_FLIGHT = 3


def make_plan(
    units: Sequence[UnitSize], needs: Needs, machine: Machine, vram_budget: int, ram_budget: int, spare: int = 0
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
    spare
        Bytes of the device that slots for experts leave free.

    Raises
    ------
    BudgetError
        If nothing fits; the message says the smallest budget that does.
    """
    tiers, arena = [""] * len(units), 0
    slots, staging = [0] * len(units), 0
    if machine.has_device:
        tiers, arena, slots, staging = _place_on_device(units, needs, vram_budget, spare)
    host = _place_in_host(units, tiers, ram_budget, machine)
    kept = host.slots
    if not machine.has_device:  # what is kept is computed with where it is
        slots, kept, staging = host.slots, [0] * len(units), host.staging
    return ResidencyPlan(tuple(units), tuple(tiers), needs, machine, vram_budget, ram_budget, arena, host.ring,
                         tuple(slots), tuple(kept), staging)  # fmt: skip


def _place_on_device(
    units: Sequence[UnitSize], needs: Needs, budget: int, spare: int
) -> tuple[list[str], int, list[int], int]:
    """The tiers, bytes of the arena, slots, and bytes of staging."""
    left, sizes = budget - needs.total, [align(unit.nbytes) for unit in units]
    if sum(sizes) <= left:
        return ["gpu"] * len(units), 0, [0] * len(units), 0
    order, banks = _order(units), _banks(units)
    largest, (_, least) = max((sizes[index] for index in order), default=0), caching.staging(list(banks.values()), 0)
    if largest + least > left:
        smallest = needs.total + largest + least
        what = f"{format_bytes(largest)} for the largest unit" + (
            f", {format_bytes(least)} for experts" if least else ""
        )
        raise BudgetError(f"vram_budget={format_bytes(budget)} is too small for this model; the smallest that works is "
                          f"{size_option(smallest)} ({format_bytes(needs.total)} for KV cache, activations, scratch "
                          f"and norms, {what}); shorten max_seq_len or raise the budget", "vram_budget")  # fmt: skip
    for stay in ({*range(len(units))} - {*banks}, {*order}) if banks else ():  # all but experts; without tables
        room = left - sum(sizes[index] for index in stay)
        if least <= room:
            staging, _ = caching.staging(list(banks.values()), room // 4)
            room -= staging
            return _with_slots(units, stay, 0, staging, room - spare if room >= spare else room)
    left -= least
    # The head is the largest unit of many models: once it is resident, it needs no room in the arena.
    heads = [index for index in order if units[index].kind == "head"]
    blocks = window([sizes[index] for index in sorted(order) if index not in heads])
    if sum(sizes[index] for index in heads) + blocks <= left:
        resident = _prefix(order, sizes, left - blocks)
    else:
        resident = _prefix(heads, sizes, left - window([sizes[index] for index in sorted(order)]))
    streamed = [sizes[index] for index in sorted(order) if index not in resident]
    arena = min(window(streamed), left - sum(sizes[index] for index in resident))
    return _with_slots(units, resident, arena, least, left - arena - sum(sizes[index] for index in resident))


def _with_slots(
    units: Sequence[UnitSize], resident: set[int], arena: int, staging: int, room: int
) -> tuple[list[str], int, list[int], int]:
    """Give what is left to experts."""
    banks, slots = _banks(units), [0] * len(units)
    for index, count in zip(banks, caching.share(room, list(banks.values())), strict=True):
        slots[index] = count
    return ["gpu" if index in resident else "" for index in range(len(units))], arena, slots, staging


def _banks(units: Sequence[UnitSize]) -> dict[int, Experts]:
    return {index: unit.experts for index, unit in enumerate(units) if unit.experts}


class _Host(NamedTuple):
    """Bytes of the ring; experts of each unit that stay in host memory, and where compute is there, its staging."""

    ring: int
    slots: list[int]
    staging: int = 0


def _place_in_host(units: Sequence[UnitSize], tiers: list[str], budget: int, machine: Machine) -> _Host:
    """Fill ``tiers`` with ``"ram"`` and ``"disk"`` where they are empty."""
    sizes = [align(unit.nbytes) for unit in units]
    tables = [index for index, tier in enumerate(tiers) if not tier and units[index].kind == "embedding"]
    order, banks = _order(units), {index: bank for index, bank in _banks(units).items() if not tiers[index]}
    rest = [index for index in order if not tiers[index]]
    # Of all units, whichever stream: so that more VRAM never makes the ring larger.
    most = window([host_room(sizes[index]) for index in sorted(order)])
    ring = most if machine.copies_ram and rest else 0
    left = budget - ring - sum(sizes[index] for index in [*rest, *banks])
    for index in [*rest, *banks, *tables]:
        # Only rows of a table are read, from the mapped file: it takes what is left, or no place at all.
        tiers[index] = "ram" if left >= 0 and (index not in tables or sizes[index] <= left) else "disk"
    if left >= 0:
        return _Host(ring, [0] * len(units))
    return _beside_disk(units, tiers, budget, machine, rest, banks, most)


def _beside_disk(
    units: Sequence[UnitSize], tiers: list[str], budget: int, machine: Machine, rest: list[int],
    banks: dict[int, Experts], most: int,
) -> _Host:  # fmt: skip
    """Not all fits: first what every token needs, then experts that may be asked for."""
    sizes, every = [align(unit.nbytes) for unit in units], list(banks.values())
    if machine.has_device:  # one expert at a time passes to the device
        staging, passing = 0, max((align(bank.nbytes) for bank in every), default=0)
    else:
        staging, _ = caching.staging(every, budget // 8)
        passing = staging
    largest = max((host_room(sizes[index]) for index in rest), default=0)
    if largest + passing > budget:
        raise BudgetError(f"ram_budget={format_bytes(budget)} is too small for this model; the smallest that works is "
                          f"{size_option(largest + passing)}, for the largest unit that passes through it",
                          "ram_budget")  # fmt: skip
    room = budget - passing
    dense = sum(sizes[index] for index in rest)
    ring = min(most, room) if rest and (machine.copies_ram or dense > room) else 0
    stay = set(rest) if dense + ring <= room else _prefix(rest, sizes, room - most)
    for index in stay:
        tiers[index] = "ram"
    room -= ring + sum(sizes[index] for index in stay)
    slots = [0] * len(units)
    for index, count in zip(banks, caching.share(room, every), strict=True):
        slots[index] = count
    return _Host(ring + (passing if machine.has_device else 0), slots, staging)


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
