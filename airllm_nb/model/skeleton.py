"""A native model that owns no weights: built on ``meta``, cut into units, with its buffers real on the device.

The class is transformers' own; nothing of a repository's code runs. Parameters are ``meta`` tensors until the executor
binds them; rotary tables and other buffers that no checkpoint holds are computed where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checkpoint.encoded import TORCH_DTYPES
from ..checkpoint.index import TensorInfo
from ..errors import CheckpointError
from ..stream.unit import ALIGNMENT, Piece, Unit, merge
from .gather import is_gatherable
from .slices import UNIT_BYTES, SlicedLinear, is_entangled


class _ParametersOnMeta(TorchFunctionMode):
    """``torch.empty`` without a device gives ``meta`` tensors: large parameters are made by it, buffers are not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


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
    """

    name: str
    info: TensorInfo
    dtype: torch.dtype
    owners: list[tuple[nn.Module, str]]
    meta: torch.Tensor
    is_buffer: bool = False

    @property
    def stored_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.info.dtype]

    @property
    def needs_cast(self) -> bool:
        return self.stored_dtype != self.dtype

    @property
    def elements(self) -> int:
        return self.info.nbytes // self.stored_dtype.itemsize


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

    ``kind`` is ``"block"``, ``"head"``, or ``"embedding"``: a table whose rows are gathered, never streamed as a whole.
    """

    module: nn.Module
    name: str
    bindings: list[Binding]
    stream: Unit
    kind: str = "block"

    @property
    def nbytes(self) -> int:
        return self.stream.nbytes

    @property
    def cast_bytes(self) -> int:
        """Memory for the weights in the compute dtype, where that is not the stored one."""
        return sum(b.weight.elements * b.weight.dtype.itemsize for b in self.bindings if b.weight.needs_cast)


def build(config: Any, dtype: torch.dtype, device: torch.device, attn_implementation: str | None = None) -> Any:
    """Instantiate transformers' class for ``config`` with every parameter on ``meta`` and buffers on ``device``.

    Returns a ``PreTrainedModel`` in eval mode whose ``device`` is ``device``.
    """
    from transformers import AutoModelForCausalLM

    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device(device), _ParametersOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **extra)
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved.setdefault(id(parameter), _to_meta(parameter))
                module._parameters[name] = moved[id(parameter)]
    model.__class__ = _on_device(type(model), device, dtype)
    return model.eval().requires_grad_(False)


def _to_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _on_device(native: type, device: torch.device, dtype: torch.dtype) -> type:
    """The native class, but ``device`` and ``dtype`` are said and not read from a first parameter that is on meta."""
    members = {"device": property(lambda self: device), "dtype": property(lambda self: dtype),
               "__module__": native.__module__, "__doc__": native.__doc__}  # fmt: skip
    return type(native.__name__, (native,), members)


def collect_weights(model: Any, tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, Weight]:
    """Pair every parameter and persistent buffer of ``model`` with its bytes; tied ones become one weight.

    Raises
    ------
    CheckpointError
        If the checkpoint lacks a weight or has it in another shape.
    """
    weights: dict[int, Weight] = {}
    missing: dict[int, str] = {}
    owned: dict[int, list[tuple[nn.Module, str]]] = {}
    high = kept_in_float32(model, dtype)
    for name, module, attribute, tensor, is_buffer in _state(model):
        owned.setdefault(id(tensor), []).append((module, attribute))
        if id(tensor) in weights:
            continue
        info = tensors.get(name)
        if info is None:
            missing[id(tensor)] = name
            continue
        if tuple(info.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{info.extents[0].path}: {name} has shape {list(info.shape)}, the model's config "
                f"asks for {list(tensor.shape)}; config.json and weights do not belong together"
            )
        wanted = tensor.dtype if not tensor.dtype.is_floating_point else torch.float32 if high(name) else tensor.dtype
        weights[id(tensor)] = Weight(name, info, wanted, owned[id(tensor)], tensor, is_buffer)
    lacking = [name for key, name in missing.items() if key not in weights and not _may_miss(model, name)]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise CheckpointError(f"the checkpoint lacks {', '.join(lacking[:3])}{more}; a shard may be missing, or "
                              f"config.json is of another model ({type(model).__name__})")  # fmt: skip
    return {weight.name: weight for weight in weights.values()}


def _state(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor, bool]]:
    for prefix, module in model.named_modules():
        dot = prefix + "." if prefix else ""
        for attribute, tensor in module._parameters.items():
            if tensor is not None:
                yield dot + attribute, module, attribute, tensor, False
        for attribute, tensor in module._buffers.items():
            if tensor is not None and attribute not in module._non_persistent_buffers_set:
                yield dot + attribute, module, attribute, tensor, True
        if isinstance(module, SlicedLinear) and module.is_tied:
            yield dot + "weight", module, "weight", module.weight, False


def kept_in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """transformers' own rule for weights that must not be rounded (``_keep_in_fp32_modules``)."""
    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or []) if dtype != torch.float32 else []
    if dtype == torch.float16:
        patterns += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    return lambda name: any(pattern in name.split(".") for pattern in patterns)


def _may_miss(model: Any, name: str) -> bool:
    import re

    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    return any(re.search(pattern, name) for pattern in patterns)


def cut_units(
    model: Any, weights: Mapping[str, Weight], limit: int = UNIT_BYTES
) -> tuple[list[ModelUnit], list[Weight]]:
    """Cut the model into units of up to ``limit`` bytes along its module tree, in the order of definition.

    Returns the units, and the small weights (norms, biases, whatever has fewer than two dimensions, and what a module
    with large children owns itself) that stay resident.
    """
    cutter = _Cutter(model, weights, limit)
    cutter.cut(model, "")
    return cutter.units, list(cutter.small.values())


def is_tied(unit: ModelUnit) -> bool:
    """Whether other modules know the unit's weights too: a table that is the output head as well."""
    return all(len(binding.weight.owners) > 1 for binding in unit.bindings)


class _Cutter:
    def __init__(self, model: Any, weights: Mapping[str, Weight], limit: int):
        self.units: list[ModelUnit] = []
        self.small: dict[str, Weight] = {}
        self._owned: dict[nn.Module, list[tuple[str, Weight]]] = {}
        head = model.get_output_embeddings()
        self._heads, self._limit = set() if head is None else set(head.modules()), limit
        for weight in weights.values():
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
                self.units.append(_unit(module, name, below, "embedding"))
            else:
                self.small.update({weight.name: weight for _, _, weight in below})
            return
        mine = self._owned.get(module, [])
        is_leaf = len(mine) == len(below)
        has_table = any(isinstance(child, nn.Embedding) for child, _, _ in below)
        fits = not has_table and sum(weight.info.nbytes for _, _, weight in below) <= self._limit
        whole = fits or is_leaf or is_entangled(module)
        if whole and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            self.units.append(_unit(module, name, below, "head" if module in self._heads else "block"))
            return
        self.small.update({weight.name: weight for _, weight in mine})
        for child_name, child in module.named_children():
            self.cut(child, f"{name}.{child_name}" if name else child_name)


def _unit(module: nn.Module, name: str, owned: list[tuple[nn.Module, str, Weight]], kind: str) -> ModelUnit:
    """Lay the weights out in file order, each on an aligned offset, so that neighbours are read and copied as one."""
    pieces, bindings, cursor, seen = [], [], 0, {}
    for owner, attribute, weight in sorted(owned, key=lambda item: _where(item[2])):
        if weight.name not in seen:
            cursor = -(-cursor // ALIGNMENT) * ALIGNMENT
            seen[weight.name] = cursor
            for extent in weight.info.extents:
                pieces.append(Piece(extent, cursor))
                cursor += extent.nbytes
        bindings.append(Binding(owner, attribute, weight, seen[weight.name]))
    return ModelUnit(module, name, bindings, Unit(name, cursor, merge(pieces)), kind)


def _where(weight: Weight) -> tuple[str, int]:
    return str(weight.info.extents[0].path), weight.info.extents[0].offset
