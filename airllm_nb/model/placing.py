"""Puts what computes on packed bytes into a skeleton, in the place of what computes on plain weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import format_bytes
from ..encoding.linear import EncodedLinear, Scratch
from ..encoding.packing import Packed
from ..errors import CheckpointError, UnsupportedModelError
from ..tensors.dtypes import TORCH_DTYPES
from ..tensors.index import TensorInfo
from .calls import is_gatherable
from .packed import PackedLinear, PackedWeight, part_name

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
    one_by_one = skeleton._can_set_experts_implementation()
    for name, weight in packed.items():
        path, _, attribute = name.rpartition(".")
        module = skeleton.get_submodule(path)
        native = module._parameters.get(attribute)
        if native is not None and tuple(native.shape) != tuple(weight.shape):
            raise CheckpointError(f"{name} is packed as {list(weight.shape)}, the model's config asks for "
                                  f"{list(native.shape)}; config.json and weights do not belong together")  # fmt: skip
        if isinstance(module, nn.Embedding) and is_gatherable(module):
            parts |= _place_table(skeleton, name, native, weight, dtype, scratch)
        elif type(module) is nn.Linear and not hasattr(module, "reads_weight"):
            bound = {part: _on_meta(info) for part, info in weight.parts.items()}
            _replace_linears(skeleton, native, bound, weight, dtype, scratch)
            parts |= {f"{path}.{part}": info for part, info in weight.parts.items()}
        else:
            parts |= _place_view(module, path, attribute, weight, dtype, scratch, one_by_one)
    if one_by_one and any(len(weight.shape) == 3 for weight in packed.values()):
        # The others take all experts' matrices at once.
        skeleton.set_experts_implementation("eager")
    return parts


def _replace_linears(
    skeleton: Any, native: Any, bound: Mapping[str, nn.Parameter], weight: Packed, dtype: torch.dtype, scratch: Scratch
) -> None:
    """Every layer that knows the weight, tied ones too, computes on the same parts."""
    for path, other in list(skeleton.named_modules()):
        if other._parameters.get("weight") is not native or isinstance(other, nn.Embedding):
            continue
        if type(other) is not nn.Linear:
            raise UnsupportedModelError(f"{path} shares a packed weight and is a {type(other).__name__}, which cannot "
                                        "compute on packed bytes; load the unquantised checkpoint")  # fmt: skip
        layer = PackedLinear(other, weight, dtype, scratch)
        layer._parameters.update(bound)
        skeleton.set_submodule(path, layer)


def _place_table(
    skeleton: Any, name: str, native: Any, weight: Packed, dtype: torch.dtype, scratch: Scratch
) -> dict[str, TensorInfo]:
    """Rows are gathered packed. Whatever is tied to the table computes on the same bytes."""
    if set(weight.parts) != {"weight"} or weight.packing[0].row_steps != {"weight": 1} or weight.order is not None:
        raise UnsupportedModelError(f"{name} is a table packed as {weight.packing[0].name}, whose rows cannot be read "
                                    "one by one; load the unquantised checkpoint")  # fmt: skip
    table = _on_meta(weight.parts["weight"])
    _replace_linears(skeleton, native, {"weight": table}, weight, dtype, scratch)
    for module in skeleton.modules():
        if isinstance(module, nn.Embedding) and module._parameters.get("weight") is native:
            module._parameters["weight"], module.packing = table, weight.packing[0]  # type: ignore[assignment]
    return {name: weight.parts["weight"]}


def _place_view(
    module: nn.Module, path: str, attribute: str, weight: Packed, dtype: torch.dtype, scratch: Scratch, one_by_one: bool
) -> dict[str, TensorInfo]:
    names = {part: part_name(attribute, part) for part in weight.parts}

    def bound() -> dict[str, torch.Tensor]:
        return {part: module._parameters[name] for part, name in names.items()}  # type: ignore[misc]

    del module._parameters[attribute]
    module.__dict__[attribute] = view = PackedWeight(bound, weight, dtype, scratch)
    needed = view.scratch_bytes * (1 if weight.order is None else 2)  # a copy in order
    if len(weight.shape) > 2 and not one_by_one:  # this model takes all of them at once
        needed += view.unpacked_bytes
    module.scratch_bytes = max(getattr(module, "scratch_bytes", 0), needed)  # type: ignore[assignment, arg-type]
    for part, info in weight.parts.items():
        module.register_parameter(names[part], _on_meta(info))
    return {f"{path}.{names[part]}": info for part, info in weight.parts.items()}


def reserve_scratch(skeleton: nn.Module, device: torch.device) -> None:
    """Make the scratch as large as the largest matrix needs it: what it had outgrown would be free for nothing else."""
    users: list[EncodedLinear | PackedWeight] = [*_packed_in(skeleton)]
    users += [module for module in skeleton.modules() if isinstance(module, EncodedLinear)]
    for each in sorted(users, key=lambda each: each.scratch_bytes, reverse=True):
        each.scratch.reserve(each.scratch_bytes, device)


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


def computes_packed(module: nn.Module) -> bool:
    """Whether something in it computes on packed bytes, by way of the scratch that all share."""
    return bool(_packed_in(module)) or any(isinstance(each, EncodedLinear) for each in module.modules())


def _packed_in(skeleton: nn.Module) -> list[PackedWeight]:
    return [
        value for module in skeleton.modules() for value in vars(module).values() if isinstance(value, PackedWeight)
    ]


def temporary_bytes(skeleton: nn.Module, device: torch.device) -> int:
    """Memory beside the scratch while a packed matrix is unpacked, and for orders; 0 where nothing is packed."""
    weights = _packed_in(skeleton)
    orders = sum(weight.order_bytes for weight in weights)
    return orders + max((weight.temporary_bytes(device) for weight in weights), default=0)


def _on_meta(info: TensorInfo) -> nn.Parameter:
    return nn.Parameter(torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta"), requires_grad=False)
