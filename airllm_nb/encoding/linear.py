"""Encoded weights in a module tree: what a weight becomes, and a linear layer that computes on that."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..tensors.dtypes import TORCH_DTYPES
from ..tensors.index import ITEMSIZE

Timer = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Part:
    """One of the tensors that a weight becomes; ``attribute`` is its name in the module."""

    attribute: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Scratch:
    """One buffer that matrices are dequantised into, one after the other; it grows to the largest and stays.

    One compute stream may use it: the next matrix overwrites the last.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel()

    def reserve(self, nbytes: int, device: torch.device) -> None:
        """Have room for ``nbytes``; the former content is lost."""
        if self._buffer is None or self._buffer.numel() < nbytes or self._buffer.device != device:
            self._buffer = None  # give back before taking more
            # A tensor born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def view(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The beginning of the buffer as a tensor of undefined content."""
        nbytes = math.prod(shape) * dtype.itemsize
        self.reserve(nbytes, device)
        assert self._buffer is not None
        return self._buffer[:nbytes].view(dtype).view(shape)

    def close(self) -> None:
        """Free the buffer; a later :meth:`view` makes a new one."""
        self._buffer = None


class EncodedLinear(nn.Module):
    """A linear layer on encoded bytes: ``[..., in_features]`` → ``[..., out_features]``, in the dtype of the input.

    Its parameters are the codec's parts (and ``bias``), on ``meta`` until they are bound; nothing is kept per weight.

    Attributes
    ----------
    scratch
        What it dequantises into.
    timer
        When set, dequantisation runs inside ``timer()``.
    scratch_bytes
        What it takes of the scratch.
    row_steps
        Parameter → rows of the matrix for each row of the parameter, 1 where not named; ``None`` where the matrix
        cannot be cut by rows.
    """

    timer: Timer | None

    def __init__(self, linear: nn.Linear, parts: tuple[Part, ...], compute_dtype: torch.dtype, scratch: Scratch):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype, self.timer = compute_dtype, None
        self.scratch = scratch
        for part in parts:
            empty = torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype], device="meta")
            self.register_parameter(part.attribute, nn.Parameter(empty, requires_grad=False))
        bias = None
        if linear.bias is not None:
            bias = nn.Parameter(torch.empty(self.out_features, dtype=compute_dtype, device="meta"), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def row_steps(self) -> Mapping[str, int] | None:
        return {}

    @property
    def scratch_bytes(self) -> int:
        return self.in_features * self.out_features * self.compute_dtype.itemsize

    def cut(self, linear: nn.Linear, parts: tuple[Part, ...]) -> EncodedLinear:
        """A layer of this kind for some of the rows: ``linear`` is of their number, ``parts`` are theirs."""
        return type(self)(linear, parts, self.compute_dtype, self.scratch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return self._compute(x.to(self.compute_dtype), bias).to(x.dtype)

    def _compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with self.timer() if self.timer is not None else contextlib.nullcontext():
            weight = self._dequantise()
        return functional.linear(x, weight, bias)

    def _dequantise(self) -> torch.Tensor:
        raise NotImplementedError

    def _room(self) -> torch.Tensor:
        return self.scratch.view((self.out_features, self.in_features), self.compute_dtype, self.weight.device)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
