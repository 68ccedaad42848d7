"""A model cut into units: what is bound, streamed and released as one.

Units follow the module tree, a whole block where it fits and its parts where not, in the order of use.
"""

from __future__ import annotations

import functools
import logging
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..encoding.linear import EncodedWeight
from ..stream.bank import Bank
from ..stream.ring import CACHE_LINE
from ..stream.unit import ALIGNMENT, Piece, Unit, merge
from ..tensors.dtypes import torch_dtype
from ..tensors.index import TensorInfo
from .absent import AbsentWeight
from .calls import calls_of, in_order_of_use, is_gatherable
from .slices import UNIT_BYTES, SlicedLinear

log = logging.getLogger(__name__)


@dataclass
class Weight:
    """One parameter or persistent buffer and every place in the module tree that it is known by.

    Attributes
    ----------
    name
        Its first native name.
    info
        Its bytes at rest.
    dtype
        What compute wants; the cast, if any, is made when it is bound.
    owners
        ``(module, attribute)`` pairs; more than one when weights are tied.
    meta
        What stands in the module while nothing is bound.
    parameter
        Refers to what stood there last while it was resident.
    """

    name: str
    info: TensorInfo
    dtype: torch.dtype
    owners: list[tuple[nn.Module, str]]
    meta: torch.Tensor
    is_buffer: bool = False
    parameter: weakref.ref[nn.Parameter] | None = None

    @functools.cached_property
    def stored_dtype(self) -> torch.dtype:
        return torch_dtype(self.info)

    @property
    def needs_cast(self) -> bool:
        return self.stored_dtype != self.dtype

    @property
    def elements(self) -> int:
        return self.info.nbytes // self.stored_dtype.itemsize

    @property
    def lead(self) -> int:
        """Where in a cache line it begins in a resident model: as in its file, which is mapped, or else in a new one.

        A matrix library may choose its kernel by that, and another kernel rounds otherwise.
        """
        if len(self.info.extents) != 1 or self.needs_cast or not self.dtype.is_floating_point:
            return 0
        lead = self.info.extents[0].offset % CACHE_LINE
        return 0 if lead % self.dtype.itemsize else lead


@dataclass(frozen=True)
class Binding:
    """A weight as one module knows it, and where it begins in its unit."""

    module: nn.Module
    attribute: str
    weight: Weight
    offset: int


@dataclass
class ModelUnit:
    """A unit with its place in the model: bound before ``module`` runs, released after it.

    ``kind`` is ``"block"``, ``"head"``, ``"embedding"``: a table whose rows are gathered, never streamed as a whole, or
    ``"experts"``: as many as ``experts``, of which those move that tokens are routed to.
    """

    module: nn.Module
    name: str
    bindings: list[Binding]
    stream: Unit
    kind: str = "block"
    experts: int = 0

    @property
    def nbytes(self) -> int:
        return self.stream.nbytes

    @property
    def cast_bytes(self) -> int:
        """Memory for the weights in the compute dtype, where that is not the stored one."""
        return sum(b.weight.elements * b.weight.dtype.itemsize for b in self.bindings if b.weight.needs_cast)

    @functools.cached_property
    def bank(self) -> Bank:
        """Its experts as bytes."""
        leads = self.bindings[0].weight.meta.device.type == "cpu"
        stacks = {each.attribute: (each.weight.info, each.weight.lead if leads else 0) for each in self.bindings}
        return Bank.of(self.name, self.experts, stacks)


def cut_units(
    model: Any, weights: Mapping[str, Weight], limit: int = UNIT_BYTES
) -> tuple[list[ModelUnit], list[Weight]]:
    """Cut the model into units of up to ``limit`` bytes along its module tree, in the order of use.

    Returns the units, and the small weights (norms, biases, whatever has fewer than two dimensions, and what a module
    with large children owns itself) that stay resident. What only images or sound need is in neither.
    """
    for weight in weights.values():
        if not weight.is_buffer:
            _stand_in(weight, model.device)
    cutter = _Cutter(model, weights, limit)
    cutter.cut(model, "")
    if cutter.optional:
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in cutter.optional.values() if name)
        log.info("left on disk, as text does not need it: %s", ", ".join(names))
    return cutter.units, list(cutter.small.values())


def _stand_in(weight: Weight, device: torch.device) -> None:
    if isinstance(weight.meta, AbsentWeight):  # of a model that is cut anew
        return
    weight.meta = AbsentWeight(weight.meta, weight.info, weight.stored_dtype, device, weight.dtype)
    for module, attribute in weight.owners:
        if isinstance(module, SlicedLinear):
            module.__dict__[attribute] = weight.meta
        else:
            module._parameters[attribute] = weight.meta  # type: ignore[assignment]


def _optional(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that only arguments beside text use; each outermost one has its name."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if module not in found:
            for child in sorted(calls_of(module).optional):
                below = module.get_submodule(child)
                found.update(dict.fromkeys(below.modules(), ""))
                found[below] = f"{name}.{child}" if name else child
    return found


def is_tied(unit: ModelUnit) -> bool:
    """Whether other modules know the unit's weights too: a table that is the output head as well."""
    return all(len(binding.weight.owners) > 1 for binding in unit.bindings)


class _Cutter:
    def __init__(self, model: Any, weights: Mapping[str, Weight], limit: int):
        self.units: list[ModelUnit] = []
        self.small: dict[str, Weight] = {}
        self._bypassed: set[nn.Module] = set()
        self.optional = _optional(model)
        self._owned: dict[nn.Module, list[tuple[str, Weight]]] = {}
        head = model.get_output_embeddings()
        self._heads, self._limit = set() if head is None else set(head.modules()), limit
        self._on_host = model.device.type == "cpu"
        for weight in weights.values():
            if not weight.is_buffer and all(module in self.optional for module, _ in weight.owners):
                continue
            if weight.is_buffer or len(weight.info.shape) < 2:
                self.small[weight.name] = weight
                continue
            for module, attribute in weight.owners:
                if isinstance(module, SlicedLinear):  # tied to a table; what it computes with is its slices'
                    continue
                self._owned.setdefault(module, []).append((attribute, weight))

    def cut(self, module: nn.Module, name: str) -> None:
        below = [
            (child, attribute, weight) for child in module.modules() for attribute, weight in self._owned.get(child, [])
        ]
        if not below:
            return
        if isinstance(module, nn.Embedding):
            if is_gatherable(module):
                self.units.append(_unit(module, name, below, "embedding", self._on_host))
            else:
                self.small.update({weight.name: weight for _, _, weight in below})
            return
        if count := experts_of(module):
            self.units.append(_bank_unit(module, name, below, count))
            return
        if self._is_whole(module, below):
            kind = "head" if module in self._heads else "block"
            self.units.append(_unit(module, name, below, kind, self._on_host))
            return
        self.small.update({weight.name: weight for _, weight in self._owned.get(module, [])})
        self._bypassed |= {module.get_submodule(path) for path in calls_of(module).bypassed}
        for child_name, child in in_order_of_use(module):
            self.cut(child, f"{name}.{child_name}" if name else child_name)

    def _is_whole(self, module: nn.Module, below: list[tuple[nn.Module, str, Weight]]) -> bool:
        """Whether the module is one unit: it fits, or cannot be cut; and hooks on its forward see it run."""
        if module in self._bypassed or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return False
        if any(isinstance(child, nn.Embedding) or experts_of(child) for child, _, _ in below):
            return False
        fits = sum(weight.info.nbytes for _, _, weight in below) <= self._limit
        is_leaf = len(self._owned.get(module, [])) == len(below)
        return fits or is_leaf or bool(calls_of(module).taken)


def _unit(
    module: nn.Module, name: str, owned: list[tuple[nn.Module, str, Weight]], kind: str, on_host: bool
) -> ModelUnit:
    """Lay the weights out in file order, each on an aligned offset, so that neighbours are read and copied as one.

    On a CPU some are moved on from there, so that all begin as :attr:`Weight.lead` says where the unit does.
    """
    pieces, bindings, cursor, seen = [], [], 0, {}
    owned = sorted(owned, key=lambda item: _where(item[2]))
    leads = on_host and kind != "embedding"
    first = owned[0][2].lead if leads else 0
    for owner, attribute, weight in owned:
        if weight.name not in seen:
            cursor += -cursor % ALIGNMENT + ((weight.lead - first) % CACHE_LINE if leads else 0)
            seen[weight.name] = cursor
            for extent in weight.info.extents:
                pieces.append(Piece(extent, cursor))
                cursor += extent.nbytes
        bindings.append(Binding(owner, attribute, weight, seen[weight.name]))
    return ModelUnit(module, name, bindings, Unit(name, cursor, merge(pieces), first), kind)


def experts_of(module: nn.Module) -> int:
    """How many experts a module has that native code computes with as stacks, each with one matrix of every stack.

    By the marks that transformers puts on such a class; 0 for other modules.
    """
    count = getattr(module, "num_experts", 0)
    if not isinstance(count, int) or not hasattr(module, "is_transposed") or not hasattr(module, "_apply_gate"):
        return 0
    stacks = [each for each in module._parameters.values() if each is not None]
    packed = [each for each in vars(module).values() if isinstance(each, EncodedWeight)]
    is_equal = all(each.shape[0] == count for each in packed)
    return count if stacks and is_equal and all(len(s) and s[0] % count == 0 for s in (p.shape for p in stacks)) else 0


def _bank_unit(module: nn.Module, name: str, owned: list[tuple[nn.Module, str, Weight]], count: int) -> ModelUnit:
    """Experts are bytes by themselves: a unit of no pieces."""
    bindings = [Binding(owner, attribute, weight, 0) for owner, attribute, weight in owned]
    nbytes = sum(weight.info.nbytes for _, _, weight in owned)
    return ModelUnit(module, name, bindings, Unit(name, nbytes, ()), "experts", count)


def _where(weight: Weight) -> tuple[str, int]:
    return str(weight.info.extents[0].path), weight.info.extents[0].offset
