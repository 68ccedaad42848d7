"""Runs a native model whose weights are elsewhere: bind → forward → unbind, by PyTorch's forward hooks.

The executor gives each unit of its stage a feed (:mod:`~airllm_nb.model.feeds`), and puts on the hooks that ask it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ..encoding.kernels import launch
from ..errors import BusyError, GenerationStopped
from ..stream.copier import Copier, CudaCopier, MemoryCopier
from ..stream.mapped import MappedFiles
from ..tensors.files import Unchanged
from ..trace import Trace
from .banked import Banked
from .feeds import Feed, Gathered, InPlace, Streamed, unbind
from .grouped import ResidentExperts
from .hooks import Guard, PartGuard, Turn, UnitHooks
from .placing import computes_packed, reserve_scratch
from .recorder import Recorder
from .resident import Resident
from .stage import Stage
from .units import ModelUnit, is_tied


class Executor:
    """Owns the memory, the threads and the hooks of one stage of a model.

    Parameters
    ----------
    model
        The skeleton.
    stage
        What of it runs here.
    depth
        Units ahead, see :class:`~airllm_nb.stream.prefetcher.Prefetcher`.
    turn
        Whose turn it is to run the model.
    profile
        Time dequantisation too.

    Attributes
    ----------
    feeds
        What gives each unit its weights.
    holds_all
        Whether every weight is there all the time, as it is: what runs is a native model like any other.
    plan
        That of the stage; may be replaced by one that places all as it is.
    """

    def __init__(self, model: Any, stage: Stage, depth: int | None, turn: Turn, profile: bool = False):
        self._model, self._stage, self.plan, self._device, self._depth = model, stage, stage.plan, stage.device, depth
        self.turn, self.holds_all = turn, False
        # What ends the work before the next unit; the unit that computes, -1 where none is followed.
        self._cancel, self._reached, self._is_sweeping = threading.Event(), -1, False
        on_gpu = stage.device.type == "cuda"
        self._copier: Copier = CudaCopier(stage.device) if on_gpu else MemoryCopier()
        self.recorder, self._files = Recorder(self._copier, stage.device), MappedFiles()
        weights = [*stage.small, *(binding.weight for unit in stage.units for binding in unit.bindings)]
        self.sources = Unchanged({extent.path for weight in weights for extent in weight.info.extents})
        self._tiers = {unit.name: tier for unit, tier in zip(stage.units, stage.plan.tiers, strict=True)}
        self._hooks: list[Any] = []
        self._resident, self._streamed = Resident(self._files, stage.device), None  # type: Resident, Streamed | None
        self._banked: Banked | None = None
        self._experts: list[ResidentExperts] = []
        self.feeds: list[tuple[ModelUnit, Feed]] = []
        self._timed = [module for module in model.modules() if hasattr(module, "timer")] if profile else []
        try:
            # Whoever opens a model in inference mode may train it, or another thread run it, later.
            with torch.inference_mode(False), torch.no_grad():
                self._build()
        except BaseException:
            self.close()
            raise

    # --- while it runs

    def start(self, trace: Trace, cancel: threading.Event) -> None:
        """Record into ``trace`` from now on; ``cancel`` ends the work before the next unit.

        Raises
        ------
        CheckpointError
            If a file of the weights was changed since they were opened.
        """
        self.sources.check()
        # What an interrupted one has left is forgotten.
        self._cancel, self._reached, self._is_sweeping = cancel, -1, False
        if self._streamed is not None:
            self._streamed.begin()
        if self._banked is not None:
            self._banked.begin()
        trace.predicted_sweep_seconds, trace.bound_by = self.plan.sweep_seconds, self.plan.bound_by
        trace.plan, trace.tiers = self.plan.as_dict(), self._tiers
        self.recorder.begin(trace)

    def finish(self) -> None:
        """Complete the trace: resolve what the device has finished since."""
        if self._banked is not None:
            self._banked.finish()
        self.recorder.finish()

    @contextlib.contextmanager
    def sweep(self, is_replayed: bool = False) -> Iterator[None]:
        """A forward of the whole model runs within, as one sweep of the trace.

        ``is_replayed``: all at once, as it was recorded, so that no unit is known.

        Raises
        ------
        BusyError
            If it is called from within a sweep.
        """
        if self._is_sweeping:
            raise BusyError("the model is called from within its own forward (by a hook?); call it before or after")
        # Where everything is resident on a GPU no unit has a hook: a sweep is short there, and this is the stop.
        if self._cancel.is_set():
            raise GenerationStopped("stopped before a sweep")
        self._is_sweeping = True
        try:
            if self._streamed is not None:
                self._streamed.begin()
            if self._banked is not None:
                self._banked.begin()
            self.recorder.begin_sweep()
            yield
            self.recorder.end_sweep(is_replayed)
        finally:
            self._is_sweeping = False

    def reach(self, index: int, name: str) -> None:
        """Compute is before a unit; a stop is heard here."""
        self._reached = index
        if self._cancel.is_set():
            raise GenerationStopped(f"stopped before {name}")

    def begin_part(self) -> None:
        """Somebody calls a part of the model on its own: what stopped the last run is none of its business."""
        self.start(Trace(), self.turn.cancel)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the device the current one of this thread."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    @property
    def position(self) -> tuple[int, int]:
        """The unit that computes, counted from 1, and how many there are in a sweep; 0 where units are not followed."""
        return self._reached + 1, len(self._stage.units)

    @property
    def can_be_recorded(self) -> bool:
        """Whether nothing in a sweep waits for the host: a device has all weights."""
        return self.plan.machine.has_device and all(feed.is_on_device for _, feed in self.feeds)

    @property
    def changed(self) -> str:
        """A resident weight that is not what the checkpoint says any more; empty if there is none."""
        return self._resident.changed()

    @property
    def resets(self) -> int:
        """How often compute left the schedule; each costs the units that were ahead."""
        return self._streamed.prefetcher.resets if self._streamed else 0

    def close(self, hooks: bool = True) -> None:
        """Remove the hooks, stop the threads, drop the memory. Safe to call twice and in every state."""
        # Nothing runs any more. The event in force is the caller's: to set it would stop a repetition.
        self._cancel = threading.Event()
        self._cancel.set()
        while hooks and self._hooks:
            self._hooks.pop().remove()
        for unit in self._stage.units:
            unbind(unit.bindings)
        for module in self._timed:
            module.timer = None
        for feed in {id(feed): feed for _, feed in self.feeds}.values():
            feed.close()
        while self._experts:
            self._experts.pop().close()
        for made in (self._streamed, self._banked):  # also where building was interrupted before units were followed
            if made is not None:
                made.close()
        self.feeds.clear()
        self._resident.close()
        self.recorder.prefetcher = self._streamed = self._banked = None
        self._files.close()

    # --- building

    def _build(self) -> None:
        if self._device.type != "cpu":
            reserve_scratch(self._model, self._device)
        for weight in self._stage.small:
            self._resident.keep(weight)
        self._feed_units()
        for unit, feed in self.feeds:
            if not feed.stays:
                self._follow(unit, feed)
            elif unit.kind != "embedding":
                self._time(unit, feed)
        for module in self._timed:
            module.timer = self.recorder.dequantising
        self._guard_parts()
        self.holds_all = all(feed.stays for _, feed in self.feeds) and not computes_packed(self._model)
        if self.holds_all:
            self._resident.let_train()
        if self.plan.machine.has_device:  # else it is never built again
            self._resident.remember()

    def _feed_units(self) -> None:
        """Give each unit its feed, as the plan says."""
        in_place, streamed, tables, banks = InPlace(), list[ModelUnit](), list[ModelUnit](), list[ModelUnit]()
        for unit in self._stage.units:
            tier = self._tiers[unit.name]
            if unit.kind == "embedding":
                tables.append(unit)
            elif tier == "gpu":
                self._resident.add(unit)
                self.feeds.append((unit, self._resident))
                if unit.kind == "experts" and not self._stage.exact and launch.usable(self._device):
                    with contextlib.suppress(ValueError):  # no kernel multiplies them
                        self._experts.append(ResidentExperts(unit.module))
            elif tier == "ram" and not self.plan.machine.has_device:
                if unit.cast_bytes:
                    in_place.add(unit, [self._resident.stored(binding.weight) for binding in unit.bindings])
                else:
                    self._resident.add(unit, in_place=True)
                self.feeds.append((unit, in_place if unit.cast_bytes else self._resident))
            else:
                (banks if unit.kind == "experts" else streamed).append(unit)
        self._feed_tables(tables)
        if banks:
            self._banked = Banked(
                banks, self.plan, self._device, self._depth, self._stage.exact, self.recorder,
                lambda: self._cancel.is_set(), self.sources,
            )  # fmt: skip
            self.feeds += [(unit, self._banked) for unit in banks]
        if streamed:
            self._streamed = Streamed(
                streamed, self._tiers, self.plan, self._device, self._copier, self._depth, self.recorder,
                lambda: self._cancel.is_set(),
            )  # fmt: skip
            self.recorder.prefetcher = self._streamed.prefetcher
            self.feeds += [(unit, self._streamed) for unit in streamed]

    def _feed_tables(self, tables: list[ModelUnit]) -> None:
        """After the others: a table that is tied to a resident head needs no memory of its own."""
        gathered = Gathered(self._device, self.sources)
        for unit in tables:
            (binding,), encoding = unit.bindings, getattr(unit.module, "row_encoding", None)
            is_native = self._device.type == "cpu" and not binding.weight.needs_cast and encoding is None
            is_planned = self._tiers[unit.name] == "gpu" and not is_tied(unit)
            is_resident = binding.weight in self._resident or (is_planned and not is_native)
            if is_native or (is_resident and encoding is None):
                self._resident.add(unit, in_place=not is_resident)
                self.feeds.append((unit, self._resident))
            else:
                table = (self._resident.copy if is_resident else self._resident.stored)(binding.weight)
                gathered.add(unit, table, binding.weight.dtype if encoding is None else self._model.dtype)
                self.feeds.append((unit, gathered))

    # --- hooks

    def _follow(self, unit: ModelUnit, feed: Feed) -> None:
        self._hooks += UnitHooks(self, self._stage.units.index(unit), unit, feed).put_on()

    def _time(self, unit: ModelUnit, feed: Feed) -> None:
        """A unit that stays bound: it is timed and can be stopped before, unless that would cost a GPU time."""
        if self._device.type == "cpu":
            self._follow(unit, feed)
        elif computes_packed(unit.module):
            self._hooks += Guard(self.turn, unit.module, self.begin_part).put_on()  # all unpack into one scratch

    def _guard_parts(self) -> None:
        from transformers import PreTrainedModel

        for part in self._model.modules():
            if isinstance(part, PreTrainedModel) and part is not self._model:
                self._hooks += PartGuard(self.turn, part, self.begin_part).put_on()
