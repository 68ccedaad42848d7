"""The feed of a mixture's experts: only those that tokens are routed to move, and the latest stay.

The module's own code computes, as it always does, on stacks of the experts that are there: a round of the layer's
slots, or rounds of staging, which all layers share. Each pair of a token and one of its experts goes through as a token
with one expert; pairs are weighted and added up afterwards, in the order of transformers' own grouped products.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..encoding.linear import EncodedWeight
from ..plan.residency import ResidencyPlan
from ..stream.bank import Bank, Slots
from ..stream.copier import Copied, Copier, CudaCopier, MemoryCopier
from ..stream.experts import FromFiles, FromHost, FromPageCache, HostSlots, Reading, Source
from ..stream.lru import LRU
from ..stream.reader import Reader
from ..stream.ring import LOCKED, PAGE_CACHE, align
from ..stream.schedule import Moved
from ..stream.staging import Round, Staging
from .absent import edited
from .feeds import Feed, parameter, unbind
from .recorder import Recorder
from .units import ModelUnit

# Up to so many tokens are decoding: their experts take slots. A prompt would push out all of them for nothing.
_DECODED = 8
# Where so large a share of a layer's experts is asked for, the next layer's will be too, and are copied ahead.
_MOST = 0.75


class Banked(Feed):
    """Gives banks of experts slots, staging and a source; its units compute by :meth:`Layer.forward`.

    Parameters
    ----------
    units
        Those of kind ``"experts"`` that are not resident, in the order of use.
    plan
        How many slots each has, in device memory and in host memory.
    depth
        With 0 nothing moves before it is asked for.
    cancelled
        Whether the work is to end.
    """

    def __init__(
        self, units: Sequence[ModelUnit], plan: ResidencyPlan, device: torch.device, depth: int | None,
        recorder: Recorder, cancelled: Callable[[], bool],
    ):  # fmt: skip
        self.recorder, self.looks_ahead, self._device = recorder, depth != 0, device
        # A stream of its own: what dense units are copied ahead must not be in the way of what is waited for.
        self.copier: Copier = CudaCopier(device) if device.type == "cuda" else MemoryCopier()
        self._reader = Reader(direct=plan.machine.direct)
        reading = Reading(self._reader, cancelled, recorder.clock, self._was_read)
        self._host: HostSlots | None = None
        self.layers: dict[str, Layer] = {}
        try:
            self._lay_out(units, plan, reading)
        except BaseException:
            self.close()
            raise

    def _lay_out(self, units: Sequence[ModelUnit], plan: ResidencyPlan, reading: Reading) -> None:
        half = plan.staging_bytes // 2
        staging = Staging([self._memory(half), self._memory(half)])
        sources = self._sources([unit.bank for unit in units], plan, reading)
        for unit, source in zip(units, sources, strict=True):
            count = plan.slots_of(unit.name)
            slots = Slots(unit.bank, self._memory(unit.bank.room(count)), count) if count else None
            self.layers[unit.name] = Layer(unit, slots, source, staging, self)
        for layer, following in itertools.pairwise(self.layers.values()):
            layer.following = following

    def _memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _sources(self, banks: Sequence[Bank], plan: ResidencyPlan, reading: Reading) -> list[Source]:
        machine = plan.machine
        if not machine.has_device:
            return [FromFiles(bank, reading) for bank in banks]
        tiers = {unit.name: tier for unit, tier in zip(plan.units, plan.tiers, strict=True)}
        if machine.ram == PAGE_CACHE and all(tiers[bank.name] == "ram" for bank in banks):
            return [FromPageCache(bank, reading, self.copier, self._device) for bank in banks]
        counts = [bank.experts if tiers[bank.name] == "ram" else plan.host_slots_of(bank.name) for bank in banks]
        rooms = [align(count * align(bank.expert_bytes)) for count, bank in zip(counts, banks, strict=True)]
        shared = max(align(align(bank.expert_bytes)) for bank in banks)
        self._host = HostSlots(sum(rooms) + shared, self._device, machine.ram == LOCKED)
        # What has no slot in host memory passes through one expert's place.
        passing = self._host.take(shared)
        return [
            FromHost(bank, reading, self.copier, count, self._host.take(room) if count else passing)
            for bank, count, room in zip(banks, counts, rooms, strict=True)
        ]

    def _was_read(self, name: str, nbytes: int, start: float) -> None:
        self.recorder.moved(Moved("read", self.layers[name].unit.stream, start, self.recorder.clock(), nbytes))

    def drop(self, unit: ModelUnit) -> None:
        """What was on its way when the error came is there before anybody looks for it."""
        self.copier.synchronize()
        super().drop(unit)

    def begin(self) -> None:
        """A sweep begins, on the stream that is current now."""
        self.copier.begin()

    def close(self) -> None:
        self.copier.synchronize()
        self._reader.close()
        for layer in self.layers.values():
            layer.close()
        self.layers.clear()
        if self._host is not None:
            self._host.close()


class Layer:
    """The experts of one layer while they are not all there.

    Attributes
    ----------
    following
        The layer that is next to run in the same sweep.
    """

    following: Layer | None = None

    def __init__(self, unit: ModelUnit, slots: Slots | None, source: Source, staging: Staging, feed: Banked):
        self.unit, self.bank, self._slots, self._source = unit, unit.bank, slots, source
        self._staging, self._feed = staging, feed
        self._lru = LRU(unit.experts, slots.count if slots else 0)
        self._native = type(unit.module).forward
        self._bindings = {binding.attribute: binding for binding in unit.bindings}
        self._views = [each for each in vars(unit.module).values() if isinstance(each, EncodedWeight)]
        unit.module.forward = self.forward

    def close(self) -> None:
        self.unit.module.__dict__.pop("forward", None)
        self._source.close()

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the module's own forward gives: ``[tokens, hidden]`` of tokens routed to ``index``, ``[tokens, k]``."""
        tokens, each = index.shape
        asked = index.reshape(-1).cpu().numpy()
        out = hidden.new_zeros(asked.size, hidden.shape[-1])
        copier = self._feed.copier
        for made, pairs, slots in self._rounds(asked, tokens):
            if made.copied is not None:
                copier.wait(made.copied.end)
            rows, local = (torch.from_numpy(array).to(hidden.device) for array in (pairs, slots))
            # Functions of a CPU round otherwise where an odd row is left, or one alone.
            is_odd = len(rows) % 2 == 1 and len(rows) < asked.size and hidden.device.type == "cpu"
            with self._bound(made, local, is_odd) as bound:
                out[rows] = self._compute(hidden[rows // each], bound)
            self._staging.done(made, copier.mark())
        return (out.view(tokens, each, -1) * weights.reshape(tokens, each, 1)).sum(1).to(hidden.dtype)

    def _compute(self, hidden: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Of each pair what its expert gives, ``[pairs, hidden]``; one more is computed where ``slots`` are."""
        pairs = len(hidden)
        hidden = hidden if pairs == len(slots) else torch.cat([hidden, hidden[:1]])
        result: torch.Tensor = self._native(self.unit.module, hidden, slots[:, None], hidden.new_ones(len(hidden), 1))
        return result[:pairs]

    # --- which experts are where

    def _rounds(self, asked: Any, tokens: int) -> Iterator[tuple[Round, Any, Any]]:
        """Rounds as they are copied; of each, the pairs that it serves, and the slot of each pair's expert."""
        distinct = [int(expert) for expert in np.unique(asked) if 0 <= expert < self.bank.experts]
        order = np.argsort(asked, kind="stable")
        first = np.searchsorted(asked[order], np.arange(self.bank.experts + 1))
        popular = sorted(distinct, key=lambda expert: first[expert] - first[expert + 1])
        for made in self._made(distinct, popular, tokens):
            served = sorted(expert for expert in made.experts if first[expert] < first[expert + 1])
            if not served:  # copied ahead for nothing
                continue
            pairs = np.concatenate([order[first[expert] : first[expert + 1]] for expert in served])
            slots = np.repeat([made.experts[expert] for expert in served],
                              [first[expert + 1] - first[expert] for expert in served])  # fmt: skip
            by_pair = np.argsort(pairs, kind="stable")
            yield made, pairs[by_pair], slots[by_pair]

    def _made(self, distinct: list[int], popular: list[int], tokens: int) -> Iterator[Round]:
        cached = self._lru.cached
        there, missing = ({e: cached[e] for e in distinct if e in cached}, [e for e in distinct if e not in cached])
        self._feed.recorder.routed(self.unit.name, self.bank.experts, distinct, len(there))
        if self._slots is not None and tokens <= _DECODED and len(distinct) <= self._slots.count:
            yield self._in_slots(distinct)
            return
        if there:
            assert self._slots is not None, "experts that are there have slots"
            yield Round(self._slots, there)
        if self._lru.free and missing:  # slots that nobody has yet are for those that most tokens ask for
            first = [expert for expert in popular if expert not in there][: self._lru.free]
            missing = [expert for expert in missing if expert not in first]
            yield self._in_slots(sorted(first))
        yield from self._staged(missing, len(distinct) >= _MOST * self.bank.experts)

    def _in_slots(self, experts: list[int]) -> Round:
        """All of them in the layer's slots, in the place of those that were not asked for longest."""
        slots, missing = self._lru.ensure(experts)
        assert self._slots is not None
        where = dict(zip(experts, slots, strict=True))
        copied = None
        if missing:
            try:
                copied = self._load(list(missing.items()), self._slots)
            except BaseException:
                self._lru.forget(missing)
                raise
        return Round(self._slots, where, copied)

    def _load(self, wanted: list[tuple[int, int]], slots: Slots) -> Copied | None:
        copied = self._source.load(wanted, slots, self._feed.copier.mark())
        self._moved(len(wanted), copied)
        return copied

    def _staged(self, missing: list[int], ahead: bool) -> Iterator[Round]:
        """Through staging: while compute is on a round, the next one is copied."""
        ready, room = self._staging.take_ahead(self.bank), self._staging.room(self.bank)
        if ready is not None:
            missing = [expert for expert in missing if expert not in ready.experts]
        chunks = [missing[at : at + room] for at in range(0, len(missing), room)]
        for chunk in chunks:
            coming = self._issue(chunk)
            if ready is not None:
                yield ready
            ready = coming
        if ahead and self._feed.looks_ahead and self.following is not None:
            self.following._issue_ahead()
        if ready is not None:
            yield ready

    def _issue(self, experts: list[int]) -> Round:
        made = self._staging.issue(self.bank, experts, self._source)
        self._moved(len(experts), made.copied)
        return made

    def _issue_ahead(self) -> None:
        cached = self._lru.cached
        missing = [expert for expert in range(self.bank.experts) if expert not in cached]
        if missing:
            made = self._staging.issue_ahead(self.bank, missing[: self._staging.room(self.bank)], self._source)
            self._moved(len(made.experts), made.copied)

    def _moved(self, count: int, copied: Copied | None) -> None:
        if copied is not None:
            nbytes = count * self.bank.expert_bytes
            self._feed.recorder.moved(Moved("copy", self.unit.stream, copied.start, copied.end, nbytes))

    # --- in the module

    @contextlib.contextmanager
    def _bound(self, made: Round, local: torch.Tensor, is_odd: bool) -> Iterator[torch.Tensor]:
        """The stacks of a round are the module's, which has as many experts as there are slots.

        Gives the slots in them; with ``is_odd`` those of one more pair, of an expert that there is not.
        """
        module, slots = self.unit.module, made.slots
        places = {slot: expert for expert, slot in made.experts.items()}
        stacks, count = dict(zip((part.name for part in self.bank.parts), slots.stacks, strict=True)), slots.count
        if any(binding.weight.needs_cast for binding in self.unit.bindings):
            # Of those that are used only.
            used, local = torch.unique(local, return_inverse=True)
            stacks = {name: stack.unflatten(0, (count, -1))[used].flatten(0, 1) for name, stack in stacks.items()}
            count, places = len(used), {place: places[slot] for place, slot in enumerate(used.tolist())}
        if is_odd and not self._views:  # which compute an expert at a time
            local = torch.cat([local, local.new_tensor([count])])
            if count == 1:  # counting is something else with one bin
                stacks, count = {name: stack.expand(2, *stack.shape[1:]) for name, stack in stacks.items()}, 2
            else:  # grouped products leave it out; vectors are looked up for all
                stacks = {
                    name: torch.cat([stack, stack[:1]]) if stack.ndim == 2 else stack for name, stack in stacks.items()
                }
        try:
            for name, stack in stacks.items():
                binding = self._bindings[name]
                if module._parameters[name] is not binding.weight.meta:
                    raise edited(binding.weight.name)
                cast = stack.to(binding.weight.dtype) if binding.weight.needs_cast else stack
                module._parameters[name] = parameter(cast)
            experts, module.num_experts = module.num_experts, count
            for view in self._views:
                view.bound = places
            try:
                yield local
            finally:
                module.num_experts = experts
                for view in self._views:
                    view.bound = None
        finally:
            unbind(self.unit.bindings)
