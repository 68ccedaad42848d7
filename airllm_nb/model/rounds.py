"""Experts served by the host, for native code: it asks for them, and computes on those that are there.

They are there in rounds: of the layer's slots, or of staging, which all layers share. Each pair of a token and one of
its experts goes through as a token with one expert; pairs are weighted and added up afterwards, in the order of
transformers' own grouped products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..encoding.linear import EncodedWeight
from ..errors import GenerationStopped
from ..stream.bank import Slots
from ..stream.copier import Copied
from ..stream.device_pool import MOST_IDS, DevicePool
from ..stream.experts import Source
from ..stream.lru import LRU
from ..stream.schedule import Moved
from ..stream.staging import Round, Staging
from .absent import edited
from .feeds import parameter, unbind
from .grouped import MOST_TOKENS, added_up
from .units import ModelUnit

if TYPE_CHECKING:
    from .banked import Banked

# Where so large a share of a layer's experts is asked for, the next layer's will be too, and are copied ahead.
_MOST = 0.75


class Rounds:
    """One layer.

    Attributes
    ----------
    following
        That which is next to run in the same sweep.
    pool
        Knows what is in the slots, where that is a device's.
    native, views
        The module's own forward, and what stands for its packed weights.
    """

    following: Rounds | None = None
    pool: DevicePool | None = None

    def __init__(self, unit: ModelUnit, slots: Slots | None, source: Source, staging: Staging, feed: Banked):
        self.unit, self.bank, self._slots, self._source = unit, unit.bank, slots, source
        self._staging, self._feed = staging, feed
        self._lru = LRU(unit.experts, slots.count if slots else 0)
        self.native: Any = type(unit.module).forward
        self._bindings = {binding.attribute: binding for binding in unit.bindings}
        self.views = [each for each in vars(unit.module).values() if isinstance(each, EncodedWeight)]

    def forget(self) -> None:
        """A device's tables serve no more."""
        self.pool = None
        self._lru.reset()

    def compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The module's forward: ``[tokens, hidden]`` of tokens routed to ``index``, ``[tokens, k]``."""
        tokens, each = index.shape
        asked = index.reshape(-1).cpu().numpy()
        out = hidden.new_zeros(asked.size, hidden.shape[-1])
        copier, recorder, on_cpu = self._feed.copier, self._feed.recorder, hidden.device.type == "cpu"
        if self._feed.cancelled():
            raise GenerationStopped(f"stopped before {self.unit.name}")
        for made, pairs, slots in self._served(asked, tokens):
            if made.copied is not None:
                copier.wait(made.copied.end)
            rows, local = (torch.from_numpy(array).to(hidden.device) for array in (pairs, slots))
            # Functions of a CPU round otherwise where an odd row is left, or one alone.
            is_odd = len(rows) % 2 == 1 and len(rows) < asked.size and self._way == "grouped_mm" and on_cpu
            recorder.begin_compute()
            with self._bound_round(made, local, is_odd) as bound:
                out[rows] = self._compute(hidden[rows // each], bound, each)
            self._staging.done(made, recorder.end_compute(self.unit.name))
        recorder.look()
        return added_up(out, index, weights, hidden.dtype, is_eager=self._way == "eager")

    def run(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, each: int) -> torch.Tensor:
        """The module's own code on the stacks that are bound; ``each``: experts of one token."""
        # While it generates, transformers has matrices copied for each token: those of several would have no room.
        if self._way == "batched_mm" and slots.numel() > each:
            from transformers.integrations.moe import grouped_mm_experts_forward

            result = grouped_mm_experts_forward(self.unit.module, hidden, slots, weights)
        else:
            result = self.native(self.unit.module, hidden, slots, weights)
        assert isinstance(result, torch.Tensor)
        return result

    @property
    def _way(self) -> str:
        """In which way the module computes, as transformers calls it."""
        return str(self.unit.module.config._experts_implementation)

    def _compute(self, hidden: torch.Tensor, slots: torch.Tensor, each: int) -> torch.Tensor:
        """Of each pair what its expert gives, ``[pairs, hidden]``; one more is computed where ``slots`` are."""
        pairs = len(hidden)
        hidden = hidden if pairs == len(slots) else torch.cat([hidden, hidden[:1]])
        return self.run(hidden, slots[:, None], hidden.new_ones(len(hidden), 1), each)[:pairs]

    # --- which experts are where

    def _served(self, asked: Any, tokens: int) -> Iterator[tuple[Round, Any, Any]]:
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
        cached = self.cached
        there, missing = ({e: cached[e] for e in distinct if e in cached}, [e for e in distinct if e not in cached])
        self._feed.recorder.routed(self.unit.name, self.bank.experts, distinct, len(there))
        if self._slots is not None and tokens <= MOST_TOKENS and len(distinct) <= self._slots.count:
            yield self._in_slots(distinct)
            return
        if there:
            assert self._slots is not None, "experts that are there have slots"
            yield Round(self._slots, there)
        free = self._slots.count - len(cached) if self._slots is not None else 0
        if free and missing:  # slots that nobody has yet are for those that most tokens ask for
            first = [expert for expert in popular if expert not in there][:free]
            missing = [expert for expert in missing if expert not in first]
            yield self._in_slots(sorted(first))
        yield from self._staged(missing, len(distinct) >= _MOST * self.bank.experts)

    def _in_slots(self, experts: list[int]) -> Round:
        """All of them in the layer's slots, in the place of those that were not asked for longest."""
        assert self._slots is not None
        if self.pool is not None:
            return Round(self._slots, self._in_pool(self.pool, experts))
        slots, missing = self._lru.ensure(experts)
        where = dict(zip(experts, slots, strict=True))
        copied = None
        if missing:
            try:
                copied = self._load(list(missing.items()), self._slots)
            except BaseException:
                self._lru.forget(missing)
                raise
        return Round(self._slots, where, copied)

    @property
    def cached(self) -> dict[int, int]:
        """Expert → slot of those that are there; waits for the device."""
        if self._slots is None:
            return {}
        return self._lru.cached if self.pool is None else self.pool.cached()

    def _in_pool(self, pool: DevicePool, experts: list[int]) -> dict[int, int]:
        """Have them in slots by way of the device's tables, which do not count it."""
        found: dict[int, int] = {}
        missing, counts = len(set(experts) - set(pool.cached())), pool.table_of_counts.clone()
        for at in range(0, len(experts), MOST_IDS):
            ids = torch.tensor(experts[at : at + MOST_IDS], device=self._slots.memory.device)  # type: ignore[union-attr]
            found |= dict(zip(experts[at : at + MOST_IDS], pool.ensure_and_gather(ids).tolist(), strict=True))
        self._feed.recorder.counted(self.unit.name, [], 0, missing * self.bank.expert_bytes)
        pool.table_of_counts.copy_(counts)
        return found

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
        cached = self.cached
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
    def _bound_round(self, made: Round, local: torch.Tensor, is_odd: bool) -> Iterator[torch.Tensor]:
        """The stacks of a round are the module's, which has as many experts as there are slots.

        Gives the slots in them; with ``is_odd`` those of one more pair, of an expert that there is not.
        """
        slots, places = made.slots, {slot: expert for expert, slot in made.experts.items()}
        stacks, count = slots.by_name, slots.count
        if any(binding.weight.needs_cast for binding in self.unit.bindings):
            # Of those that are used only.
            used, local = torch.unique(local, return_inverse=True)
            stacks = {name: stack.unflatten(0, (count, -1))[used].flatten(0, 1) for name, stack in stacks.items()}
            count, places = len(used), {place: places[slot] for place, slot in enumerate(used.tolist())}
        if is_odd:
            local = torch.cat([local, local.new_tensor([count])])
            if count == 1:  # counting is something else with one bin
                stacks, count = {name: stack.expand(2, *stack.shape[1:]) for name, stack in stacks.items()}, 2
            else:  # grouped products leave it out; vectors are looked up for all
                stacks = {
                    name: torch.cat([stack, stack[:1]]) if stack.ndim == 2 else stack for name, stack in stacks.items()
                }
        with self.bound(stacks, count, places):
            yield local

    @contextlib.contextmanager
    def bound(
        self, stacks: dict[str, torch.Tensor], count: int, places: dict[int, int] | None = None
    ) -> Iterator[None]:
        """``stacks`` are the module's; ``places``: which expert is where in them."""
        module = self.unit.module
        try:
            for name, stack in stacks.items():
                weight = self._bindings[name].weight
                if module._parameters[name] is not weight.meta:
                    raise edited(weight.name)
                module._parameters[name] = parameter(stack.to(weight.dtype) if weight.needs_cast else stack)
            experts, module.num_experts = module.num_experts, count
            for view in self.views:
                view.bound = places
            try:
                yield
            finally:
                module.num_experts = experts
                for view in self.views:
                    view.bound = None
        finally:
            unbind(self.unit.bindings)
