"""The experts of one layer while they are not all there.

A few tokens are looked up, served and computed by kernels (:mod:`.grouped`), where the device can read the host's
memory itself; all else by way of the host (:mod:`.rounds`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ..errors import OptionError
from ..stream.bank import Slots
from ..stream.device_pool import BankPart, Counts, DevicePool
from ..stream.experts import Source
from ..stream.staging import Staging
from .absent import NO_TRAINING
from .grouped import MOST_PAIRS, MOST_TOKENS, PackedExperts
from .rounds import Rounds
from .units import ModelUnit

if TYPE_CHECKING:
    from .banked import Banked

log = logging.getLogger(__name__)


class Layer:
    """Computes in the place of the module's forward.

    Attributes
    ----------
    rounds
        What does so by way of the host.
    """

    def __init__(self, unit: ModelUnit, slots: Slots | None, source: Source, staging: Staging, feed: Banked):
        self.unit, self._slots, self._source, self._staging, self._feed = unit, slots, source, staging, feed
        self.rounds = Rounds(unit, slots, source, staging, feed)
        self._few: PackedExperts | None = None
        self._counted, self._looked = Counts(0, 0, [0] * unit.experts), False
        self._works = False  # kernels have served a token
        unit.module.forward = self.forward
        feed.recorder.cached[unit.name] = lambda: self.rounds.cached

    def close(self) -> None:
        self.unit.module.__dict__.pop("forward", None)
        self._feed.recorder.cached.pop(self.unit.name, None)  # a cycle would keep the memory until it is collected
        self.rounds.pool = None
        self._source.close()

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """What the module's own forward gives: ``[tokens, hidden]`` of tokens routed to ``index``, ``[tokens, k]``."""
        hidden, index, weights = (*args, *kwargs.values())
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            raise OptionError(NO_TRAINING)
        if not self._looked:
            self._look()
            self._looked = True  # not before: it may be stopped while it reads
        pool = self.rounds.pool
        if pool is not None and _takes(pool, index):
            result = self._on_device(pool, hidden, index, weights)
            if result is not None:
                return result
        return self.rounds.compute(hidden, index, weights)

    def _look(self) -> None:
        """Whether kernels can serve a token here."""
        if not self._feed.has_kernels or any(binding.weight.needs_cast for binding in self.unit.bindings):
            return
        try:
            self._few = PackedExperts(self.unit.module) if self.rounds.views else None
        except ValueError as error:
            log.info("%s: the host serves each token: %s", self.unit.name, error)
            return
        runs, addresses = self.unit.bank.runs, self._source.addresses()
        shape = [(run.part, run.offset, run.extent.nbytes) for run in runs[0]]
        if addresses is None or any(shape != [(r.part, r.offset, r.extent.nbytes) for r in each] for each in runs):
            log.info("%s: the host serves each token: the device cannot read its experts", self.unit.name)
            return
        slots = self._slots or self._staging.as_slots(self.unit.bank)
        parts = {
            str(number): BankPart((run.extent.nbytes,), torch.uint8, [each[number] for each in addresses])
            for number, run in enumerate(runs[0])
        }
        stacks = {str(number): slots.targets(run) for number, run in enumerate(runs[0])}
        self.rounds.pool = DevicePool(
            parts, self.unit.experts, slots.count, slots.memory.device, stacks, keeps=self._slots is not None
        )

    def _on_device(
        self, pool: DevicePool, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """By kernels alone; ``None`` where they fail."""
        try:
            if self._slots is None:
                self._staging.lend(self._feed.copier)
            where, slots = pool.ensure_and_gather(index), self._slots or self._staging.as_slots(self.unit.bank)
            stacks = slots.by_name
            if self._few is None:
                with self.rounds.bound(stacks, slots.count):
                    result = self.rounds.run(hidden, where.long(), weights, index.shape[1])
            elif (result := self._few(hidden, index, where, weights, stacks)) is None:
                log.info("%s: the host serves each token: no kernel takes its matrices", self.unit.name)
                self.rounds.forget()
                return None
            self._works = True
            return result
        except Exception as error:  # no compiler, no headers: Triton has a class of error for each
            if self._works or isinstance(error, (torch.OutOfMemoryError, OptionError)):
                raise
            log.info("%s: the host serves each token, as a kernel failed: %s", self.unit.name, error)
            self.rounds.forget()
            return None

    def count(self) -> None:
        """What the tables have counted since the last time goes into the trace."""
        if self.rounds.pool is None:
            return
        now, last = self.rounds.pool.counts(), self._counted
        self._counted = now
        asked = [new - old for new, old in zip(now.routed, last.routed, strict=True)]
        hits, misses = now.hits - last.hits, now.misses - last.misses
        self._feed.recorder.counted(self.unit.name, asked, hits, misses * self.unit.bank.expert_bytes)


def _takes(pool: DevicePool, index: torch.Tensor) -> bool:
    pairs = index.numel()
    return len(index) <= MOST_TOKENS and 0 < pairs <= MOST_PAIRS and min(pairs, pool.experts) <= pool.slots
