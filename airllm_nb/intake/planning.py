"""A model that is ready to be placed: what it needs, where its units go on a machine, what runs at once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.lora.adapter import Adapter
from ..checkpoint.source import Source
from ..config import LoadOptions, format_bytes
from ..decode.settings import checkpoint_defaults
from ..encoding.base import Encoding
from ..encoding.linear import Scratch
from ..errors import BudgetError
from ..model import adapter as lora
from ..model.attention import ALIBI, NTK
from ..model.device import Budgets, has_memory, total_ram
from ..model.placing import keep_unpacked, temporary_bytes
from ..model.skeleton import ModelUnit, Weight, collect_weights, cut_units, is_tied
from ..model.slices import slice_limit, slice_linears
from ..plan.needs import DEFAULT_LENGTH, activation_bytes, cache_bytes, context_length, returned_bytes
from ..plan.residency import Machine, Needs, ResidencyPlan, UnitSize, make_plan, window
from ..plan.work import Work, choose_chunk
from ..store.locks import Hold, hold
from ..stream.ring import align
from ..tensors.index import TensorInfo

if TYPE_CHECKING:
    import torch

# What CUDA's matrix libraries take for themselves.
_WORKSPACE = {"cpu": 0, "cuda": 64 << 20}


@dataclass
class Prepared:
    """A model that is found, understood and cut into units, but holds no memory yet.

    It knows no budget: what plans is given one, and :func:`cut` cuts anew where it asks for other units.

    Attributes
    ----------
    tensors
        Where its parameters lie, by the names that the skeleton has for them.
    units, small, sizes, fixed_needs
        What :func:`cut` makes of it: what is streamed, what always stays; the units as the plan knows them, of which a
        table that is also the head takes no bytes of its own; device memory that every run needs alike.
    sizes_from
        ``"files"`` that are here, ``"headers"`` on the Hub, or the ``"config"`` alone; ``why_config`` may say why.
    written_once
        Bytes beside the compressed store that are written before the model can run.
    piecewise
        Bytes that the disk must have room for where each weight file is downloaded, encoded and deleted before the
        next; ``None`` where the whole download comes first.
    packed_as
        How the checkpoint's own weights are packed, for people; empty where they are plain.
    adapter
        The LoRA adapter that is applied, if any.
    kept_bytes
        RAM for matrices that lie packed and are kept as they were unpacked.
    held
        Keeps the folders that are read from being removed, until it is closed.
    """

    source: Source
    options: LoadOptions
    config: Any
    device: torch.device
    dtype: torch.dtype
    codec: Encoding
    scratch: Scratch
    skeleton: Any
    tensors: Mapping[str, TensorInfo]
    folder: Path
    sizes_from: str = "files"
    why_config: str = ""
    written_once: int = 0
    piecewise: int | None = None
    packed_as: str = ""
    adapter: Adapter | None = None
    kept_bytes: int = 0
    held: Hold = field(default_factory=hold)
    units: list[ModelUnit] = field(default_factory=list)
    small: list[Weight] = field(default_factory=list)
    sizes: list[UnitSize] = field(default_factory=list)
    fixed_needs: Needs = field(default_factory=Needs)
    _limit: int | None = None
    _deltas: list[Weight] | None = None

    @property
    def context(self) -> int | None:
        """The longest sequence, in tokens: what was asked for, which may be more than the model was made for."""
        return self.options.max_seq_len or context_length(self.config)

    @property
    def planned(self) -> Work:
        """What memory is kept for before anything is asked."""
        length = self.options.max_seq_len or min(self.context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        return Work(length, self.options.batch_size, length, masked=self.options.batch_size > 1)

    @property
    def encoding(self) -> str | None:
        """How the weights are encoded, for people; ``None`` where they are plain."""
        return (self.codec.compression if self.codec.compression != "none" else self.packed_as) or None

    def cut(self, budgets: Budgets) -> None:
        """Cut the model into units that pass through ``budgets``; nothing is done where it is cut so already."""
        has_room = has_memory(self.options, self.device)
        if (limit := slice_limit(*budgets, has_room)) == self._limit:
            return
        self._limit, skeleton = limit, self.skeleton
        tensors = slice_linears(skeleton, self.tensors, limit)
        self.units, self.small = cut_units(skeleton, collect_weights(skeleton, tensors, self.dtype))
        if self._deltas is None:  # what is cut anew is not run
            self._deltas = lora.attach(skeleton, self.adapter, self.dtype)
        self.small += self._deltas
        self.sizes = [
            UnitSize(unit.name, 0 if unit.kind == "embedding" and is_tied(unit) else unit.nbytes, unit.kind)
            for unit in self.units
        ]
        casts = max((unit.cast_bytes for unit in self.units), default=0)
        dequantised = max((getattr(module, "scratch_bytes", 0) for module in skeleton.modules()), default=0)
        # What we write takes nothing beside the scratch: one kernel unpacks it, or chunks in a processor's cache.
        temporary = temporary_bytes(skeleton, self.device) if self.packed_as else 0
        self.fixed_needs = Needs(
            small=sum(weight.elements * weight.dtype.itemsize for weight in self.small),
            scratch=casts + dequantised + temporary + _WORKSPACE[self.device.type],
        )
        if self.packed_as and not has_room:
            beside = needs(self, self.planned, self.planned.sizes[0]).total
            self.kept_bytes = keep_unpacked(skeleton, budgets.ram - sum(unit.nbytes for unit in self.sizes) - beside)


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
        return make_plan(prepared.sizes, both if fits else least, machine, *budgets), tokens
    except BudgetError as error:
        if not work.remedy:
            raise
        raise BudgetError(f"{error}; {work.remedy}", error.option) from None


def _arenas(units: Sequence[UnitSize]) -> tuple[int, int]:
    """Bytes of the arena that keeps a link busy, and of the smallest one: for the units in flight, for the largest."""
    sizes = [align(unit.nbytes) for unit in units if unit.kind != "embedding"]
    return window(sizes), max(sizes)
