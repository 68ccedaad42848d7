"""A native model that owns no weights: built on ``meta``, with its buffers real on the device.

The class is transformers' own; nothing of a repository's code runs. Parameters are ``meta`` tensors until the executor
binds them; rotary tables and other buffers that no checkpoint holds are computed where they are used.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checkpoint.sizes import AskHolds, limited
from ..encoding.linear import EncodedLinear
from ..errors import CheckpointError
from ..tensors.dtypes import torch_dtype
from ..tensors.index import TensorInfo
from .attention import told_of_attention
from .slices import SlicedLinear
from .units import UNIT_BYTES, Binding, ModelUnit, Weight, cut_units, is_tied

__all__ = [
    "UNIT_BYTES", "Binding", "ModelUnit", "Weight", "build", "collect_weights", "cut_units", "is_tied",
    "kept_in_float32", "lacking", "other_shape",
]  # fmt: skip


# While transformers makes a model, torch's default dtype is another, for all threads; two would restore each other's.
_ONE = threading.Lock()


class _ParametersOnMeta(TorchFunctionMode):
    """``torch.empty`` without a device gives ``meta`` tensors: large parameters are made by it, buffers are not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(
    config: Any, dtype: torch.dtype, device: torch.device, attn_implementation: str | None = None,
    holds: AskHolds = lambda: None,
) -> Any:  # fmt: skip
    """Instantiate transformers' class for ``config`` with every parameter on ``meta`` and buffers on ``device``.

    Returns a ``PreTrainedModel`` in eval mode whose ``device`` is ``device``.

    Raises
    ------
    CheckpointError
        If the config asks for far more than the weight files hold (``holds``), or gives no model.
    OptionError
        If it cannot attend by ``attn_implementation``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    # One of several parts runs on text alone too; what only the others need stays on disk.
    kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with limited(f"model of type {config.model_type}", holds):
        with _ONE, torch.device(device), _ParametersOnMeta(), told_of_attention(config, attn_implementation):
            model = kind.from_config(config, dtype=dtype, **extra)
        _compute_buffers(model)
    moved: dict[int, nn.Parameter] = {}
    high = kept_in_float32(model, dtype)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # Code may ask a weight for its dtype before it is bound.
                exact = parameter.is_floating_point() and high(f"{path}.{name}")
                kept = torch.float32 if exact else parameter.dtype
                moved.setdefault(id(parameter), _to_meta(parameter, kept))
                module._parameters[name] = moved[id(parameter)]
    model._placed_on = device, dtype
    model.__class__ = placed_class(type(model))  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def _compute_buffers(model: Any) -> None:
    """Once more, and as ``from_pretrained`` has it: what no checkpoint holds is not as coarse as the weights are."""
    from transformers import PreTrainedModel

    owners: dict[nn.Module, Any] = {}
    for owner in model.modules():  # the outer ones first
        if isinstance(owner, PreTrainedModel):
            owners |= dict.fromkeys(owner.modules(), owner)
    with torch.no_grad():
        for module, owner in owners.items():
            if module._non_persistent_buffers_set:
                owner._init_weights(module)


def _to_meta(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta", dtype), requires_grad=False)


@functools.cache
def placed_class(native: type) -> type:
    """``native``, but ``device`` and ``dtype`` are said and not read from a first parameter that is on meta."""
    members = {"device": property(lambda self: self._placed_on[0]), "dtype": property(lambda self: self._placed_on[1]),
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
    owned: dict[int, list[tuple[nn.Module, str]]] = {}
    high = kept_in_float32(model, dtype)
    for name, module, attribute, tensor, is_buffer in _state(model):
        owned.setdefault(id(tensor), []).append((module, attribute))
        if id(tensor) in weights:
            continue
        info = tensors.get(name)
        if info is None:
            continue
        if tuple(info.shape) != tuple(tensor.shape):
            raise other_shape(name, info, tensor)
        if tensor.dtype.is_floating_point and not torch_dtype(info).is_floating_point:
            raise CheckpointError(f"{info.extents[0].path}: {name} is stored as {info.dtype}, which is no weight: what "
                                  "says how it is packed is missing; download the checkpoint again")  # fmt: skip
        rounds = tensor.dtype.is_floating_point and not isinstance(module, EncodedLinear)
        wanted = torch.float32 if rounds and high(name) else tensor.dtype
        weights[id(tensor)] = Weight(name, info, wanted, owned[id(tensor)], tensor, is_buffer)
    if missing := lacking(model, tensors):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing[:3])}{more}; a shard may be missing, or "
                              f"config.json is of another model ({type(model).__name__})")  # fmt: skip
    return {weight.name: weight for weight in weights.values()}


def other_shape(name: str, info: TensorInfo, tensor: torch.Tensor) -> CheckpointError:
    """What to say of a weight that has another shape than the model's."""
    return CheckpointError(f"{info.extents[0].path}: {name} has shape {list(info.shape)}, the model's config asks for "
                           f"{list(tensor.shape)}; config.json and weights do not belong together")  # fmt: skip


def lacking(model: Any, names: Container[str]) -> list[str]:
    """What ``model`` cannot do without and is not among ``names``; of tied weights one is enough."""
    found: set[int] = set()
    missing: dict[int, str] = {}
    for name, _, _, tensor, _ in _state(model):
        if name in names:
            found.add(id(tensor))
        elif not _may_miss(model, name):
            missing[id(tensor)] = name
    return [name for key, name in missing.items() if key not in found]


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
            yield dot + "weight", module, "weight" if module.tied is module.weight else "tied", module.tied, False


def kept_in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """transformers' own rule for weights that must not be rounded (``_keep_in_fp32_modules``)."""
    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or []) if dtype != torch.float32 else []
    if dtype == torch.float16:
        patterns += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    found = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in found)


def _may_miss(model: Any, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    return any(re.search(pattern, name) for pattern in patterns)
