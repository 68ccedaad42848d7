"""Runs a native model whose weights are elsewhere: bind → forward → unbind, by PyTorch's forward hooks.

A unit's memory has one fixed address for the life of the model, so its parameters are made once as views of it; to
bind is to put them into the module, to unbind is to put the ``meta`` ones back. What is resident stays bound, and is
an ordinary parameter.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..plan.residency import ResidencyPlan
from ..stream.copier import Copier, CudaCopier, Mark, MemoryCopier
from ..stream.mapped import MappedFiles
from ..stream.memory import StreamMemory
from ..stream.prefetcher import Prefetcher
from ..tensors.files import Unchanged
from ..trace import Trace
from .binding import Bound, typed_view, unbind
from .gather import RowGather
from .hooks import Guard, UnitHooks, guard_parts
from .placing import computes_packed, reserve_scratch
from .recorder import Recorder
from .resident import Resident
from .skeleton import ModelUnit, Weight, is_tied
from .sweep import Sweep
from .turn import Turn


class Executor:
    """Owns the memory, the threads and the hooks of one model.

    Parameters
    ----------
    model
        The skeleton.
    units, small
        Its units in the order of the schedule, and the weights that are always resident.
    plan
        The tier of each unit; ``plan.machine.has_device`` says whether weights are copied to compute memory.
    device
        Where compute runs.
    depth
        Units ahead, see :class:`~airllm_nb.stream.prefetcher.Prefetcher`.
    turn
        Whose turn it is to run the model.
    profile
        Time dequantisation too.

    Attributes
    ----------
    holds_all
        Whether every weight is there all the time, as it is: what runs is a native model like any other.
    plan
        May be replaced by one that places all as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[ModelUnit],
        small: Sequence[Weight],
        plan: ResidencyPlan,
        device: torch.device,
        depth: int | None,
        turn: Turn,
        profile: bool = False,
    ):
        self._model, self._units, self.plan, self._device, self._depth = model, list(units), plan, device, depth
        self._turn, self._sweep, self.holds_all = turn, Sweep(), True
        self._copier: Copier = CudaCopier(device) if device.type == "cuda" else MemoryCopier()
        self._recorder, self._files = Recorder(self._copier, device), MappedFiles()
        weights = [*small, *(binding.weight for unit in units for binding in unit.bindings)]
        self.sources = Unchanged(extent.path for weight in weights for extent in weight.info.extents)
        self._tiers = {unit.name: tier for unit, tier in zip(units, plan.tiers, strict=True)}
        self._hooks: list[Any] = []
        self._resident = Resident(self._files, device)
        self._memory: StreamMemory | None = None
        self._prefetcher: Prefetcher | None = None
        self._timed = [module for module in model.modules() if hasattr(module, "timer")] if profile else []
        try:
            # Whoever opens a model in inference mode may train it, or another thread run it, later.
            with torch.inference_mode(False), torch.no_grad():
                self._build(small)
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
        self._sweep.start(cancel)
        trace.predicted_sweep_seconds, trace.bound_by = self.plan.sweep_seconds, self.plan.bound_by
        trace.plan, trace.tiers = self.plan.as_dict(), self._tiers
        self._recorder.begin(trace)

    def finish(self) -> None:
        """Complete the trace: resolve what the device has finished since."""
        self._recorder.finish(self._prefetcher)

    def sweep(self, forward: Callable[[], Any]) -> Any:
        """``forward()`` of the whole model, as one sweep of the trace.

        Raises
        ------
        BusyError
            If it is called from within a sweep.
        """
        with self._sweep.under_way():
            self._recorder.begin_sweep()
            output = forward()
            self._recorder.end_sweep(self._prefetcher)
            return output

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the device the current one of this thread."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    @property
    def position(self) -> tuple[int, int]:
        """The unit that computes, counted from 1, and how many there are in a sweep; 0 where units are not followed."""
        return self._sweep.reached + 1, len(self._units)

    @property
    def changed(self) -> str:
        """A resident weight that is not what the checkpoint says any more; empty if there is none."""
        return self._resident.changed()

    @property
    def resets(self) -> int:
        """How often compute left the schedule; each costs the units that were ahead."""
        return self._prefetcher.resets if self._prefetcher else 0

    def close(self, hooks: bool = True) -> None:
        """Remove the hooks, stop the threads, drop the memory. Safe to call twice and in every state."""
        self._sweep.end()
        while hooks and self._hooks:
            self._hooks.pop().remove()
        if self._prefetcher is not None:
            self._prefetcher.close()
        for unit in self._units:
            unbind(unit.bindings)
        for module in self._timed:
            module.timer = None  # type: ignore[assignment]
        self._resident.close()
        if self._memory is not None:
            self._memory.close()
        self._prefetcher = None
        self._files.close()

    # --- building

    def _build(self, small: Sequence[Weight]) -> None:
        if self._device.type != "cpu":
            reserve_scratch(self._model, self._device)
        for weight in small:
            self._resident.keep(weight)
        streamed, tables = list[ModelUnit](), list[ModelUnit]()
        for unit, tier in zip(self._units, self.plan.tiers, strict=True):
            if unit.kind == "embedding":
                tables.append(unit)
            elif tier == "gpu":
                self._make_resident(unit)
            elif tier == "ram" and not self.plan.machine.has_device:
                self._compute_in_place(unit)
            else:
                streamed.append(unit)
        for unit in tables:  # last: one tied to a resident head needs no memory of its own
            self._place_table(unit)
        self._stream(streamed)
        for module in self._timed:
            module.timer = self._recorder.dequantising  # type: ignore[assignment]
        self._hooks.extend(guard_parts(self._turn, self._model, self._begin))
        self.holds_all &= not computes_packed(self._model)
        if self.holds_all:
            self._resident.let_train()
        if self.plan.machine.has_device:  # else it is never built again
            self._resident.remember()

    def _make_resident(self, unit: ModelUnit) -> None:
        for binding in unit.bindings:
            self._resident.bind(binding, self._resident.copy(binding.weight))
        self._time(unit)

    def _compute_in_place(self, unit: ModelUnit) -> None:
        """Host memory is compute memory: bind views of the mapped files, for good where they need no cast."""
        views = [self._resident.stored(binding.weight) for binding in unit.bindings]
        if not any(binding.weight.needs_cast for binding in unit.bindings):
            for binding, view in zip(unit.bindings, views, strict=True):
                self._resident.bind(binding, view)
            self._time(unit)
            return
        bound = Bound(unit.bindings, views)
        self._hook(unit, bound.bind, lambda mark: bound.unbind(), streams=True)

    def _place_table(self, unit: ModelUnit) -> None:
        binding = unit.bindings[0]
        has_packing = hasattr(binding.module, "packing")
        in_place = self._device.type == "cpu" and not binding.weight.needs_cast and not has_packing
        is_planned = self.plan.tiers[self._units.index(unit)] == "gpu" and not is_tied(unit)
        is_resident = binding.weight in self._resident or (is_planned and not in_place)
        table = self._resident.copy(binding.weight) if is_resident else self._resident.stored(binding.weight)
        if (is_resident and not has_packing) or in_place:
            self._resident.bind(binding, table)
            return
        dtype = self._model.dtype if has_packing else binding.weight.dtype
        guard = self._guard(binding.module)
        gather = RowGather(binding.module, table, dtype, self._device, self.sources)  # type: ignore[arg-type]
        binding.module._forward_hooks.move_to_end(guard[-1].id)  # the turn is given back when all is done
        self._hooks.extend([*guard, *gather.hooks])
        self.holds_all = False

    def _stream(self, units: list[ModelUnit]) -> None:
        if not units:
            return
        plan, kept = self.plan, [self._tiers[unit.name] == "ram" for unit in units]
        self._memory = StreamMemory(
            [unit.stream for unit in units], kept, device=self._device, arena_bytes=plan.arena_bytes,
            ring_bytes=plan.ring_bytes, ram=plan.machine.ram, direct=plan.machine.direct,
        )  # fmt: skip
        self._prefetcher = Prefetcher(
            self._memory.stops, self._memory.reader, self._copier, self._depth, self._recorder.clock,
            lambda: self._sweep.cancel.is_set(),
        )  # fmt: skip
        for index, (unit, stop) in enumerate(zip(units, self._memory.stops, strict=True)):
            memory = stop.host if stop.device is None else stop.device
            assert memory is not None, "a unit that is not copied is computed in host memory"
            bound = Bound(unit.bindings, [typed_view(memory, binding) for binding in unit.bindings])
            self._hook(unit, *self._passing(index, unit, bound), streams=True)

    # --- hooks

    def _hook(
        self, unit: ModelUnit, before: Callable[[], None], after: Callable[[Mark], None], streams: bool = False
    ) -> None:
        recorder, name, index = self._recorder, unit.name, self._units.index(unit)

        def enter() -> None:
            self._sweep.reach(index, name)
            before()
            recorder.begin_compute()

        def leave() -> None:
            after(recorder.end_compute(name))
            self.sources.check_pages()
            recorder.look(self._prefetcher)

        def failed() -> None:
            self._sweep.leave(name)
            if streams:
                unbind(unit.bindings)

        self.holds_all &= not streams
        self._hooks.extend(UnitHooks(self._turn, unit.module, self._begin, enter, leave, failed, streams).put_on())

    def _time(self, unit: ModelUnit) -> None:
        """A unit that stays bound: it is timed and can be stopped before, unless that would cost a GPU time."""
        if self._device.type == "cpu":
            self._hook(unit, lambda: None, lambda mark: None)
        elif computes_packed(unit.module):
            self._hooks.extend(self._guard(unit.module))  # all unpack into one scratch

    def _guard(self, module: nn.Module) -> list[Any]:
        return Guard(self._turn, module, self._begin).put_on()

    def _begin(self) -> None:
        """Somebody calls a part of the model on its own: what stopped the last run is none of its business."""
        self.start(Trace(), self._turn.cancel)

    def _passing(self, index: int, unit: ModelUnit, bound: Bound) -> tuple[Callable[[], None], Callable[[Mark], None]]:
        """What happens before and after the forward of a unit that streams."""
        prefetcher = self._prefetcher
        assert prefetcher is not None

        def take() -> None:
            self._sweep.enter(unit.name)
            _, waited = prefetcher.take(index)
            self._recorder.waited(unit.name, waited)
            bound.bind()

        def release(mark: Mark) -> None:
            self._sweep.leave(unit.name)
            bound.unbind()
            prefetcher.release(index, mark)

        return take, release
