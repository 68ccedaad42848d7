"""A unit's weights in its modules: put in before its forward, taken out after it; what would be lost is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .absent import edited
from .units import Binding


class Bound:
    """Binds the weights of one unit, and unbinds them.

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
        self._now: list[torch.Tensor | None] = [None] * len(self._tensors)
        self._versions = [0] * len(self._tensors)

    def bind(self) -> None:
        """Put them into their modules.

        Raises
        ------
        OptionError
            If something else was put there meanwhile.
        """
        for index, (binding, tensor) in enumerate(zip(self._bindings, self._tensors, strict=True)):
            before = binding.module._parameters[binding.attribute]
            # What an interrupted forward has left bound is ours too.
            if before is not binding.weight.meta and before is not self._now[index]:
                raise edited(binding.weight.name)
            if binding.weight.needs_cast:
                tensor = tensor.to(binding.weight.dtype)
            self._now[index], self._versions[index] = tensor, _version(tensor)
            binding.module._parameters[binding.attribute] = tensor  # type: ignore[assignment]

    def unbind(self) -> None:
        """Take them out.

        Raises
        ------
        OptionError
            If one was changed in place.
        """
        name = next(
            (binding.weight.name
             for binding, tensor, version in zip(self._bindings, self._now, self._versions, strict=True)
             if tensor is not None and _version(tensor) != version), "",
        )  # fmt: skip
        unbind(self._bindings)
        self._now = [None] * len(self._now)
        if name:
            raise edited(name)


def unbind(bindings: Sequence[Binding]) -> None:
    """Put back what stands for weights that are elsewhere."""
    for binding in bindings:
        binding.module._parameters[binding.attribute] = binding.weight.meta  # type: ignore[assignment]


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter in the memory of ``tensor``, with a count of changes of its own."""
    return nn.Parameter(tensor.data, requires_grad=False)


def typed_view(memory: torch.Tensor, binding: Binding) -> torch.Tensor:
    """The weight in the memory of its unit."""
    info = binding.weight.info
    return memory[binding.offset : binding.offset + info.nbytes].view(binding.weight.stored_dtype).view(info.shape)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
