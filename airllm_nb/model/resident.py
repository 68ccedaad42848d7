"""The feed of what stays where compute runs: ordinary parameters, one for all modules that share it."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from ..stream.mapped import MappedFiles
from .feeds import Feed, parameter
from .units import ModelUnit, Weight

# Words that are looked at together: temporaries of 8 MiB.
_PART = 1 << 20


class Resident(Feed):
    """Reads weights, and keeps those that stay.

    Parameters
    ----------
    files
        Where they come from.
    device
        Where compute runs.
    """

    stays = is_on_device = True

    def __init__(self, files: MappedFiles, device: torch.device):
        self._files, self._device = files, device
        self._copies: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._owners: list[tuple[nn.Module, str, str]] = []
        self._was: dict[str, tuple[int, torch.Tensor]] = {}

    def __contains__(self, weight: Weight) -> bool:
        return weight.name in self._copies

    def stored(self, weight: Weight) -> torch.Tensor:
        """As it lies in its file, mapped."""
        return self._files.tensor(weight.info, weight.stored_dtype)

    def copy(self, weight: Weight) -> torch.Tensor:
        """A copy on the device, the same for all that ask."""
        if weight.name not in self._copies:
            copy = self._files.copy(weight.info, weight.stored_dtype, self._device, weight.dtype)
            self._copies[weight.name] = copy
        return self._copies[weight.name]

    def keep(self, weight: Weight) -> None:
        """Bind a copy everywhere the weight is known."""
        tensor = self.copy(weight)
        for module, attribute in weight.owners:
            if weight.is_buffer:
                module._buffers[attribute] = tensor
            else:
                self._bind(weight, module, attribute, tensor)

    def add(self, unit: ModelUnit, in_place: bool = False) -> None:
        """Bind the weights of ``unit`` for good: copies, or (``in_place``) as they lie in their files."""
        for each in unit.bindings:
            self._bind(each.weight, each.module, each.attribute, (self.stored if in_place else self.copy)(each.weight))

    def drop(self, unit: ModelUnit) -> None:
        """They stay after an error too."""

    def _bind(self, weight: Weight, module: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
        if weight.name not in self._parameters:
            self._parameters[weight.name] = _same(weight, tensor)
        module._parameters[attribute] = self._parameters[weight.name]
        self._owners.append((module, attribute, weight.name))

    def let_train(self) -> None:
        """Nothing streams: they are as trainable as transformers' own."""
        for each in self._parameters.values():
            each.requires_grad_(each.is_floating_point())

    def remember(self) -> None:
        """Take down what they are, for :meth:`changed`."""
        numbers = _numbers(self._device)
        self._was = {name: (each._version, _sums(each, numbers)) for name, each in self._parameters.items()}

    def changed(self) -> str:
        """A weight that is not what it was, by training or by hand; empty if there is none."""
        numbers = _numbers(self._device)
        for module, attribute, name in self._owners:
            now, (version, sums) = module._parameters.get(attribute), self._was[name]
            if now is not self._parameters[name] or now._version != version:
                return name
            if not torch.equal(_sums(now, numbers), sums):  # by way of ``data``, which no version counts
                return name
        return ""

    def close(self) -> None:
        """Let go of all; modules that they are bound in are not touched."""
        self._copies.clear()
        self._parameters.clear()
        self._owners.clear()
        self._was.clear()


def _same(weight: Weight, tensor: torch.Tensor) -> nn.Parameter:
    """A parameter; where somebody has the one of an earlier plan (an optimizer, say), that one."""
    made = weight.parameter() if weight.parameter is not None else None
    if made is None:
        made = parameter(tensor)
        weight.parameter = weakref.ref(made)
    else:
        made.data = tensor.data
    return made.requires_grad_(False)


def _numbers(device: torch.device) -> torch.Tensor:
    """The same random numbers each time, one for each word of a part."""
    chance = torch.Generator().manual_seed(0)
    return torch.randint(1, 1 << 31, (_PART,), generator=chance).to(device)


def _sums(tensor: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Of its parts, each word times a number: whatever is changed or changes places shows, and little memory is needed.

    A product of 32 and 31 bits fits 64: no single change is lost in it.
    """
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    first = min(-raw.storage_offset() % 4, raw.numel())  # files begin their tensors anywhere
    last = first + (raw.numel() - first) // 4 * 4
    words = raw[first:last].view(torch.int32).split(_PART) if last > first else ()
    return torch.stack([(part * numbers[: len(part)]).sum() for part in (raw[:first], *words, raw[last:])])
