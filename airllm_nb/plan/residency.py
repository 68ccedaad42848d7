"""What goes where, and how long a sweep will take; :mod:`.placement` makes it of sizes, budgets and bandwidths.

Time model: ``sweep = max(disk bytes / disk bandwidth, (ram + disk bytes) / link bandwidth, compute)``, where of experts
those bytes count that a token is routed to and that are expected not to be cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import format_bytes, format_seconds
from ..stream.ring import LOCKED, PAGEABLE
from .experts import Experts

# Of the overhead, what is left where a step is replayed: measured of models of 1B to 30B on a fast GPU.
_REPLAYED = 0.18


@dataclass(frozen=True)
class UnitSize:
    """What the plan knows of a unit.

    ``kind`` is ``"block"``, ``"head"``, ``"embedding"`` or, with ``experts``, ``"experts"``.
    """

    name: str
    nbytes: int
    kind: str = "block"
    experts: Experts | None = None


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
    replays
        Decode steps that wait for nothing are replayed, and launch nothing.
    """

    has_device: bool
    disk: float
    link: float
    memory: float
    ram: str = LOCKED
    direct: bool = False
    overhead: float = 0.0
    replays: bool = False

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
    slots, host_slots
        Experts of each unit that are kept where compute runs, and in host memory before it; 0 for others.
    staging_bytes
        Memory where compute runs that experts without a slot pass through.
    """

    units: tuple[UnitSize, ...]
    tiers: tuple[str, ...]
    needs: Needs
    machine: Machine
    vram_budget: int
    ram_budget: int
    arena_bytes: int
    ring_bytes: int
    slots: tuple[int, ...] = ()
    host_slots: tuple[int, ...] = ()
    staging_bytes: int = 0

    def slots_of(self, name: str) -> int:
        """Experts of a unit that are kept where compute runs."""
        return self._by_name(self.slots).get(name, 0)

    def host_slots_of(self, name: str) -> int:
        """Experts of a unit that are kept in host memory, before a link."""
        return self._by_name(self.host_slots).get(name, 0)

    def _by_name(self, counts: tuple[int, ...]) -> dict[str, int]:
        return {unit.name: count for unit, count in zip(self.units, counts, strict=True)} if counts else {}

    @property
    def slots_bytes(self) -> int:
        """Bytes of experts that are kept where compute runs, of layers that are not there whole."""
        return sum(count * bank.nbytes for bank, count in self._banked)

    @property
    def _placed(self) -> list[tuple[UnitSize, str]]:
        return list(zip(self.units, self.tiers, strict=True))

    def tier_bytes(self, tier: str) -> int:
        """Bytes of the units in one tier."""
        return sum(unit.nbytes for unit, where in zip(self.units, self.tiers, strict=True) if where == tier)

    def swept_bytes(self, *tiers: str) -> int:
        """Bytes of the tiers' units that a sweep reads; rows of embedding tables, and experts of one token."""
        placed = zip(self.units, self.tiers, strict=True)
        return sum(
            unit.experts.used if unit.experts else unit.nbytes
            for unit, tier in placed if tier in tiers and unit.kind != "embedding"
        )  # fmt: skip

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross the link in a sweep (that come from disk, where there is no link)."""
        return sum(self._moved("ram", "disk") if self.machine.has_device else self._moved("disk"))

    def _moved(self, *tiers: str) -> tuple[int, int]:
        """Bytes of the tiers' units that a sweep moves: all, and of experts those of one token expected to miss."""
        slots, host = (counts or (0,) * len(self.units) for counts in (self.slots, self.host_slots))
        dense, experts = 0, 0
        for unit, tier, count, kept in zip(self.units, self.tiers, slots, host, strict=True):
            if tier in tiers and unit.experts:
                experts += int(unit.experts.moved(count, kept if "ram" not in tiers else 0))
            elif tier in tiers and unit.kind != "embedding":
                dense += unit.nbytes
        return dense, experts

    @property
    def device_bytes(self) -> int:
        """Device memory that the plan uses."""
        experts = self.slots_bytes + self.staging_bytes if self.machine.has_device else 0
        return self.needs.total + self.arena_bytes + self.tier_bytes("gpu") + experts

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds a sweep that each resource needs by itself."""
        overhead, products = self.machine.overhead, self.swept_bytes("gpu", "ram", "disk") / self.machine.memory
        if self.machine.replays and all(tier == "gpu" or unit.experts for unit, tier in self._placed):
            overhead *= _REPLAYED
        # A GPU computes while the host launches; a CPU does one after the other.
        compute = max(overhead, products) if self.machine.has_device else overhead + products
        seconds = {"disk": sum(self._moved("disk")) / self.machine.disk, "compute": compute}
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
        experts_on_disk, experts = self._moved("disk")[1], self._moved("ram", "disk")[1]
        # They are asked for when their layer is reached, and compute waits for them: nothing is beside that.
        alone = {"disk": experts_on_disk / self.machine.disk, "link": experts / self.machine.link, "compute": 0.0}
        return max(seconds - alone[name] for name, seconds in self.bounds.items()) + max(
            alone[name] for name in self.bounds
        )

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
            "experts_bytes": self.slots_bytes,
            "staging_bytes": self.staging_bytes,
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
                f"scratch {format_bytes(self.needs.scratch)}, "
                f"arena {format_bytes(self.arena_bytes + self.staging_bytes)}",
            ))  # fmt: skip
        if self._banked:
            rows.append(("experts", self._experts_row()))
        rows.append(("RAM", f"{format_bytes(self.host_bytes)} of {format_bytes(self.ram_budget)}"))
        return [*rows, ("predicted", f"{format_seconds(self.sweep_seconds)} a token ({self.bound_by}-bound)")]

    @property
    def host_bytes(self) -> int:
        """Host memory that the plan uses."""
        kept = self.slots_bytes if not self.machine.has_device else 0
        for unit, tier, count in zip(self.units, self.tiers, self.host_slots or (0,) * len(self.units), strict=True):
            kept += count * unit.experts.nbytes if unit.experts and tier == "disk" else 0
        return self.tier_bytes("ram") + self.ring_bytes + kept + (0 if self.machine.has_device else self.staging_bytes)

    @property
    def _banked(self) -> list[tuple[Experts, int]]:
        """Of each layer whose experts are not all where compute runs, what it has and how many are kept there."""
        there = "gpu" if self.machine.has_device else "ram"
        placed = zip(self.units, self.tiers, self.slots or (0,) * len(self.units), strict=True)
        return [(unit.experts, count) for unit, tier, count in placed if unit.experts and tier != there]

    def _experts_row(self) -> str:
        banked = self._banked
        cached, every = sum(count for _, count in banked), sum(bank.count for bank, _ in banked)
        used, moved = sum(bank.used for bank, _ in banked), sum(bank.moved(count) for bank, count in banked)
        kept = f"{cached:,} of {every:,} cached ({format_bytes(self.slots_bytes)})"
        return f"{kept}; a token uses {format_bytes(used)}, of which {format_bytes(int(moved))} move"

    def __str__(self) -> str:
        return "\n".join(f"{label:<10}{text}" for label, text in self.rows)
