"""Puts what computes on packed bytes into a skeleton, in the place of what computes on plain weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.codecs.packing import Packed
from ..checkpoint.encoded import TORCH_DTYPES, Scratch
from ..checkpoint.index import TensorInfo
from ..config import format_bytes
from ..errors import CheckpointError, UnsupportedModelError
from .gather import is_gatherable
from .packed import PackedLinear, PackedWeight, part_name, scratch_bytes

log = logging.getLogger(__name__)


def place(skeleton: Any, packed: Mapping[str, Packed], dtype: torch.dtype, scratch: Scratch) -> dict[str, TensorInfo]:
    """Put what computes on packed bytes in the place of what computes on plain weights.

    Parameters
    ----------
    skeleton
        A model on ``meta``; changed.
    packed
        Native parameter name → how it lies in the checkpoint.

    Returns
    -------
    dict
        The parts' bytes, by the parameter names that the skeleton has now.

    Raises
    ------
    CheckpointError
        If a weight has another shape than the model's.
    UnsupportedModelError
        If a packed table or weight is used in a way that needs it whole.
    """
    parts: dict[str, TensorInfo] = {}
    for name, weight in packed.items():
        path, _, attribute = name.rpartition(".")
        module = skeleton.get_submodule(path)
        native = module._parameters.get(attribute)
        if native is not None and tuple(native.shape) != tuple(weight.shape):
            raise CheckpointError(f"{name} is packed as {list(weight.shape)}, the model's config asks for "
                                  f"{list(native.shape)}; config.json and weights do not belong together")  # fmt: skip
        if isinstance(module, nn.Embedding) and is_gatherable(module):
            parts |= _place_table(skeleton, module, name, weight, dtype, scratch)
        elif type(module) is nn.Linear and not hasattr(module, "reads_weight"):
            parts |= _place_linear(skeleton, path, weight, dtype, scratch)
        else:
            parts |= _place_view(module, path, attribute, weight, dtype, scratch)
    if any(len(weight.shape) == 3 for weight in packed.values()) and skeleton._can_set_experts_implementation():
        # The others take all experts' matrices at once.
        skeleton.set_experts_implementation("eager")
    return parts


def _place_linear(
    skeleton: Any, path: str, weight: Packed, dtype: torch.dtype, scratch: Scratch
) -> dict[str, TensorInfo]:
    skeleton.set_submodule(path, PackedLinear(skeleton.get_submodule(path), weight, dtype, scratch))
    return {f"{path}.{attribute}": info for attribute, info in weight.parts.items()}


def _place_table(
    skeleton: Any, module: nn.Embedding, name: str, weight: Packed, dtype: torch.dtype, scratch: Scratch
) -> dict[str, TensorInfo]:
    """Rows are gathered packed. Whatever is tied to the table computes on the same bytes."""
    if set(weight.parts) != {"weight"} or weight.packing[0].row_steps != {"weight": 1} or weight.order is not None:
        raise UnsupportedModelError(f"{name} is a table packed as {weight.packing[0].name}, whose rows cannot be read "
                                    "one by one; load the unquantised checkpoint")  # fmt: skip
    native, table = module.weight, _on_meta(weight.parts["weight"])
    for path, other in list(skeleton.named_modules()):
        if other is module or other._parameters.get("weight") is not native:
            continue
        if isinstance(other, nn.Embedding):
            other._parameters["weight"], other.packing = table, weight.packing[0]  # type: ignore[assignment]
            continue
        if type(other) is not nn.Linear:
            raise UnsupportedModelError(f"{path} shares the packed table {name} and is a {type(other).__name__}, which "
                                        "cannot compute on packed bytes; load the unquantised checkpoint")  # fmt: skip
        skeleton.set_submodule(path, PackedLinear(other, weight, dtype, scratch))
        skeleton.get_submodule(path)._parameters["weight"] = table
    module._parameters["weight"], module.packing = table, weight.packing[0]  # type: ignore[assignment]
    return {name: weight.parts["weight"]}


def _place_view(
    module: nn.Module, path: str, attribute: str, weight: Packed, dtype: torch.dtype, scratch: Scratch
) -> dict[str, TensorInfo]:
    del module._parameters[attribute]
    module.__dict__[attribute] = PackedWeight(module, attribute, weight, dtype, scratch)
    needed = scratch_bytes(weight.shape, dtype)
    module.scratch_bytes = max(getattr(module, "scratch_bytes", 0), needed)  # type: ignore[assignment, arg-type]
    for part, info in weight.parts.items():
        module.register_parameter(part_name(attribute, part), _on_meta(info))
    return {f"{path}.{part_name(attribute, part)}": info for part, info in weight.parts.items()}


def keep_unpacked(skeleton: nn.Module, room: int) -> int:
    """Keep matrices once they are unpacked, if there is ``room`` for all; returns their bytes, 0 if there is not."""
    weights = _packed_in(skeleton)
    nbytes = sum(weight.unpacked_bytes for weight in weights)
    if nbytes > room:
        log.info("packed weights are unpacked for each use: kept, they would take %s", format_bytes(nbytes))
        return 0
    log.info("packed weights are unpacked once, into %s of RAM", format_bytes(nbytes))
    for weight in weights:
        weight.keeps = True
    return nbytes


def drop_unpacked(skeleton: nn.Module) -> None:
    """Free the matrices that were kept; they are unpacked again when they are used."""
    for weight in _packed_in(skeleton):
        weight.drop()


def _packed_in(skeleton: nn.Module) -> list[PackedLinear | PackedWeight]:
    linears: list[PackedLinear | PackedWeight] = [m for m in skeleton.modules() if isinstance(m, PackedLinear)]
    return linears + [v for m in skeleton.modules() for v in vars(m).values() if isinstance(v, PackedWeight)]


def _on_meta(info: TensorInfo) -> nn.Parameter:
    return nn.Parameter(torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta"), requires_grad=False)
