"""Packed weights in a model: modules that hold the packed bytes and compute on them, one matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from ..encoding.linear import EncodedLinear, Part, Scratch
from ..encoding.packing import Packed
from ..tensors.index import TensorInfo


class PackedLinear(EncodedLinear):
    """A linear layer whose weight is packed: ``[..., in_features]`` → ``[..., out_features]``.

    Attributes
    ----------
    keeps
        Whether the matrix is kept once it was unpacked, in memory of its own.
    """

    def __init__(self, linear: nn.Linear, packed: Packed, compute_dtype: torch.dtype, scratch: Scratch):
        super().__init__(linear, _parts(packed), compute_dtype, scratch)
        self.packed = packed
        self._view = PackedWeight(self._bound, packed, compute_dtype, scratch)

    def __getattr__(self, name: str) -> Any:
        # Native code looks at the weight of others, if only at its dtype: it is what is stored for nobody else.
        if name == "weight" and "_view" in self.__dict__:
            return self._view
        return super().__getattr__(name)

    def _compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.keeps:
            return functional.linear(x, self._view.whole(), bias)
        order = self._view.order
        if self.packed.pieces is None and order is None:
            shape = (self.out_features, self.in_features)
            product = self.packed.packing[0].multiply(x, self._bound(), shape, bias)
            if product is not None:
                return product
        if order is None:
            return super()._compute(x, bias)
        product = super()._compute(x, None).index_select(-1, order)
        return product if bias is None else product.add_(bias)

    @property
    def keeps(self) -> bool:
        return self._view.keeps

    def _dequantise(self) -> torch.Tensor:
        return unpacked(self.packed, self._bound(), 0, self.compute_dtype, self.scratch)

    def _bound(self) -> dict[str, torch.Tensor]:
        return {attribute: self._parameters[attribute] for attribute in self.packed.parts}  # type: ignore[misc]

    def sample(self, device: torch.device) -> PackedLinear:
        """A layer like this one whose parts are zeros on ``device``, to measure with."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made = PackedLinear(linear, self.packed, self.compute_dtype, self.scratch)
        for name, part in made._parameters.items():
            if part is not None:
                made._parameters[name] = nn.Parameter(torch.zeros_like(part, device=device), requires_grad=False)
        return made

    @property
    def unpacked_bytes(self) -> int:
        return self.scratch_bytes

    @property
    def row_steps(self) -> Mapping[str, int] | None:
        is_whole = self.packed.pieces is None and self.packed.order is None
        return self.packed.packing[0].row_steps if is_whole else None

    def cut(self, linear: nn.Linear, parts: tuple[Part, ...]) -> PackedLinear:
        infos = {part.attribute: TensorInfo(part.attribute, part.dtype, part.shape, ()) for part in parts}
        rows = Packed((linear.out_features, linear.in_features), self.packed.packing, infos)
        return PackedLinear(linear, rows, self.compute_dtype, self.scratch)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed={self.packed.packing[0].name}"


class PackedWeight:
    """What stands in a module for a packed weight that its own code reads: unpacked when it is used.

    An index into a stack of matrices unpacks that one alone, into the scratch: it lasts until the next is unpacked.
    """

    def __init__(
        self, bound: Callable[[], dict[str, torch.Tensor]], packed: Packed, dtype: torch.dtype, scratch: Scratch
    ):
        self._bound, self._packed, self.scratch = bound, packed, scratch
        self.dtype, self.shape, self.ndim = dtype, torch.Size(packed.shape), len(packed.shape)
        self.requires_grad, self.keeps = False, False
        self._kept: torch.Tensor | None = None
        self._order: torch.Tensor | None = None

    def matrix(self, number: int) -> torch.Tensor:
        """One of the matrices, in the scratch."""
        if self.keeps:
            return self.whole().view(-1, *self.shape[-2:])[number]
        return self._unpacked(number)

    def _unpacked(self, number: int) -> torch.Tensor:
        matrix = unpacked(self._packed, self._bound(), number, self.dtype, self.scratch)
        return matrix if self.order is None else matrix.index_select(0, self.order)

    @property
    def order(self) -> torch.Tensor | None:
        """Where rows lie in another order, that order; it stays on the device."""
        if self._packed.order is None:
            return None
        if self._order is None or self._order.device != self.device:
            with torch.inference_mode(False):  # else no gradient could pass it
                self._order = torch.tensor(self._packed.order, device=self.device)
        return self._order

    def whole(self) -> torch.Tensor:
        """All of it, in memory of its own."""
        if self._kept is not None:
            return self._kept
        count = math.prod(self.shape[:-2])
        whole = torch.empty(count, *self.shape[-2:], dtype=self.dtype, device=self.device)
        for number in range(count):
            whole[number] = self._unpacked(number)
        whole = whole.view(self.shape)
        if self.keeps:
            self._kept = whole
        return whole

    def drop(self) -> None:
        """Free what is kept."""
        self._kept = self._order = None

    @property
    def parts(self) -> list[torch.Tensor]:
        """What is packed, as it is bound now."""
        return list(self._bound().values())

    @property
    def unpacked_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def scratch_bytes(self) -> int:
        """Of one matrix."""
        return math.prod(self.shape[-2:]) * self.dtype.itemsize

    @property
    def order_bytes(self) -> int:
        """Of :attr:`order`."""
        return 8 * len(self._packed.order or ())

    def temporary_bytes(self, device: torch.device) -> int:
        """Memory beside the scratch while a matrix is unpacked."""
        values = math.prod(self.shape[-2:])
        return max(packing.temporary_bytes(values, device) for packing in set(self._packed.packing))

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

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def T(self) -> torch.Tensor:
        return (self.matrix(0) if self.ndim == 2 else self.whole()).T

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return self._bound()["weight"].device

    def __matmul__(self, other: Any) -> torch.Tensor:
        return torch.matmul(self, other)  # type: ignore[call-overload]

    def __rmatmul__(self, other: Any) -> torch.Tensor:
        return torch.matmul(other, self)  # type: ignore[call-overload]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = (args, kwargs or {})
        mine = [value for value in tree_leaves(values) if isinstance(value, cls)]
        # A product is done with the scratch when it returns; anything else may give a view of it.
        is_product = func in _PRODUCTS and len(mine) == 1 and mine[0].ndim == 2
        real = mine[0].matrix(0) if is_product else None
        args, kwargs = tree_map(lambda v: (v.whole() if real is None else real) if isinstance(v, cls) else v, values)
        return func(*args, **kwargs)


_PRODUCTS = {functional.linear, torch.matmul, torch.mm, torch.addmm, torch.Tensor.matmul, torch.Tensor.mm}


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


def part_name(attribute: str, part: str) -> str:
    """The parameter that holds a part of a packed weight which the module's own code reads."""
    return f"{attribute}__{part}"


def _parts(packed: Packed) -> tuple[Part, ...]:
    return tuple(Part(attribute, info.dtype, tuple(info.shape)) for attribute, info in packed.parts.items())
