"""The residency plan as a pure function: within its budgets, never slower for more memory, honest when it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airllm_nb.config import parse_bytes
from airllm_nb.errors import BudgetError
from airllm_nb.plan.placement import make_plan
from airllm_nb.plan.residency import Machine, Needs, ResidencyPlan, UnitSize
from airllm_nb.stream.ring import PAGE, PAGEABLE, align, host_room, place

GPU = Machine(has_device=True, disk=2e9, link=20e9, memory=500e9)
CPU = Machine(has_device=False, disk=2e9, link=1e12, memory=20e9)
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@st.composite
def models(draw: st.DrawFn) -> list[UnitSize]:
    """A table, blocks of one size or of many, and perhaps a head."""
    block = st.integers(1, 200 * KIB) if draw(st.booleans()) else st.just(draw(st.integers(1, 200 * KIB)))
    units = [UnitSize(f"block {i}", size) for i, size in enumerate(draw(st.lists(block, min_size=1, max_size=24)))]
    if draw(st.booleans()):
        units.insert(0, UnitSize("table", draw(st.integers(1, MIB)), "embedding"))
    if draw(st.booleans()):
        units.append(UnitSize("head", draw(st.integers(1, MIB)), "head"))
    return units


NEEDS = st.builds(Needs, *[st.integers(0, 64 * KIB)] * 4)
BUDGETS = st.integers(0, 6 * MIB)
MACHINES = st.sampled_from([GPU, CPU, dataclasses.replace(GPU, ram=PAGEABLE)])


def enough(units: list[UnitSize], needs: Needs, vram: int, ram: int) -> tuple[int, int]:
    """Budgets so much above the smallest that work."""
    largest = max(unit.nbytes for unit in units if unit.kind != "embedding")
    return needs.total + align(largest) + vram, host_room(largest) + ram


def swept(plan: ResidencyPlan, tier: str) -> list[UnitSize]:
    placed = zip(plan.units, plan.tiers, strict=True)
    return [unit for unit, where in placed if where == tier and unit.kind != "embedding"]


@given(models(), NEEDS, MACHINES, BUDGETS, BUDGETS)
def test_every_unit_has_one_place_and_no_budget_is_exceeded(
    units: list[UnitSize], needs: Needs, machine: Machine, vram: int, ram: int
) -> None:
    vram, ram = enough(units, needs, vram, ram)
    plan = make_plan(units, needs, machine, vram, ram)
    assert list(plan.units) == units
    assert len(plan.tiers) == len(units)
    assert set(plan.tiers) <= ({"gpu", "ram", "disk"} if machine.has_device else {"ram", "disk"})
    if machine.has_device:
        resident = sum(align(unit.nbytes) for unit, tier in zip(units, plan.tiers, strict=True) if tier == "gpu")
        assert needs.total + plan.arena_bytes + resident <= vram
        assert plan.device_bytes <= vram
    assert sum(align(unit.nbytes) for unit in swept(plan, "ram")) + plan.ring_bytes <= ram


@given(models(), NEEDS, MACHINES, BUDGETS, BUDGETS)
def test_what_streams_fits_into_the_arena_and_the_ring(
    units: list[UnitSize], needs: Needs, machine: Machine, vram: int, ram: int
) -> None:
    vram, ram = enough(units, needs, vram, ram)
    plan = make_plan(units, needs, machine, vram, ram)
    from_disk = [unit.nbytes for unit in swept(plan, "disk")]
    through_ring = [u.nbytes for u in plan.units if u in [*swept(plan, "ram"), *swept(plan, "disk")]]
    place([host_room(size) for size in (through_ring if machine.copies_ram else from_disk)], plan.ring_bytes)
    if machine.has_device:
        streamed = [*swept(plan, "ram"), *swept(plan, "disk")]
        place([unit.nbytes for unit in plan.units if unit in streamed], plan.arena_bytes)


@settings(max_examples=300)
@given(models(), NEEDS, MACHINES, BUDGETS, BUDGETS, st.integers(0, 2 * MIB), st.integers(0, 2 * MIB))
def test_more_memory_is_never_slower(
    units: list[UnitSize], needs: Needs, machine: Machine, vram: int, ram: int, more_vram: int, more_ram: int
) -> None:
    vram, ram = enough(units, needs, vram, ram)
    plan = make_plan(units, needs, machine, vram, ram)
    for vram_now, ram_now in ((vram + more_vram, ram), (vram, ram + more_ram), (vram + more_vram, ram + more_ram)):
        richer = make_plan(units, needs, machine, vram_now, ram_now)
        # Memory is given out in pages: units that differ by less than one count as equal.
        page = PAGE / min(machine.disk, machine.link, machine.memory)
        assert richer.sweep_seconds <= plan.sweep_seconds * (1 + 1e-9) + page


@given(models(), NEEDS, MACHINES, BUDGETS, BUDGETS)
def test_the_budget_that_a_refusal_names_works(
    units: list[UnitSize], needs: Needs, machine: Machine, vram: int, ram: int
) -> None:
    budgets = {"vram": vram, "ram": ram}
    refused = {}
    for _ in range(3):
        try:
            make_plan(units, needs, machine, budgets["vram"], budgets["ram"])
            break
        except BudgetError as error:
            assert "\n" not in str(error)
            named, smallest = re.search(r"(v?ram)_budget=.* smallest that works is ([\d.]+ ?\w+)", str(error)).groups()
            assert named not in refused, f"{refused[named]} was named and is refused"
            refused[named] = smallest
            budgets[named] = parse_bytes(smallest)
    else:
        pytest.fail("still refused")


@given(models(), NEEDS, MACHINES, BUDGETS, BUDGETS)
def test_a_refusal_names_no_more_than_is_needed(
    units: list[UnitSize], needs: Needs, machine: Machine, vram: int, ram: int
) -> None:
    try:
        make_plan(units, needs, machine, vram, ram)
    except BudgetError as error:
        named, smallest = re.search(r"(v?ram)_budget=.* smallest that works is ([\d.]+ ?\w+)", str(error)).groups()
        less = int((parse_bytes(smallest) - (1 << 20)) * 0.9) - 200  # the name is rounded up to a MiB
        if less > 0:
            budgets = {"vram": vram, "ram": ram} | {named: less}
            with pytest.raises(BudgetError):
                make_plan(units, needs, machine, budgets["vram"], budgets["ram"])


@given(
    st.integers(14, 80), st.integers(16 * KIB, 64 * KIB), st.fractions(0, 1), st.sampled_from([GPU, CPU]), st.booleans()
)
def test_disk_units_are_spread_evenly(count: int, size: int, share, machine: Machine, resident_half: bool) -> None:
    units = [UnitSize(f"block {i}", size) for i in range(count)]
    resident = count // 2 if resident_half else 0
    # Room for the three in the ring and for some of those that stream, but not for all of them.
    kept = 1 + int(share * (count - resident - 5))
    plan = make_plan(units, Needs(), machine, (3 + resident) * align(size), 3 * host_room(size) + kept * align(size))
    streamed = [tier for tier in plan.tiers if tier != "gpu"]
    positions = [at for at, tier in enumerate(streamed) if tier == "disk"]
    assert 0 < len(positions) < len(streamed)
    even = len(streamed) / len(positions)
    gaps = [b - a for a, b in itertools.pairwise([*positions, positions[0] + len(streamed)])]
    assert max(gaps) <= 2 * even + 2
    # No run of disk units is longer than what an even spread would need, twice over.
    runs = [len(list(group)) for tier, group in itertools.groupby(streamed) if tier == "disk"]
    assert max(runs) <= 2 * len(positions) / max(len(streamed) - len(positions), 1) + 2


def test_everything_fits_on_the_device() -> None:
    units = [UnitSize("table", 10, "embedding"), UnitSize("block", 10), UnitSize("head", 10, "head")]
    plan = make_plan(units, Needs(small=5), GPU, GIB, 0)
    assert (plan.tiers, plan.arena_bytes, plan.ring_bytes) == (("gpu",) * 3, 0, 0)


def test_the_head_is_resident_before_blocks_are() -> None:
    units = [*[UnitSize(f"block {i}", MIB) for i in range(10)], UnitSize("head", 4 * MIB, "head")]
    plan = make_plan(units, Needs(), GPU, 7 * MIB, GIB)
    assert plan.tiers == ("ram",) * 10 + ("gpu",)


def test_half_of_the_ram_is_half_of_the_disk() -> None:
    units = [UnitSize(f"block {i}", 10 * MIB) for i in range(40)]
    seconds = [
        make_plan(units, Needs(), CPU, 0, 3 * host_room(10 * MIB) + n * 10 * MIB).bounds["disk"] for n in (0, 10, 20)
    ]
    assert seconds == pytest.approx([0.2097, 0.1573, 0.1049], rel=1e-3)


@pytest.mark.parametrize(
    ("vram", "ram", "bound_by"), [(GIB, GIB, "compute"), (64 * MIB, GIB, "link"), (64 * MIB, 64 * MIB, "disk")]
)
def test_the_slowest_link_bounds_the_sweep(vram: int, ram: int, bound_by: str) -> None:
    plan = make_plan([UnitSize(f"block {i}", 16 * MIB) for i in range(20)], Needs(), GPU, vram, ram)
    assert plan.bound_by == bound_by
    assert plan.sweep_seconds == plan.bounds[bound_by] == max(plan.bounds.values())


def test_a_plan_says_what_it_does() -> None:
    plan = make_plan(
        [UnitSize(f"block {i}", 16 * MIB) for i in range(20)], Needs(kv_cache=MIB), GPU, 100 * MIB, 80 * MIB
    )
    text, values = str(plan), plan.as_dict()
    assert "disk" in text and "KV cache 1.0 MiB" in text and "disk-bound" in text
    assert sum(tier["units"] for tier in values["tiers"].values()) == 20
    assert values["device_bytes"] <= values["vram_budget"] == 100 * MIB
    assert len(plan.table().splitlines()) == 20
    assert make_plan(plan.units, plan.needs, CPU, 0, GIB).as_dict()["vram_budget"] is None


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_a_model_of_one_unit(machine: Machine) -> None:
    plan = make_plan([UnitSize("all", MIB)], Needs(), machine, MIB, host_room(MIB))
    assert plan.tiers == (("gpu",) if machine.has_device else ("ram",))
