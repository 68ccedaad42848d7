"""The feed of a mixture's experts: only those that tokens are routed to move, and the latest stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from ..encoding.kernels import launch
from ..plan.residency import ResidencyPlan
from ..stream.bank import Bank, Slots
from ..stream.copier import Copier, CudaCopier, Mark, MemoryCopier
from ..stream.experts import FromFiles, FromHost, FromPageCache, HostSlots, Reading, Source
from ..stream.reader import Reader
from ..stream.ring import LOCKED, PAGE_CACHE, align
from ..stream.schedule import Moved
from ..stream.staging import Staging
from ..tensors.files import Unchanged
from .feeds import Feed
from .recorder import Recorder
from .routed import Layer
from .units import ModelUnit


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
    exact
        All is computed by the module's own code.
    cancelled
        Whether the work is to end.
    sources
        The files: asked, once experts have run, whether these are what the files had.
    """

    is_followed = False  # forwards of its units note themselves what they do

    def __init__(
        self, units: Sequence[ModelUnit], plan: ResidencyPlan, device: torch.device, depth: int | None, exact: bool,
        recorder: Recorder, cancelled: Callable[[], bool], sources: Unchanged,
    ):  # fmt: skip
        self.recorder, self.looks_ahead, self._device, self.cancelled = recorder, depth != 0, device, cancelled
        self._checked = sources
        self.has_kernels = not exact and launch.usable(device)
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
        staging = Staging(self._memory(plan.staging_bytes))
        sources = self._sources([unit.bank for unit in units], plan, reading)
        for unit, source in zip(units, sources, strict=True):
            count = plan.slots_of(unit.name)
            slots = Slots(unit.bank, self._memory(unit.bank.room(count)), count) if count else None
            self.layers[unit.name] = Layer(unit, slots, source, staging, self)
        for layer, following in itertools.pairwise(self.layers.values()):
            layer.rounds.following = following.rounds

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
        rooms = [count * align(bank.expert_bytes) for count, bank in zip(counts, banks, strict=True)]
        shared = max(align(bank.expert_bytes) for bank in banks)
        self._host = HostSlots(sum(rooms) + shared, self._device, machine.ram == LOCKED)
        # What has no slot in host memory passes through one expert's place.
        passing = self._host.take(shared)
        return [
            FromHost(bank, reading, self.copier, count, self._host.take(room) if count else passing,
                     self._host.is_locked)
            for bank, count, room in zip(banks, counts, rooms, strict=True)
        ]  # fmt: skip

    def _was_read(self, name: str, nbytes: int, start: float) -> None:
        self.recorder.moved(Moved("read", self.layers[name].unit.stream, start, self.recorder.clock(), nbytes))

    def leave(self, unit: ModelUnit, mark: Mark) -> None:
        self._checked.check_pages()

    def drop(self, unit: ModelUnit) -> None:
        """What was on its way when the error came is there before anybody looks for it."""
        self.copier.synchronize()
        super().drop(unit)

    @property
    def is_on_device(self) -> bool:  # type: ignore[override]
        """Whether a few tokens may need nothing of the host: which layers do, their first forward shows."""
        return self.has_kernels

    def begin(self) -> None:
        """A sweep begins, on the stream that is current now."""
        self.copier.begin()

    def finish(self) -> None:
        """A run is over: what its tables have counted goes into its trace."""
        for layer in self.layers.values():
            layer.count()

    def close(self) -> None:
        self.copier.synchronize()
        if self._device.type == "cuda":  # kernels read host memory too
            torch.cuda.synchronize(self._device)
        self._reader.close()
        for layer in self.layers.values():
            layer.close()
        self.layers.clear()
        if self._host is not None:
            self._host.close()
