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

from ..checkpoint.files import Unchanged
from ..errors import GenerationStopped
from ..stream.copier import Copier, CudaCopier, Mark, MemoryCopier
from ..stream.mapped import MappedFiles
from ..stream.memory import StreamMemory
from ..stream.prefetcher import Prefetcher
from ..trace import Trace
from .gather import RowGather
from .placing import reserve_scratch
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
        self._files = MappedFiles()
        self._sources = Unchanged(piece.extent.path for unit in units for piece in unit.stream.pieces)
        self._tiers = {unit.name: tier for unit, tier in zip(units, plan.tiers, strict=True)}
        self._hooks: list[Any] = []
        self._reached = -1
        self._resident: dict[str, torch.Tensor] = {}
        self._memory: StreamMemory | None = None
        self._prefetcher: Prefetcher | None = None
        self._timed = [module for module in model.modules() if hasattr(module, "timer")] if profile else []
        try:
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
        self._sources.check()
        self.cancel, self._reached = cancel, -1
        trace.predicted_sweep_seconds, trace.bound_by = self._plan.sweep_seconds, self._plan.bound_by
        trace.plan, trace.tiers = self._plan.as_dict(), self._tiers
        self._recorder.begin(trace)

    def finish(self) -> None:
        """Complete the trace: resolve what the device has finished since."""
        self._recorder.finish(self._prefetcher)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the device the current one of this thread."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    @property
    def position(self) -> tuple[int, int]:
        """The unit that computes, counted from 1, and how many there are in a sweep; 0 where units are not followed."""
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
        for unit in self._units:
            _unbind(unit.bindings)
        for module in self._timed:
            module.timer = None  # type: ignore[assignment]
        self._resident.clear()
        self._prefetcher = None
        if self._memory is not None:
            self._memory.close()
        self._files.close()

    # --- building

    def _build(self, small: Sequence[Weight]) -> None:
        if self._device.type != "cpu":
            reserve_scratch(self._model, self._device)
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
        self._hooks.append(self._model.register_forward_pre_hook(lambda *_: self._begin_sweep()))
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
        self._hook(unit, lambda: _bind(unit.bindings, views), lambda mark: _unbind(unit.bindings))

    def _place_table(self, unit: ModelUnit) -> None:
        binding = unit.bindings[0]
        is_packed = hasattr(binding.module, "packing")
        in_place = self._device.type == "cpu" and not binding.weight.needs_cast and not is_packed
        is_planned = self._plan.tiers[self._units.index(unit)] == "gpu" and not is_tied(unit)
        is_resident = binding.weight.name in self._resident or (is_planned and not in_place)
        if is_resident:
            table = self._on_device(binding.weight)
        else:
            table = self._files.tensor(binding.weight.info, binding.weight.stored_dtype)
        if (is_resident and not is_packed) or in_place:
            self._bind_for_good(binding, table)
            return
        dtype = self._model.dtype if is_packed else binding.weight.dtype
        gather = RowGather(binding.module, table, dtype, self._device)  # type: ignore[arg-type]
        self._hooks.extend(gather.hooks)

    def _bind_for_good(self, binding: Binding, tensor: torch.Tensor) -> None:
        binding.module._parameters[binding.attribute] = _parameter(tensor)

    def _stream(self, units: list[ModelUnit]) -> None:
        if not units:
            return
        machine = self._plan.machine
        self._memory = StreamMemory(
            [unit.stream for unit in units], [self._tiers[unit.name] == "ram" for unit in units], device=self._device,
            arena_bytes=self._plan.arena_bytes, ring_bytes=self._plan.ring_bytes, ram=machine.ram,
            direct=machine.direct,
        )  # fmt: skip
        self._prefetcher = Prefetcher(
            self._memory.stops, self._memory.reader, self._copier, self._depth, self._recorder.clock,
            lambda: self.cancel.is_set(),
        )  # fmt: skip
        for index, (unit, stop) in enumerate(zip(units, self._memory.stops, strict=True)):
            memory = stop.host if stop.device is None else stop.device
            assert memory is not None, "a unit that is not copied is computed in host memory"
            views = [_typed_view(memory, binding) for binding in unit.bindings]
            self._hook(unit, self._taker(index, unit, views), self._releaser(index, unit))

    # --- hooks

    def _hook(self, unit: ModelUnit, before: Callable[[], None], after: Callable[[Mark], None]) -> None:
        recorder, name, index = self._recorder, unit.name, self._units.index(unit)

        def enter(*_: Any) -> None:
            self._reached = index
            if self.cancel.is_set():
                raise GenerationStopped(f"stopped before {name}")
            before()
            recorder.begin_compute()

        def leave(*_: Any) -> None:
            after(recorder.end_compute(name))
            recorder.look(self._prefetcher)

        self._hooks.append(unit.module.register_forward_pre_hook(enter))
        self._hooks.append(unit.module.register_forward_hook(leave))

    def _time(self, unit: ModelUnit) -> None:
        """A unit that stays bound: it is timed and can be stopped before, unless that would cost a GPU time."""
        if self._device.type == "cpu":
            self._hook(unit, lambda: None, lambda mark: None)

    def _taker(self, index: int, unit: ModelUnit, views: list[torch.Tensor]) -> Callable[[], None]:
        parameters = [_parameter(view) for view in views]

        def take() -> None:
            assert self._prefetcher is not None
            _, waited = self._prefetcher.take(index)
            self._recorder.waited(unit.name, waited)
            _bind(unit.bindings, parameters)

        return take

    def _releaser(self, index: int, unit: ModelUnit) -> Callable[[Mark], None]:
        def release(mark: Mark) -> None:
            assert self._prefetcher is not None
            _unbind(unit.bindings)
            self._prefetcher.release(index, mark)

        return release

    def _begin_sweep(self) -> None:
        # Where everything is resident on a GPU no unit has a hook: a sweep is short there, and this is the stop.
        if self.cancel.is_set():
            raise GenerationStopped("stopped before a sweep")
        self._recorder.begin_sweep()

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
