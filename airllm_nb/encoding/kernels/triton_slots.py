"""The cache of experts on a device: which of them are in the slots of a layer, and what is missing brought there.

Neither waits for the host. The tables are those of ``stream/lru.py``, in the same states after the same calls.
"""

from __future__ import annotations

import triton
import triton.language as tl

_USED = tl.constexpr(1 << 30)


@triton.jit
def ensure(
    ids, slot_of, expert_of, order, slots, moves, counts, routed, number, experts, slot_count,
    IDS: tl.constexpr, SLOTS: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Give each of ``number`` routed experts a slot: one program, in which nothing is done one after the other.

    ``order`` has all slots, from the one that was used longest ago on. ``moves`` becomes how many experts are missing,
    from its second entry on which, and ``IDS`` entries later to which slot they go. ``counts`` are hits and misses.
    There must be slots for all. ``IDS`` and ``SLOTS`` are powers of two; without ``KEEPS`` everything is missing.
    """
    i, place = tl.arange(0, IDS), tl.arange(0, SLOTS)
    asked = tl.load(ids + i, mask=i < number, other=-1).to(tl.int64)
    is_expert = (asked >= 0) & (asked < experts)
    expert = tl.where(is_expert, asked, -1).to(tl.int32)
    same = (expert[:, None] == expert[None, :]) & is_expert[None, :]
    is_first = is_expert & (tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1) == 0)
    slot = tl.load(slot_of + expert, mask=is_expert, other=-1)
    if not KEEPS:
        slot = tl.full((IDS,), -1, tl.int32)
    is_hit, is_missing = is_first & (slot >= 0), is_first & (slot < 0)
    missing_before = tl.cumsum(is_missing.to(tl.int32), 0) - 1
    missing = tl.sum(is_missing.to(tl.int32), 0)
    times = tl.load(routed + expert, mask=is_first, other=0) + 1
    hits = tl.load(counts) + tl.sum(is_hit.to(tl.int64), 0)
    misses = tl.load(counts + 1) + missing
    of_place = tl.load(order + place, mask=place < slot_count, other=0)
    holds = tl.load(expert_of + of_place, mask=place < slot_count, other=-1)

    tl.debug_barrier()  # what one thread writes, others have read before, and read after the next
    tl.store(slot_of + expert, slot + _USED, mask=is_hit)
    tl.debug_barrier()
    is_used = tl.load(slot_of + holds, mask=holds >= 0, other=0) >= _USED
    is_idle = (place < slot_count) & (is_used == 0)
    idle_before = tl.cumsum(is_idle.to(tl.int32), 0) - 1
    leaves = is_idle & (idle_before < missing)
    tl.store(moves + 1 + IDS + idle_before, of_place, mask=leaves)
    tl.debug_barrier()
    slot = tl.where(is_missing, tl.load(moves + 1 + IDS + missing_before, mask=is_missing, other=0), slot)
    of_first = tl.sum(tl.where(same & is_first[None, :], slot[None, :], 0), 1)
    tl.store(slot_of + holds, -1, mask=leaves & (holds >= 0))
    tl.debug_barrier()  # without KEEPS, what leaves may come in
    tl.store(slots + i, tl.where(is_expert, of_first, -1), mask=i < number)
    tl.store(slot_of + expert, slot, mask=is_first)
    tl.store(expert_of + slot, expert, mask=is_missing)
    tl.store(order + idle_before - missing, of_place, mask=is_idle & (leaves == 0))
    used_before = tl.cumsum(is_first.to(tl.int32), 0) - 1
    tl.store(order + tl.sum(is_idle.to(tl.int32), 0) - missing + used_before, slot, mask=is_first)
    tl.store(moves, missing)
    tl.store(moves + 1 + missing_before, expert, mask=is_missing)
    tl.store(routed + expert, times, mask=is_first)
    tl.store(counts, hits)
    tl.store(counts + 1, misses)


@triton.jit
def gather(
    moves, addresses, stacks, sizes, strides, experts,
    IDS: tl.constexpr, WIDTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy what :func:`ensure` found missing, all parts of it, from where they lie into the stacks of the slots.

    ``addresses`` is ``[parts, experts]``; of each part, ``stacks`` has the address, ``sizes`` the bytes of an expert,
    ``strides`` those from one slot to the next, and ``WIDTHS`` how many bytes all these are a multiple of, 16 at most.
    Programs take turns at blocks of 16 · ``BLOCK`` bytes.
    """
    programs = tl.num_programs(0)
    turn = tl.program_id(0)
    for move in range(tl.load(moves)):
        expert = tl.load(moves + 1 + move)
        slot = tl.load(moves + 1 + IDS + move).to(tl.int64)
        for part in tl.static_range(len(WIDTHS)):
            size = tl.load(sizes + part)
            source = tl.load(addresses + part * experts + expert)
            to = tl.load(stacks + part) + slot * tl.load(strides + part)
            blocks = _copy(source, to, size, turn, programs, WIDTHS[part], BLOCK)
            turn = (turn + programs - blocks % programs) % programs


@triton.jit
def _copy(source, to, size, turn, programs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Every ``programs``-th block from the ``turn``-th on; how many blocks there are."""
    WORD: tl.constexpr = tl.int64 if WIDTH >= 8 else tl.int32 if WIDTH == 4 else tl.int16 if WIDTH == 2 else tl.int8
    NBYTES: tl.constexpr = WIDTH if WIDTH < 8 else 8
    STEP: tl.constexpr = BLOCK * 16 // NBYTES
    words = tl.multiple_of((size // NBYTES).to(tl.int32), WIDTH // NBYTES)
    source = tl.multiple_of(source.to(tl.pointer_type(WORD)), WIDTH)
    to = tl.multiple_of(to.to(tl.pointer_type(WORD)), WIDTH)
    for first in range(turn * STEP, words, programs * STEP):
        word = first + tl.arange(0, STEP)
        tl.store(to + word, tl.load(source + word, mask=word < words), mask=word < words)
    return (words + STEP - 1) // STEP
