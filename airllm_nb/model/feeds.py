"""How a unit gets its weights: a feed for each way, asked before the unit's forward and after it.

What stays bound between forwards has a feed of its own, see :mod:`~airllm_nb.model.resident`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import BusyError
from ..plan.residency import ResidencyPlan
from ..stream.copier import Copier, Mark
from ..stream.memory import StreamMemory
from ..stream.prefetcher import Prefetcher
from ..stream.schedule import Schedule
from ..tensors.files import Unchanged
from .absent import edited
from .recorder import Recorder
from .units import Binding, ModelUnit

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Feed:
    """One way in which units get their weights.

    Attributes
    ----------
    stays
        Weights are bound for good, as parameters of an ordinary model.
    is_followed
        Forwards of its units are timed and counted, and a stop is heard before each.
    is_on_device
        Nothing waits for the host: what it takes is where compute runs.
    """

    stays = False
    is_followed = True
    is_on_device = False

    def enter(self, unit: ModelUnit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Have the weights of ``unit`` bound; returns the arguments of its forward if they become others."""

    def leave(self, unit: ModelUnit, mark: Mark) -> None:
        """The forward of ``unit`` is queued, up to ``mark``."""

    def drop(self, unit: ModelUnit) -> None:
        """The forward of ``unit`` has ended by an error."""
        unbind(unit.bindings)

    def close(self) -> None:
        """Give back memory, threads and files. Safe to call twice."""


class InPlace(Feed):
    """Host memory is compute memory, and weights need a cast: the mapped files, cast for each forward."""

    def __init__(self) -> None:
        self._bound: dict[str, Bound] = {}

    def add(self, unit: ModelUnit, stored: Sequence[torch.Tensor]) -> None:
        """``stored``: the weights of ``unit``, one a binding, as they are cast from."""
        self._bound[unit.name] = Bound(unit.bindings, stored)

    def enter(self, unit: ModelUnit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._bound[unit.name].bind()

    def leave(self, unit: ModelUnit, mark: Mark) -> None:
        self._bound[unit.name].unbind()


class Streamed(InPlace):
    """Weights pass through the arena (or, where compute runs on host memory, the ring), ahead of compute.

    Parameters
    ----------
    units
        In the order of use.
    plan
        The tiers of all units by name are ``tiers``; the sizes of arena and ring are its.
    """

    def __init__(
        self, units: Sequence[ModelUnit], tiers: dict[str, str], plan: ResidencyPlan, device: torch.device,
        copier: Copier, depth: int | None, recorder: Recorder, cancelled: Callable[[], bool],
    ):  # fmt: skip
        super().__init__()
        self._recorder, self._inside = recorder, ""
        self._memory = StreamMemory(
            [unit.stream for unit in units], [tiers[unit.name] == "ram" for unit in units], device=device,
            arena_bytes=plan.arena_bytes, ring_bytes=plan.ring_bytes, ram=plan.machine.ram,
            direct=plan.machine.direct,
        )  # fmt: skip
        with contextlib.ExitStack() as undone:  # where this is interrupted, nobody else knows of memory and threads
            undone.callback(self._memory.close)
            self.prefetcher = Prefetcher(
                self._memory.stops, self._memory.reader, copier, depth, recorder.clock, cancelled,
                Schedule.of(range(len(units))),
            )  # fmt: skip
            undone.callback(self.prefetcher.close)
            self._index = {unit.name: index for index, unit in enumerate(units)}
            # A unit's memory has one address for the life of the plan: parameters are made once, as views of it.
            for unit, stop in zip(units, self._memory.stops, strict=True):
                memory = stop.host if stop.device is None else stop.device
                assert memory is not None, "a unit that is not copied is computed in host memory"
                self.add(unit, [_typed_view(memory, binding) for binding in unit.bindings])
            undone.pop_all()

    def begin(self) -> None:
        """A sweep begins: what an interrupted one has left is forgotten."""
        self._inside = ""

    def enter(self, unit: ModelUnit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait until the unit is there, and bind it; raises ``BusyError`` while another one computes."""
        if self._inside:
            raise BusyError(f"{unit.name} is called from within {self._inside} (by a hook?), whose weights it would "
                            "push out; call it before or after")  # fmt: skip
        self._inside = unit.name
        _, waited = self.prefetcher.take(self._index[unit.name])
        self._recorder.waited(unit.name, waited)
        super().enter(unit, args, kwargs)

    def leave(self, unit: ModelUnit, mark: Mark) -> None:
        self._leave(unit)
        super().leave(unit, mark)
        self.prefetcher.release(self._index[unit.name], mark)

    def drop(self, unit: ModelUnit) -> None:
        self._leave(unit)
        super().drop(unit)

    def _leave(self, unit: ModelUnit) -> None:
        if self._inside == unit.name:
            self._inside = ""

    def close(self) -> None:
        self.prefetcher.close()
        self._memory.close()


class Gathered(Feed):
    """A table that stays where it is: for each forward, a small one of just the rows that are asked for.

    The module's own forward runs (some scale their rows), on that table and on the positions of the rows in it.

    Parameters
    ----------
    device
        Where the rows go.
    sources
        The files that tables may lie in: asked, once rows were read, whether these are what the files had.
    """

    is_followed = False

    def __init__(self, device: torch.device, sources: Unchanged):
        self._device, self._sources = device, sources
        self._tables: dict[str, tuple[torch.Tensor, torch.dtype]] = {}

    def add(self, unit: ModelUnit, table: torch.Tensor, dtype: torch.dtype) -> None:
        """Gather from ``table``, ``[num_embeddings, dim]``: in host memory, or packed by rows and anywhere.

        Rows are computed with as ``dtype``.
        """
        # A padding row matters for gradients only, and its index means nothing in the small table.
        unit.module.padding_idx = None  # type: ignore[assignment]
        self._tables[unit.name] = table, dtype
        self.is_on_device = all(each.device == self._device for each, _ in self._tables.values())

    def enter(self, unit: ModelUnit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        (ids,), module = (*args, *kwargs.values()), unit.module
        table, dtype = self._tables[unit.name]
        rows = table.index_select(0, ids.reshape(-1).to(table.device))
        self._sources.check_pages()
        encoding: Any = getattr(module, "row_encoding", None)
        if encoding is None:
            rows = rows.to(self._device, dtype)
        else:
            packed, rows = rows, torch.empty(len(rows), module.embedding_dim, dtype=dtype, device=self._device)  # type: ignore[call-overload]
            encoding.unpack({"weight": packed.to(self._device)}, rows)
        module._parameters["weight"] = rows  # type: ignore[assignment]
        return (torch.arange(ids.numel(), device=self._device).view(ids.shape),), {}

    def leave(self, unit: ModelUnit, mark: Mark) -> None:
        unbind(unit.bindings)

    def close(self) -> None:
        self._tables.clear()


class Bound:
    """Puts the weights of one unit into its modules, and takes them out; what would be lost is refused.

    Parameters
    ----------
    bindings, tensors
        Where, and what; a tensor that must be cast is cast each time.
    """

    def __init__(self, bindings: Sequence[Binding], tensors: Sequence[torch.Tensor]):
        self._bindings = list(bindings)
        self._tensors = [
            tensor if binding.weight.needs_cast else parameter(tensor)
            for binding, tensor in zip(bindings, tensors, strict=True)
        ]
        self._casts = any(binding.weight.needs_cast for binding in bindings)
        self._now: list[torch.Tensor | None] = [None] * len(self._tensors)
        # Nothing but an edit counts: what streams is written past the parameters.
        self._versions = [0 if binding.weight.needs_cast else tensor._version
                          for binding, tensor in zip(bindings, self._tensors, strict=True)]  # fmt: skip

    def bind(self) -> None:
        """Put them into their modules.

        Raises
        ------
        OptionError
            If something else was put there meanwhile.
        """
        tensors = self._tensors
        if self._casts:
            tensors = [tensor.to(binding.weight.dtype) if binding.weight.needs_cast else tensor
                       for binding, tensor in zip(self._bindings, tensors, strict=True)]  # fmt: skip
        for binding, tensor, last in zip(self._bindings, tensors, self._now, strict=True):
            parameters, name = binding.module._parameters, binding.attribute
            # What an interrupted forward has left bound is ours too.
            if parameters[name] is not binding.weight.meta and parameters[name] is not last:
                raise edited(binding.weight.name)
            parameters[name] = tensor  # type: ignore[assignment]
        self._now = list(tensors)

    def unbind(self) -> None:
        """Take them out.

        Raises
        ------
        OptionError
            If one was changed in place.
        """
        changed = ""
        for index, (binding, tensor) in enumerate(zip(self._bindings, self._now, strict=True)):
            if tensor is None or (self._casts and tensor.is_inference()):  # which keep no count
                continue
            if tensor._version != self._versions[index]:
                changed = binding.weight.name
                self._versions[index] = 0 if binding.weight.needs_cast else tensor._version
        unbind(self._bindings)
        self._now = [None] * len(self._now)
        if changed:
            raise edited(changed)


def unbind(bindings: Sequence[Binding]) -> None:
    """Put back what stands for weights that are elsewhere."""
    for binding in bindings:
        binding.module._parameters[binding.attribute] = binding.weight.meta  # type: ignore[assignment]


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter in the memory of ``tensor``, with a count of changes of its own."""
    return nn.Parameter(tensor.data, requires_grad=False)


def _typed_view(memory: torch.Tensor, binding: Binding) -> torch.Tensor:
    """The weight in the memory of its unit."""
    info = binding.weight.info
    return memory[binding.offset : binding.offset + info.nbytes].view(binding.weight.stored_dtype).view(info.shape)
