"""Packed weights in a model: modules that hold the packed bytes and compute on them, one matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from ..checkpoint.codecs.packing import DEVICE_VALUES, Packed
from ..checkpoint.encoded import EncodedLinear, Part, Scratch
from ..checkpoint.index import TensorInfo


class PackedLinear(EncodedLinear):
    """A linear layer whose weight is packed: ``[..., in_features]`` → ``[..., out_features]``.

    Attributes
    ----------
    keeps
        Whether the matrix is kept once it was unpacked, in memory of its own.
    """

    def __init__(self, linear: nn.Linear, packed: Packed, compute_dtype: torch.dtype, scratch: Scratch):
        super().__init__(linear, _parts(packed), compute_dtype, scratch)
        self.packed, self.keeps = packed, False
        self._kept: torch.Tensor | None = None
        self._order = None if packed.order is None else torch.tensor(packed.order, device="cpu")

    def _compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.keeps:
            if self._kept is None:
                self._kept = _in_order(self._dequantise(), self.packed).clone()
            return functional.linear(x, self._kept, bias)
        if self.packed.pieces is None and self._order is None:
            shape = (self.out_features, self.in_features)
            product = self.packed.packing[0].multiply(x, self._bound(), shape, bias)
            if product is not None:
                return product
        if self._order is None:
            return super()._compute(x, bias)
        if self._order.device != x.device:
            self._order = self._order.to(x.device)
        product = super()._compute(x, None)[..., self._order]
        return product if bias is None else product.add_(bias)

    def drop(self) -> None:
        """Free what is kept."""
        self._kept = None

    def _dequantise(self) -> torch.Tensor:
        return unpacked(self.packed, self._bound(), 0, self.compute_dtype, self._scratch)

    def _bound(self) -> dict[str, torch.Tensor]:
        return {attribute: self._parameters[attribute] for attribute in self.packed.parts}  # type: ignore[misc]

    def sample(self, device: torch.device) -> PackedLinear:
        """A layer like this one whose parts are zeros on ``device``, to measure with."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made = PackedLinear(linear, self.packed, self.compute_dtype, self._scratch)
        for name, part in made._parameters.items():
            if part is not None:
                made._parameters[name] = nn.Parameter(torch.zeros_like(part, device=device), requires_grad=False)
        return made

    @property
    def scratch_bytes(self) -> int:
        return scratch_bytes((self.out_features, self.in_features), self.compute_dtype)

    @property
    def unpacked_bytes(self) -> int:
        return self.in_features * self.out_features * self.compute_dtype.itemsize

    @property
    def row_steps(self) -> Mapping[str, int] | None:
        is_whole = self.packed.pieces is None and self._order is None
        return self.packed.packing[0].row_steps if is_whole else None

    def cut(self, linear: nn.Linear, parts: tuple[Part, ...]) -> PackedLinear:
        infos = {part.attribute: TensorInfo(part.attribute, part.dtype, part.shape, ()) for part in parts}
        rows = Packed((linear.out_features, linear.in_features), self.packed.packing, infos)
        return PackedLinear(linear, rows, self.compute_dtype, self._scratch)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed={self.packed.packing[0].name}"


class PackedWeight:
    """What stands in a module for a packed weight that its own code reads: unpacked when it is used.

    An index into a stack of matrices unpacks that one alone, into the scratch: it lasts until the next is unpacked.
    """

    def __init__(self, module: nn.Module, attribute: str, packed: Packed, dtype: torch.dtype, scratch: Scratch):
        self._module, self._attribute, self._packed, self._scratch = module, attribute, packed, scratch
        self.dtype, self.shape, self.ndim = dtype, torch.Size(packed.shape), len(packed.shape)
        self.requires_grad, self.keeps = False, False
        self._kept: torch.Tensor | None = None

    def matrix(self, number: int) -> torch.Tensor:
        """One of the matrices, in the scratch."""
        if self.keeps:
            return self.whole().view(-1, *self.shape[-2:])[number]
        return _in_order(unpacked(self._packed, self._bound(), number, self.dtype, self._scratch), self._packed)

    def whole(self) -> torch.Tensor:
        """All of it, in memory of its own."""
        if self._kept is not None:
            return self._kept
        keeps, self.keeps = self.keeps, False
        count = math.prod(self.shape[:-2])
        whole = torch.empty(count, *self.shape[-2:], dtype=self.dtype, device=self.device)
        for number in range(count):
            whole[number] = self.matrix(number)
        self.keeps = keeps
        whole = whole.view(self.shape)
        if keeps:
            self._kept = whole
        return whole

    def drop(self) -> None:
        """Free what is kept."""
        self._kept = None

    @property
    def unpacked_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def _bound(self) -> dict[str, torch.Tensor]:
        return {a: getattr(self._module, part_name(self._attribute, a)) for a in self._packed.parts}

    def __getitem__(self, index: Any) -> torch.Tensor:
        is_number = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0)
        if self.ndim == 3 and is_number and getattr(index, "dtype", None) != torch.bool:
            return self.matrix(int(index) % self.shape[0])
        return self.whole()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return self._bound()["weight"].device

    def __matmul__(self, other: Any) -> torch.Tensor:
        return self.whole() @ other

    def __rmatmul__(self, other: Any) -> torch.Tensor:
        return other @ self.whole()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and args[1].ndim == 2 and not isinstance(args[0], cls):
            return func(args[0], args[1].matrix(0), *args[2:], **(kwargs or {}))
        args, kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*args, **kwargs)


def _real(value: Any) -> Any:
    return value.whole() if isinstance(value, PackedWeight) else value


def unpacked(
    packed: Packed, parts: Mapping[str, torch.Tensor], number: int, dtype: torch.dtype, scratch: Scratch
) -> torch.Tensor:
    """One matrix ``[rows, columns]`` of a packed weight, in the scratch, its rows as they lie."""
    rows, columns = packed.shape[-2:]
    packing, device = packed.packing[0], parts["weight"].device
    shape = (columns, rows) if packing.transposed else (rows, columns)
    room = scratch.view(shape, dtype, device)
    matrix = room.t() if packing.transposed else room
    if packed.pieces is None:
        packing.unpack(parts, room)
    else:
        size = rows // packed.pieces
        for piece in range(packed.pieces):
            at = number * packed.pieces + piece
            below = matrix[piece * size : (piece + 1) * size]
            each = packed.packing[at if len(packed.packing) > 1 else 0]
            each.unpack({name: part[at] for name, part in parts.items()}, below.t() if packing.transposed else below)
    return matrix


def _in_order(matrix: torch.Tensor, packed: Packed) -> torch.Tensor:
    return matrix if packed.order is None else matrix[list(packed.order)]


def scratch_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Memory to unpack a matrix: itself, and the integers of as many values as are unpacked at once."""
    values = math.prod(shape[-2:])
    return values * dtype.itemsize + 4 * min(values, DEVICE_VALUES)


def part_name(attribute: str, part: str) -> str:
    """The parameter that holds a part of a packed weight which the module's own code reads."""
    return f"{attribute}__{part}"


def _parts(packed: Packed) -> tuple[Part, ...]:
    return tuple(Part(attribute, info.dtype, tuple(info.shape)) for attribute, info in packed.parts.items())
