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


def typed_view(memory: torch.Tensor, binding: Binding) -> torch.Tensor:
    """The weight in the memory of its unit."""
    info = binding.weight.info
    return memory[binding.offset : binding.offset + info.nbytes].view(binding.weight.stored_dtype).view(info.shape)
