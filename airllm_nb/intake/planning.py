"""A model that is prepared: cut into units, what it needs beside them, where they go on a machine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..config import format_bytes
from ..decode.settings import checkpoint_defaults
from ..errors import BudgetError
from ..model import adapter as lora
from ..model.attention import ALIBI, NTK
from ..model.device import Budgets, has_memory, total_ram
from ..model.placing import computes_packed, keep_unpacked, temporary_bytes
from ..model.skeleton import collect_weights, cut_units, is_tied
from ..model.slices import slice_limit, slice_linears
from ..plan.experts import Experts, staging
from ..plan.needs import activation_bytes, cache_bytes, returned_bytes, routed_experts
from ..plan.placement import make_plan, window
from ..plan.residency import Machine, Needs, ResidencyPlan, UnitSize
from ..plan.work import Work, choose_chunk
from ..stream.ring import align
from .prepared import Prepared

__all__ = ["Prepared", "check_ram", "cut", "generation_config", "needs", "plan", "tokens_at_once"]

# What a recorded decode step takes beside its own cache, see :mod:`~airllm_nb.decode.steps`.
RECORD = 128 << 20
# What CUDA's matrix libraries take for themselves.
_WORKSPACE = {"cpu": 0, "cuda": 64 << 20}


def cut(prepared: Prepared, budgets: Budgets) -> None:
    """Cut the model into units that pass through ``budgets``; nothing is done where it is cut so already."""
    skeleton, has_room = prepared.skeleton, has_memory(prepared.options, prepared.device)
    if (limit := slice_limit(*budgets, has_room)) == prepared.slice_limit:
        return
    prepared.slice_limit = limit
    tensors = slice_linears(skeleton, prepared.tensors, limit)
    prepared.units, prepared.small = cut_units(skeleton, collect_weights(skeleton, tensors, prepared.dtype))
    if prepared.deltas is None:  # what is cut anew is not run
        prepared.deltas = lora.attach(skeleton, prepared.adapter, prepared.dtype)
    prepared.small += prepared.deltas
    prepared.sizes = [
        UnitSize(
            unit.name,
            0 if unit.kind == "embedding" and is_tied(unit) else unit.nbytes,
            unit.kind,
            Experts(unit.experts, routed_experts(skeleton.config, unit.experts), unit.nbytes // unit.experts)
            if unit.experts
            else None,
        )
        for unit in prepared.units
    ]
    # What we write takes nothing beside the scratch: one kernel unpacks it, or chunks in a processor's cache.
    temporary = temporary_bytes(skeleton, prepared.device) if prepared.packed_as else 0
    casts = max((unit.cast_bytes for unit in prepared.units), default=0)
    dequantised = max((getattr(module, "scratch_bytes", 0) for module in skeleton.modules()), default=0)
    if prepared.device.type == "cuda":  # of plain experts, those of one token are copied
        copied = [unit.nbytes // unit.experts * routed_experts(skeleton.config, unit.experts)
                  for unit in prepared.units if unit.experts and not computes_packed(unit.module)]  # fmt: skip
        casts += max(copied, default=0)
    prepared.fixed_needs = Needs(
        small=sum(weight.elements * weight.dtype.itemsize for weight in prepared.small),
        scratch=casts + dequantised + temporary + _WORKSPACE[prepared.device.type],
    )
    if prepared.packed_as and not has_room:
        beside = needs(prepared, prepared.planned, prepared.planned.sizes[0]).total
        room = budgets.ram - sum(unit.nbytes for unit in prepared.sizes) - beside
        prepared.kept_bytes = keep_unpacked(skeleton, room)


def needs(prepared: Prepared, work: Work, tokens: int) -> Needs:
    """Device memory beside streamed weights, where ``tokens`` of the prompt go through the model at a time."""
    config, itemsize = prepared.skeleton.config, prepared.dtype.itemsize
    text, window = config.get_text_config(), work.length
    attention = getattr(config, "_attn_implementation", None)
    with contextlib.suppress(RuntimeError):  # one a layer: none for all
        window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or work.length
    if attention == NTK:  # past it, turned queries and keys are kept beside the plain ones
        window = min(window, config.airllm_attention["trained"])
    activations = activation_bytes(
        config, tokens, work.batch, itemsize, length=work.length,
        logits=tokens if work.logits is None else min(work.logits, tokens), loss=work.loss,
        masked=work.masked or tokens < work.prompt or work.length > window,
        eager=attention in ("eager", ALIBI),
    )  # fmt: skip
    activations += returned_bytes(
        config, work.length, work.batch, itemsize, states=work.states, attentions=work.attentions
    )
    cache = cache_bytes(config, work.length, work.batch, itemsize)
    return replace(prepared.fixed_needs, kv_cache=cache, activations=activations)


def tokens_at_once(prepared: Prepared, work: Work, room: int, arenas: Sequence[int] = (0,)) -> int | None:
    """How many tokens of the prompt go through the model at a time in ``room`` bytes; ``None`` if it is too small."""
    return choose_chunk(work.sizes, lambda tokens: needs(prepared, work, tokens).total, room, arenas)


def generation_config(prepared: Prepared) -> Any:
    """The checkpoint's own defaults for ``generate``, as far as they can be used."""
    return checkpoint_defaults(prepared.folder, prepared.config)


def check_ram(prepared: Prepared, work: Work) -> None:
    """Refuse work whose cache and scores are more than all memory, where compute is in RAM.

    Raises
    ------
    BudgetError
        Which says what it needs.
    """
    need, there = needs(prepared, work, work.sizes[0]).total, total_ram()
    if need > there:
        what = f"{work.length:,} tokens" + (f" x {work.batch:,} sequences" if work.batch > 1 else "")
        raise BudgetError(f"{what} need {format_bytes(need)} for the cache, activations and scores, and this machine "
                          f"has {format_bytes(there)} of RAM; ask for fewer tokens (max_new_tokens), sequences or "
                          "beams")  # fmt: skip


def plan(
    prepared: Prepared, machine: Machine, budgets: Budgets, work: Work, wished: Needs | None = None
) -> tuple[ResidencyPlan, int]:
    """Where the units go on this machine, and how many tokens of a prompt go through them at a time.

    Parameters
    ----------
    work
        What there must be room for.
    wished
        What there should be room for too, where that costs no link its arena.

    Raises
    ------
    BudgetError
        If nothing fits; the message says the smallest budget that does.
    """
    if not machine.has_device:
        return make_plan(prepared.sizes, needs(prepared, work, work.sizes[0]), machine, *budgets), work.sizes[0]
    arenas = _arenas(prepared.sizes)
    tokens = tokens_at_once(prepared, work, budgets.vram, arenas) or work.sizes[-1]
    least = needs(prepared, work, tokens)
    both = least if wished is None else replace(
        least, kv_cache=max(least.kv_cache, wished.kv_cache), activations=max(least.activations, wished.activations)
    )  # fmt: skip
    try:
        fits = both.total + arenas[0] <= budgets.vram
        spare = both.kv_cache + RECORD if machine.replays else 0
        return make_plan(prepared.sizes, both if fits else least, machine, *budgets, spare), tokens
    except BudgetError as error:
        if not work.remedy:
            raise
        raise BudgetError(f"{error}; {work.remedy}", error.option) from None


def _arenas(units: Sequence[UnitSize]) -> tuple[int, int]:
    """Bytes of the arena that keeps a link busy, and of the smallest one: for the units in flight, for the largest."""
    sizes = [align(unit.nbytes) for unit in units if unit.kind not in ("embedding", "experts")]
    _, least = staging([unit.experts for unit in units if unit.experts], 0)
    return window(sizes) + least, max(sizes) + least
