"""What a recorded step was made of: it is replayed as long as the model is still that.

A graph runs no Python: a weight that is another tensor now, a hook that was put on, a switch of an adapter would be
passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as globally
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_PACKAGE = __name__.partition(".")[0]
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
# Hooks that torch calls for every module.
_EVERYWHERE = ("_global_forward_hooks", "_global_forward_pre_hooks")
_HELD = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class MadeOf:
    """The state of ``model`` when it is made. What is compared by identity is kept: nothing else takes its place."""

    def __init__(self, model: nn.Module):
        self._model, modules = model, list(model.modules())
        self._tensors = [each for module in modules for held in (module._parameters, module._buffers)
                         for each in held.values() if each is not None and not each.is_meta]  # fmt: skip
        self._addresses, self._modules = [each.data_ptr() for each in self._tensors], modules
        held = [vars(module)[name] for module in modules for name in _HELD]
        self._empty, self._full = [each for each in held if not each], [each for each in held if each]
        # Their memory too, which a tensor may be given another of.
        self._kept = [[each.detach() for each in self._tensors], [list(each.values()) for each in self._full]]
        self._content, self._training = list(map(_content, self._full)), [module.training for module in modules]
        self._rest = list(_rest(model))

    def still(self) -> bool:
        """Whether all weights, hooks and parts are the same; less than a microsecond a part, asked at every step."""
        return not (
            any(self._empty)
            or list(map(_content, self._full)) != self._content
            or [each.data_ptr() for each in self._tensors] != self._addresses
            or [module.training for module in self._modules] != self._training
            or is_watched()
        )

    def still_all(self) -> bool:
        """Whether everything else that a part of it has is the same, too: milliseconds, asked once a generation."""
        return self.still() and self._rest == list(_rest(self._model))


def _content(held: dict[Any, Any]) -> tuple[int, ...]:
    return tuple(map(id, held.values()))


def has_foreign_hooks(model: nn.Module) -> bool:
    """Whether somebody else's hooks must be called in its forward."""
    hooks = (
        hook for part in model.modules() if part is not model  # its own are called around whatever replaces its forward
        for held in (part._forward_hooks, part._forward_pre_hooks) for hook in held.values()
    )  # fmt: skip
    return any(not str(getattr(hook, "__module__", "")).startswith(f"{_PACKAGE}.") for hook in hooks)


def is_watched() -> bool:
    """Whether somebody looks at every operation, or changes what it computes in."""
    return (
        any(getattr(globally, name, None) for name in _EVERYWHERE)
        or torch._C._len_torch_dispatch_stack() > 0
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        or torch.is_autocast_enabled("cuda")
        or torch.is_autocast_enabled("cpu")
    )


def _rest(model: nn.Module) -> Iterator[Any]:
    """Switches and numbers that Python code reads while it runs; of the model itself, its config's."""
    for part in model.modules():
        if part is not model:
            yield _frozen(vars(part), 2)
    yield _frozen(vars(getattr(model, "config", model)), 2)


def _frozen(value: Any, depth: int) -> Any:
    """Plain values as they are, of what holds others some levels, of the rest which object it is."""
    if isinstance(value, _PLAIN):
        return value
    if depth and isinstance(value, dict):
        return [(key, _frozen(each, depth - 1)) for key, each in value.items()]
    if depth and isinstance(value, (list, tuple, set)):
        return [_frozen(each, depth - 1) for each in value]
    return _Itself(value)


class _Itself:
    """Equal to what is the same object."""

    __slots__ = ("_value",)

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]
