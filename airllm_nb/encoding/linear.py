"""Encoded weights in a module tree: a linear layer in any encoding, and what stands for a weight that others read.

Both unpack one matrix at a time, into a scratch that a whole model shares.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from ..tensors.dtypes import TORCH_DTYPES
from .base import Encoded, Encoding
from .kernels import launch
from .scratch import Scratch

Timer = Callable[[], AbstractContextManager[Any]]


class EncodedLinear(nn.Module):
    """A linear layer on encoded bytes: ``[..., in_features]`` → ``[..., out_features]``, in the dtype of the input.

    Its parameters are the parts of the weight (and ``bias``), on ``meta`` until they are bound.

    Parameters
    ----------
    encoded
        How the weight ``[out_features, in_features]`` lies.
    scratch
        What it dequantises into; shared by a whole model.

    Attributes
    ----------
    weight
        What stands for the weight where native code looks at it, if only at its dtype.
    timer
        When set, dequantisation runs inside ``timer()``.
    """

    timer: Timer | None

    def __init__(self, encoded: Encoded, has_bias: bool, compute_dtype: torch.dtype, scratch: Scratch):
        super().__init__()
        self.out_features, self.in_features = encoded.shape
        self.compute_dtype, self.timer = compute_dtype, None
        self.encoded, self.scratch = encoded, scratch
        self._parameters.update(meta_parts(encoded))
        bias = torch.empty(self.out_features, dtype=compute_dtype, device="meta") if has_bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        # In one piece, its rows in order: what may be multiplied as it lies.
        self._direct = encoded.encoding() if encoded.pieces is None and encoded.order is None else None
        self._view = EncodedWeight(self, {part: part for part in encoded.parts}, encoded, compute_dtype, scratch)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "_view" in self.__dict__:
            return self._view
        return super().__getattr__(name)

    @property
    def keeps(self) -> bool:
        """Whether the matrix is kept once it was unpacked, in memory of its own."""
        return self._view.keeps

    @property
    def scratch_bytes(self) -> int:
        """What it takes of the scratch."""
        return self._view.scratch_bytes

    def cut(self, rows: int) -> EncodedLinear:
        """A layer of this kind with ``rows`` outputs, some of this one's."""
        return EncodedLinear(self.encoded.cut(rows), self.bias is not None, self.compute_dtype, self.scratch)

    def sample(self, device: torch.device) -> EncodedLinear:
        """A layer like this one whose parts are zeros on ``device``, to measure with."""
        made = EncodedLinear(self.encoded, False, self.compute_dtype, self.scratch)
        for name in self.encoded.parts:
            part = torch.zeros_like(made._parameters[name], device=device)
            made._parameters[name] = nn.Parameter(part, requires_grad=False)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return self._compute(x.to(self.compute_dtype), bias).to(x.dtype)

    def _compute(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._view.keeps:
            return functional.linear(x, self._view.whole(), bias)
        if self._direct is not None:
            product = self._direct.multiply(x, self._view.parts, (self.out_features, self.in_features), bias)
            if product is not None:
                return product
        order = self._view.order
        with self.timer() if self.timer is not None else contextlib.nullcontext():
            weight = self._view.as_it_lies(0)
        if order is None:
            return functional.linear(x, weight, bias)
        product = functional.linear(x, weight).index_select(-1, order)
        return product if bias is None else product.add_(bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, encoding={self.encoded.encoding().name}"


class EncodedWeight:
    """What stands in a module for a packed weight that its own code reads: unpacked when it is used.

    An index into a stack of matrices unpacks that one alone, into the scratch: it lasts until the next is unpacked.

    Attributes
    ----------
    bound
        Where only some matrices of the stack are bound: place among them → number in the stack.
    """

    bound: Mapping[int, int] | None = None

    def __init__(
        self, module: nn.Module, names: Mapping[str, str], encoded: Encoded, dtype: torch.dtype, scratch: Scratch
    ):
        self._module, self._names, self._encoded, self.scratch = module, names, encoded, scratch
        self.dtype, self.shape, self.ndim = dtype, torch.Size(encoded.shape), len(encoded.shape)
        self.requires_grad, self.keeps = False, False
        self._kept: torch.Tensor | None = None
        self._order: torch.Tensor | None = None

    @property
    def names(self) -> Mapping[str, str]:
        """Part → the module's name of it."""
        return self._names

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """Of the pieces that one matrix consists of, if all matrices lie alike."""
        return tuple(map(self._encoded.encoding, range(self._encoded.pieces or 1)))

    def multiplies(self, transposed: bool) -> bool:
        """Whether a kernel may multiply vectors with single matrices of it, ``x @ matrix`` if ``transposed``."""
        encodings, pieces = self._encoded.encodings, self._encoded.pieces or 1
        is_periodic = len(encodings) == 1 or encodings[pieces:] == encodings[:-pieces]
        return (
            is_periodic and self._encoded.order is None and self.ndim == 3
            and "group_index" not in self._encoded.parts
            and all(launch.multiplies(each, transposed) for each in self.encodings)
        )  # fmt: skip

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """What is packed, as it is bound now."""
        return {part: self._module._parameters[name] for part, name in self._names.items()}  # type: ignore[misc]

    def as_it_lies(self, number: int) -> torch.Tensor:
        """One of the matrices ``[rows, columns]``, in the scratch, its rows as they lie."""
        encoded, (rows, columns), parts = self._encoded, self.shape[-2:], self.parts
        transposed = encoded.encoding().transposed
        shape = (columns, rows) if transposed else (rows, columns)
        room = self.scratch.view(shape, self.dtype, parts["weight"].device)
        if encoded.pieces is None:
            encoded.encoding().unpack(parts, room)
            return room.t() if transposed else room
        original = number if self.bound is None else self.bound.get(number, 0)
        for piece, below in enumerate(room.chunk(encoded.pieces, dim=1 if transposed else 0)):
            at, encoding = number * encoded.pieces + piece, encoded.encoding(original * encoded.pieces + piece)
            encoding.unpack({name: part[at] for name, part in parts.items()}, below)
        return room.t() if transposed else room

    def matrix(self, number: int) -> torch.Tensor:
        """One of the matrices, in the scratch."""
        if self.keeps:
            return self.whole().view(-1, *self.shape[-2:])[number]
        return self._in_order(number)

    def _in_order(self, number: int) -> torch.Tensor:
        matrix = self.as_it_lies(number)
        return matrix if self.order is None else matrix.index_select(0, self.order)

    @property
    def order(self) -> torch.Tensor | None:
        """Where rows lie in another order, that order; it stays on the device."""
        if self._encoded.order is None:
            return None
        if self._order is None or self._order.device != self.device:
            with torch.inference_mode(False):  # else no gradient could pass it
                self._order = torch.tensor(self._encoded.order, device=self.device)
        return self._order

    def whole(self) -> torch.Tensor:
        """All of it, in memory of its own."""
        if self._kept is not None:
            return self._kept
        count = math.prod(self.shape[:-2])
        whole = torch.empty(count, *self.shape[-2:], dtype=self.dtype, device=self.device)
        for number in range(count):
            whole[number] = self._in_order(number)
        whole = whole.view(self.shape)
        if self.keeps:
            self._kept = whole
        return whole

    def drop(self) -> None:
        """Free what is kept."""
        self._kept = self._order = None

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
        return 8 * len(self._encoded.order or ())

    def temporary_bytes(self, device: torch.device) -> int:
        """Memory beside the scratch while a matrix is unpacked."""
        values = math.prod(self.shape[-2:])
        return max(encoding.temporary_bytes(values, device) for encoding in set(self._encoded.encodings))

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
        return self.parts["weight"].device

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


def meta_parts(encoded: Encoded) -> dict[str, nn.Parameter]:
    """What stands for the parts of a weight until they are bound."""
    empty = {
        attribute: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
        for attribute, info in encoded.parts.items()
    }
    return {attribute: nn.Parameter(part, requires_grad=False) for attribute, part in empty.items()}
