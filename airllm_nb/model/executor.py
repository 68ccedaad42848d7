"""Runs a native model whose weights are elsewhere: bind → forward → unbind, by PyTorch's forward hooks.

A unit's memory has one fixed address for the life of the model, so its parameters are made once as views of it; to
bind is to put them into the module, to unbind is to put the ``meta`` ones back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import GenerationStopped
from ..stream.copier import Copier, CudaCopier, MemoryCopier
from ..stream.mapped import MappedFiles
from ..stream.prefetcher import Prefetcher, Stop
from ..stream.reader import Reader
from ..stream.ring import HostArena, align, place
from ..trace import Trace
from .gather import RowGather
from .plan import ResidencyPlan
from .recorder import Recorder
from .skeleton import Binding, ModelUnit, Weight, is_tied


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
    profile
        Time dequantisation too.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[ModelUnit],
        small: Sequence[Weight],
        plan: ResidencyPlan,
        device: torch.device,
        depth: int | None,
        profile: bool = False,
    ):
        self._model, self._units, self._plan, self._device, self._depth = model, list(units), plan, device, depth
        self.cancel = threading.Event()
        self._copier: Copier = CudaCopier(device) if device.type == "cuda" else MemoryCopier()
        self._recorder = Recorder(self._copier, device)
        self._files, self._reader = MappedFiles(), Reader()
        self._hooks: list[Any] = []
        self._reached = 0
        self._arenas: list[HostArena] = []
        self._resident: dict[str, torch.Tensor] = {}
        self._stops: list[Stop] = []
        self._prefetcher: Prefetcher | None = None
        self._timed = [module for module in model.modules() if hasattr(module, "timer")] if profile else []
        try:
            self._build(small)
        except BaseException:
            self.close()
            raise

    # --- while it runs

    def start(self, trace: Trace, cancel: threading.Event) -> None:
        """Record into ``trace`` from now on; ``cancel`` ends the work before the next unit."""
        self.cancel = cancel
        trace.predicted_sweep_seconds = self._plan.sweep_seconds
        self._recorder.begin(trace)

    def finish(self) -> None:
        """Complete the trace: resolve what the device has finished since."""
        self._recorder.resolve(self._prefetcher, wait=True)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the device the current one of this thread."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    @property
    def position(self) -> tuple[int, int]:
        """The unit that computes, counted from 1, and how many there are in a sweep."""
        return self._reached + 1, len(self._units)

    @property
    def resets(self) -> int:
        """How often compute left the schedule; each costs the units that were ahead."""
        return self._prefetcher.resets if self._prefetcher else 0

    def close(self) -> None:
        """Remove the hooks, stop the threads, drop the memory. Safe to call twice and in every state."""
        self.cancel.set()
        while self._hooks:
            self._hooks.pop().remove()
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._reader.close()
        for unit in self._units:
            _unbind(unit.bindings)
        for module in self._timed:
            module.timer = None  # type: ignore[assignment]
        self._resident.clear()
        self._stops.clear()
        self._prefetcher = None
        while self._arenas:
            self._arenas.pop().close()
        self._files.close()

    # --- building

    def _build(self, small: Sequence[Weight]) -> None:
        for weight in small:
            tensor = self._files.tensor(weight.info, weight.stored_dtype).to(self._device, weight.dtype, copy=True)
            for module, attribute in weight.owners:
                target = module._buffers if weight.is_buffer else module._parameters
                target[attribute] = tensor if weight.is_buffer else _parameter(tensor)  # type: ignore[assignment]
        streamed: list[ModelUnit] = []
        tables: list[ModelUnit] = []
        for unit, tier in zip(self._units, self._plan.tiers, strict=True):
            if unit.kind == "embedding":
                tables.append(unit)
            elif tier == "gpu":
                self._make_resident(unit)
            elif tier == "ram" and not self._plan.machine.has_device:
                self._compute_in_place(unit)
            else:
                streamed.append(unit)
        # After the units: a table tied to a resident head needs no memory of its own.
        for unit in tables:
            self._place_table(unit)
        self._stream(streamed)
        for module in self._timed:
            module.timer = self._recorder.dequantising  # type: ignore[assignment]
        self._hooks.append(self._model.register_forward_pre_hook(lambda *_: self._recorder.begin_sweep()))
        self._hooks.append(self._model.register_forward_hook(lambda *_: self._end_sweep()))

    def _make_resident(self, unit: ModelUnit) -> None:
        for binding in unit.bindings:
            self._bind_for_good(binding, self._on_device(binding.weight))
        self._time(unit)

    def _on_device(self, weight: Weight) -> torch.Tensor:
        if weight.name not in self._resident:
            stored = self._files.tensor(weight.info, weight.stored_dtype)
            self._resident[weight.name] = stored.to(self._device, weight.dtype, copy=True)
        return self._resident[weight.name]

    def _compute_in_place(self, unit: ModelUnit) -> None:
        """Host memory is compute memory: bind views of the mapped files, for good where they need no cast."""
        views = [self._files.tensor(binding.weight.info, binding.weight.stored_dtype) for binding in unit.bindings]
        if not any(binding.weight.needs_cast for binding in unit.bindings):
            for binding, view in zip(unit.bindings, views, strict=True):
                self._bind_for_good(binding, view)
            self._time(unit)
            return
        self._hook(unit, lambda: _bind(unit.bindings, views), lambda: _unbind(unit.bindings))

    def _place_table(self, unit: ModelUnit) -> None:
        binding = unit.bindings[0]
        in_place = self._device.type == "cpu" and not binding.weight.needs_cast
        is_planned = self._plan.tiers[self._units.index(unit)] == "gpu" and not is_tied(unit)
        if binding.weight.name in self._resident or (is_planned and not in_place):
            self._bind_for_good(binding, self._on_device(binding.weight))
            return
        table = self._files.tensor(binding.weight.info, binding.weight.stored_dtype)
        if in_place:
            self._bind_for_good(binding, table)
            return
        gather = RowGather(binding.module, table, binding.weight.dtype, self._device)  # type: ignore[arg-type]
        self._hooks.extend(gather.hooks)

    def _bind_for_good(self, binding: Binding, tensor: torch.Tensor) -> None:
        binding.module._parameters[binding.attribute] = _parameter(tensor)

    def _stream(self, units: list[ModelUnit]) -> None:
        if not units:
            return
        self._stops = self._make_stops(units)
        self._prefetcher = Prefetcher(
            self._stops, self._reader, self._copier, self._depth, self._recorder.clock, lambda: self.cancel.is_set()
        )
        for index, (unit, stop) in enumerate(zip(units, self._stops, strict=True)):
            memory = stop.host if stop.device is None else stop.device
            views = [_typed_view(memory, binding) for binding in unit.bindings]
            self._hook(unit, self._taker(index, unit, views), self._releaser(index, unit))

    def _make_stops(self, units: list[ModelUnit]) -> list[Stop]:
        tiers = {unit.name: tier for unit, tier in zip(self._units, self._plan.tiers, strict=True)}
        disk = [unit for unit in units if tiers[unit.name] == "disk"]
        kept = [unit for unit in units if tiers[unit.name] == "ram"]
        ring_places = dict(
            zip([unit.name for unit in disk], place([unit.nbytes for unit in disk], self._plan.ring_bytes), strict=True)
        )
        ring = self._host_arena(self._plan.ring_bytes) if disk else None
        own = self._host_arena(sum(align(unit.nbytes) for unit in kept)) if kept else None
        device_places: Sequence[Any] = [None] * len(units)
        if self._plan.machine.has_device:
            arena = torch.empty(self._plan.arena_bytes, dtype=torch.uint8, device=self._device)
            device_places = place([unit.nbytes for unit in units], self._plan.arena_bytes)
        stops, cursor = [], 0
        for unit, where in zip(units, device_places, strict=True):
            in_ring = ring_places.get(unit.name)
            if in_ring is not None:
                assert ring is not None
                host = ring.view(in_ring.offset, unit.nbytes)
            else:
                assert own is not None
                host = own.view(cursor, unit.nbytes)
                cursor += align(unit.nbytes)
            device = arena[where.offset : where.offset + unit.nbytes] if where else None
            stops.append(Stop(unit.stream, host, device, in_ring, where, keep=in_ring is None))
        return stops

    def _host_arena(self, nbytes: int) -> HostArena:
        arena = HostArena(nbytes, pin=self._device.type == "cuda")
        self._arenas.append(arena)
        return arena

    # --- hooks

    def _hook(self, unit: ModelUnit, before: Callable[[], None], after: Callable[[], None]) -> None:
        recorder, name, index = self._recorder, unit.name, self._units.index(unit)

        def enter(*_: Any) -> None:
            self._reached = index
            if self.cancel.is_set():
                raise GenerationStopped(f"stopped before {name}")
            before()
            recorder.begin_compute()

        def leave(*_: Any) -> None:
            recorder.end_compute(name)
            after()

        self._hooks.append(unit.module.register_forward_pre_hook(enter))
        self._hooks.append(unit.module.register_forward_hook(leave))

    def _time(self, unit: ModelUnit) -> None:
        """A unit that stays bound: it is timed and can be stopped before, unless that would cost a GPU time."""
        if self._device.type == "cpu":
            self._hook(unit, lambda: None, lambda: None)

    def _taker(self, index: int, unit: ModelUnit, views: list[torch.Tensor]) -> Callable[[], None]:
        parameters = [_parameter(view) for view in views]

        def take() -> None:
            assert self._prefetcher is not None
            _, waited = self._prefetcher.take(index)
            self._recorder.waited(unit.name, waited)
            _bind(unit.bindings, parameters)

        return take

    def _releaser(self, index: int, unit: ModelUnit) -> Callable[[], None]:
        def release() -> None:
            assert self._prefetcher is not None
            _unbind(unit.bindings)
            self._prefetcher.release(index)

        return release

    def _end_sweep(self) -> None:
        self._recorder.end_sweep(self._prefetcher)


def _bind(bindings: Sequence[Binding], tensors: Sequence[torch.Tensor]) -> None:
    for binding, tensor in zip(bindings, tensors, strict=True):
        if binding.weight.needs_cast:
            tensor = tensor.to(binding.weight.dtype)
        binding.module._parameters[binding.attribute] = tensor  # type: ignore[assignment]


def _unbind(bindings: Sequence[Binding]) -> None:
    for binding in bindings:
        binding.module._parameters[binding.attribute] = binding.weight.meta  # type: ignore[assignment]


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _typed_view(memory: torch.Tensor, binding: Binding) -> torch.Tensor:
    info = binding.weight.info
    return memory[binding.offset : binding.offset + info.nbytes].view(binding.weight.stored_dtype).view(info.shape)
