"""Weights that stay where compute runs: ordinary parameters, one for all modules that share it."""

from __future__ import annotations

import torch
from torch import nn

from ..stream.mapped import MappedFiles
from .binding import parameter
from .skeleton import Binding, Weight


class Resident:
    """Reads weights, and keeps those that stay.

    Parameters
    ----------
    files
        Where they come from.
    device
        Where compute runs.
    """

    def __init__(self, files: MappedFiles, device: torch.device):
        self._files, self._device = files, device
        self._copies: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._owners: list[tuple[nn.Module, str, str]] = []
        self._sums: dict[str, torch.Tensor] = {}

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

    def bind(self, binding: Binding, tensor: torch.Tensor) -> None:
        """Bind ``tensor`` for good."""
        self._bind(binding.weight, binding.module, binding.attribute, tensor)

    def _bind(self, weight: Weight, module: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
        module._parameters[attribute] = self._parameters.setdefault(weight.name, parameter(tensor))
        self._owners.append((module, attribute, weight.name))

    def let_train(self) -> None:
        """Nothing streams: they are as trainable as transformers' own."""
        for each in self._parameters.values():
            each.requires_grad_(each.is_floating_point())

    def remember(self) -> None:
        """Take down what they are, for :meth:`changed`."""
        self._sums = {name: _sum(each) for name, each in self._parameters.items()}

    def changed(self) -> str:
        """A weight that is not what it was, by training or by hand; empty if there is none."""
        for module, attribute, name in self._owners:
            now = module._parameters.get(attribute)
            if now is not self._parameters[name] or not torch.equal(_sum(now), self._sums[name]):
                return name
        return ""

    def close(self) -> None:
        """Let go of all; modules that they are bound in are not touched."""
        self._copies.clear()
        self._parameters.clear()
        self._owners.clear()
        self._sums.clear()


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Of its bytes, as large whole numbers: a pass over the memory that every change shows in, and no copy."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    first = min(-raw.storage_offset() % 8, raw.numel())  # files begin their tensors anywhere
    last = first + (raw.numel() - first) // 8 * 8
    ends = raw[:first].sum(dtype=torch.int64) + raw[last:].sum(dtype=torch.int64)
    return raw[first:last].view(torch.int64).sum() + ends if last > first else ends
