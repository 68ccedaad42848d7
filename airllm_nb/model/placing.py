"""Puts what computes on encoded bytes into a skeleton, in the place of what computes on plain weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import nn

from ..config import format_bytes
from ..encoding.base import PART, Encoded, Encoding, encoded
from ..encoding.linear import EncodedLinear, EncodedWeight, meta_parts
from ..encoding.scratch import Scratch
from ..errors import CheckpointError, UnsupportedModelError
from ..tensors.index import TensorInfo
from .calls import is_gatherable

log = logging.getLogger(__name__)


def place(skeleton: Any, packed: Mapping[str, Encoded], dtype: torch.dtype, scratch: Scratch) -> dict[str, TensorInfo]:
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
    has_choice = False
    for name, weight in packed.items():
        path, _, attribute = name.rpartition(".")
        module = skeleton.get_submodule(path)
        native = module._parameters.get(attribute)
        if native is not None and tuple(native.shape) != tuple(weight.shape):
            raise CheckpointError(f"{name} is packed as {list(weight.shape)}, the model's config asks for "
                                  f"{list(native.shape)}; config.json and weights do not belong together")  # fmt: skip
        bound, names = meta_parts(weight), {part: part for part in weight.parts}
        if isinstance(module, nn.Embedding) and is_gatherable(module):
            _place_table(skeleton, name, native, weight, bound["weight"])
            _replace_linears(skeleton, native, weight, bound, dtype, scratch)
        elif type(module) is nn.Linear and not hasattr(module, "reads_weight"):
            _replace_linears(skeleton, native, weight, bound, dtype, scratch)
        else:
            names = {part: f"{attribute}{PART}{part}" for part in weight.parts}
            del module._parameters[attribute]
            module._parameters.update({names[part]: parameter for part, parameter in bound.items()})
            view = EncodedWeight(module, names, weight, dtype, scratch)
            # By transformers' interface for experts; code of others' may take all matrices at once.
            one_by_one = hasattr(module, "is_transposed")
            has_choice |= one_by_one
            _place_view(module, attribute, view, takes_all=len(weight.shape) > 2 and not one_by_one)
        parts |= {f"{path}.{names[part]}": info for part, info in weight.parts.items()}
    if has_choice:  # the other implementations take all matrices at once
        skeleton.set_experts_implementation("eager")
    return parts


def _place_table(skeleton: Any, name: str, native: Any, weight: Encoded, table: nn.Parameter) -> None:
    """Rows are gathered packed. Whatever is tied to the table computes on the same bytes."""
    encoding = weight.encoding()
    if weight.row_steps() != {"weight": 1} or set(weight.parts) != {"weight"}:
        raise UnsupportedModelError(f"{name} is a table packed as {encoding.name}, whose rows cannot be read one by "
                                    "one; load the unquantised checkpoint")  # fmt: skip
    for module in skeleton.modules():
        if isinstance(module, nn.Embedding) and module._parameters.get("weight") is native:
            module._parameters["weight"], module.row_encoding = table, encoding  # type: ignore[assignment]


def _replace_linears(
    skeleton: Any, native: Any, weight: Encoded, bound: Mapping[str, nn.Parameter], dtype: torch.dtype, scratch: Scratch
) -> None:
    """Every layer that knows the weight, tied ones too, computes on the same parts."""
    for path, other in list(skeleton.named_modules()):
        if other._parameters.get("weight") is not native or isinstance(other, nn.Embedding):
            continue
        if type(other) is not nn.Linear:
            raise UnsupportedModelError(f"{path} shares a packed weight and is a {type(other).__name__}, which cannot "
                                        "compute on packed bytes; load the unquantised checkpoint")  # fmt: skip
        layer = EncodedLinear(weight, other.bias is not None, dtype, scratch)
        layer._parameters.update(bound)
        skeleton.set_submodule(path, layer)


def _place_view(module: nn.Module, attribute: str, view: EncodedWeight, takes_all: bool) -> None:
    """The module's own code reads the weight, all of its matrices at once if it ``takes_all``."""
    module.__dict__[attribute] = view
    needed = view.scratch_bytes * (2 if view.order_bytes else 1)  # a copy in order
    needed += view.unpacked_bytes if takes_all else 0
    module.scratch_bytes = max(getattr(module, "scratch_bytes", 0), needed)  # type: ignore[assignment, arg-type]


def compress(
    skeleton: Any, encoding: Encoding, dtype: torch.dtype, scratch: Scratch, stored: Container[str] = ()
) -> None:
    """Put what computes on what we write in the place of what is :func:`compressible`, and of merged experts.

    Parameters
    ----------
    stored
        What a store holds: experts whose parameter is among it were not compressed when it was written.
    """
    if encoding.compression == "none":
        return
    experts = [name for name in merged_experts(skeleton) if name not in stored]
    for name in compressible(skeleton):
        linear = skeleton.get_submodule(name)
        weight = encoded(encoding, (linear.out_features, linear.in_features))
        skeleton.set_submodule(name, EncodedLinear(weight, linear.bias is not None, dtype, scratch))
    place(skeleton, {n: encoded(encoding, tuple(skeleton.get_parameter(n).shape)) for n in experts}, dtype, scratch)


def compressible(model: nn.Module) -> list[str]:
    """The names of the modules that compression replaces, by the rule of transformers' own bitsandbytes loading.

    These are the ``nn.Linear`` modules except the output head, tied ones and ``_keep_in_fp32_modules``. GPT-2's
    ``Conv1D`` stays as it is: its weights lie transposed in the checkpoint. So does a layer whose matrix is read
    without a call (``reads_weight``, which :mod:`~airllm_nb.model.calls` finds): an encoded one has none to read.
    """
    converts = _converts(model)
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and converts(name) and not hasattr(module, "reads_weight")
    ]


def merged_experts(model: nn.Module) -> list[str]:
    """The names of the parameters ``[experts, rows, columns]`` that compression encodes, each matrix by itself.

    By the same rule as of layers; transformers' own bitsandbytes loading leaves them as they are.
    """
    converts = _converts(model)
    return [
        f"{path}.{attribute}"
        for path, module in model.named_modules()
        for attribute, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and _counts_experts(module, len(parameter))
        and converts(f"{path}.{attribute}")
    ]  # fmt: skip


def _counts_experts(module: nn.Module, number: int) -> bool:
    """Whether the module says that it has so many experts."""
    return any("expert" in name and type(value) is int and value == number for name, value in vars(module).items())


def _converts(model: nn.Module) -> Callable[[str], bool]:
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or [])]
    return lambda name: should_convert_module(name, kept)


def reserve_scratch(skeleton: nn.Module, device: torch.device) -> None:
    """Make the scratch as large as the largest matrix needs it: what it had outgrown would be free for nothing else."""
    for weight in sorted(_encoded_in(skeleton), key=lambda weight: weight.scratch_bytes, reverse=True):
        weight.scratch.reserve(weight.scratch_bytes, device)


def keep_unpacked(skeleton: nn.Module, room: int) -> int:
    """Keep matrices once they are unpacked, if there is ``room`` for all; returns their bytes, 0 if there is not."""
    weights = _encoded_in(skeleton)
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
    for weight in _encoded_in(skeleton):
        weight.drop()


def computes_packed(module: nn.Module) -> bool:
    """Whether something in it computes on packed bytes, by way of the scratch that all share."""
    return bool(_encoded_in(module))


def _encoded_in(skeleton: nn.Module) -> list[EncodedWeight]:
    return [
        value for module in skeleton.modules() for value in vars(module).values() if isinstance(value, EncodedWeight)
    ]


def temporary_bytes(skeleton: nn.Module, device: torch.device) -> int:
    """Memory beside the scratch while a packed matrix is unpacked, and for orders; 0 where nothing is packed."""
    weights = _encoded_in(skeleton)
    orders = sum(weight.order_bytes for weight in weights)
    return orders + max((weight.temporary_bytes(device) for weight in weights), default=0)
