"""A matrix too large to be one unit passes in slices of its rows.

Rows lie one after the other in the file, so a slice is a part of the matrix's extents: nothing is rewritten. What a
slice computes is a range of the output's last dimension.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..encoding.linear import EncodedLinear
from ..tensors.index import TensorInfo
from .calls import calls_of, is_gatherable

# A unit is a whole block up to this size, else its parts: fine grain keeps slots small and the pipeline full.
UNIT_BYTES = 160 << 20
# Three units are in flight: with an eighth each, most of a small budget is left for the cache and resident units.
BUDGET_SHARE = 8
# Slices begin at multiples of this many rows: whole tiles of a matrix product, and whole blocks of every codec.
ROW_STEP = 128


class SlicedLinear(nn.Module):
    """A linear layer in slices of rows, each a module of its own: ``[..., in_features]`` → ``[..., out_features]``.

    Attributes
    ----------
    slices
        ``nn.Linear`` (or encoded) layers over the same input, in the order of the rows.
    weight, bias
        What stood for the whole, on ``meta``: of its shape and dtype, tied as before, and no parameters of this module.
    tied
        The parameter that stood for the whole, as other modules may know it.
    is_tied
        Whether they do.
    """

    weight: torch.Tensor
    tied: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear | EncodedLinear, slices: Sequence[nn.Module], is_tied: bool):
        super().__init__()
        self.in_features, self.out_features, self.is_tied = linear.in_features, linear.out_features, is_tied
        # Past nn.Module's own bookkeeping: the parameters are those of the slices.
        self.__dict__.update(weight=linear._parameters["weight"], bias=linear.bias, tied=linear._parameters["weight"])
        self.__dict__["_whole"] = linear
        if isinstance(linear, EncodedLinear):  # what others see of it is not what is stored
            shape = linear.out_features, linear.in_features
            self.__dict__["weight"] = torch.empty(shape, dtype=linear.compute_dtype, device="meta")
        self.slices = nn.ModuleList(slices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, first = None, 0
        for part in self.slices:
            values = part(x)
            # Each result is copied and dropped: torch.cat would hold all of them beside the output.
            if output is None:
                output = values.new_empty(*values.shape[:-1], self.out_features)
            last = first + values.shape[-1]
            output[..., first:last] = values
            first = last
        assert output is not None
        return output

    def whole(self) -> nn.Module:
        """What it was made of, tied to what it is tied to now."""
        linear: nn.Module = self.__dict__["_whole"]
        if self.is_tied:
            tied = self.tied if isinstance(linear, EncodedLinear) else self.weight
            linear._parameters["weight"] = tied  # type: ignore[assignment]
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def slice_limit(vram_budget: int, ram_budget: int, has_device: bool) -> int:
    """Bytes that one matrix may take, stored and in the compute dtype, before it is sliced.

    Streamed units pass through both memories. Without a device compute uses host memory in place: nothing is sliced.
    """
    if not has_device:
        return sys.maxsize
    return max(UNIT_BYTES, min(vram_budget, ram_budget) // BUDGET_SHARE)


def slice_linears(skeleton: Any, tensors: Mapping[str, TensorInfo], limit: int) -> Mapping[str, TensorInfo]:
    """Replace each linear layer of ``skeleton`` larger than ``limit`` by a :class:`SlicedLinear`.

    What was sliced before, under another limit, is whole again first. Left whole are layers that something may use
    other than by calling them: those of modules that take weights, shared ones, and those tied to anything but an
    embedding whose rows are gathered.

    Parameters
    ----------
    skeleton
        A model on ``meta``, compressed already.
    tensors
        Its weights at rest, by native name.
    limit
        Bytes, see :func:`slice_limit`. Slices are larger only where ``ROW_STEP`` rows are.

    Returns
    -------
    Mapping
        ``tensors`` and those of the slices, named as ``lm_head.slices.0.weight``.
    """
    for name, module in list(skeleton.named_modules()):
        if isinstance(module, SlicedLinear):
            skeleton.set_submodule(name, module.whole())
    owners = _owners(skeleton)
    places = Counter(id(child) for module in skeleton.modules() for child in module.children())
    added: dict[str, TensorInfo] = {}
    for name, linear in list(_called(skeleton, "")):
        tied = [module for _, module in owners[id(linear._parameters["weight"])] if module is not linear]
        if places[id(linear)] > 1 or not all(isinstance(m, nn.Embedding) and is_gatherable(m) for m in tied):
            continue
        infos = _at_rest(linear, tensors, owners)
        if infos is None:
            continue
        stored = sum(info.nbytes for attribute, info in infos.items() if attribute != "bias")
        computed = linear.in_features * linear.out_features * _compute_dtype(linear).itemsize
        counts = row_counts(linear.out_features, max(stored, computed), limit)
        if len(counts) < 2:
            continue
        first = 0
        for index, rows in enumerate(counts):
            for attribute, info in infos.items():
                part = f"{name}.slices.{index}.{attribute}"
                step = _step(linear, attribute)
                added[part] = info.rows(part, [(first // step, -(-(first + rows) // step))])
            first += rows
        skeleton.set_submodule(name, SlicedLinear(linear, [_slice(linear, rows) for rows in counts], bool(tied)))
    return {**tensors, **added} if added else tensors


def row_counts(rows: int, nbytes: int, limit: int, step: int = ROW_STEP) -> list[int]:
    """Rows of each slice of a matrix of ``nbytes``: as few slices of at most ``limit`` as there can be, nearly equal.

    All but the last are multiples of ``step``; a slice larger than ``limit`` is no larger than ``step`` rows.
    """
    if nbytes <= limit:
        return [rows]
    steps = -(-rows // step)
    most = max(limit * rows // (nbytes * step), 1)
    count = -(-steps // most)
    ends = [min(steps * (index + 1) // count * step, rows) for index in range(count)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _owners(skeleton: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The names and the modules of each parameter, by its identity."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, module in skeleton.named_modules():
        for attribute, parameter in module._parameters.items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _called(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Linear | EncodedLinear]]:
    """Linear layers that are used by calling them; where a module takes weights, none below it is sliced."""
    if any(not isinstance(module.get_submodule(path), nn.Embedding) for path in calls_of(module).taken):
        return
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if type(child) is nn.Linear or isinstance(child, EncodedLinear):
            if child._parameters.get("weight") is not None:  # a packed one may be another object's
                yield path, child
        else:
            yield from _called(child, path)


def _at_rest(
    linear: nn.Linear | EncodedLinear,
    tensors: Mapping[str, TensorInfo],
    owners: Mapping[int, list[tuple[str, nn.Module]]],
) -> dict[str, TensorInfo] | None:
    """Where its parameters lie, tied ones under any of their names; ``None`` where they do not divide by rows.

    Whoever collects the weights says what is missing or has another shape.
    """
    found = {}
    for attribute, parameter in linear._parameters.items():
        if parameter is None:
            continue
        info = next((tensors[name] for name, _ in owners[id(parameter)] if name in tensors), None)
        if info is None or tuple(info.shape) != tuple(parameter.shape) or not info.shape:
            return None
        # An encoded part has a row for each of the matrix's, or one for some; where blocks cross rows, any number.
        step = _step(linear, attribute)
        if not step or ROW_STEP % step or info.shape[0] != -(-linear.out_features // step):
            return None
        found[attribute] = info
    return found


def _step(linear: nn.Linear | EncodedLinear, attribute: str) -> int:
    """Rows of the matrix for each row of a parameter; 0 where it cannot be cut."""
    steps = linear.encoded.row_steps() if isinstance(linear, EncodedLinear) else {}
    return 0 if steps is None else steps.get(attribute, 1)


def _slice(linear: nn.Linear | EncodedLinear, rows: int) -> nn.Module:
    """A layer of the same kind with ``rows`` outputs, on meta."""
    if isinstance(linear, EncodedLinear):
        return linear.cut(rows).train(linear.training)
    plain = nn.Linear(linear.in_features, rows, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
    return plain.requires_grad_(False).train(linear.training)


def _compute_dtype(linear: nn.Linear | EncodedLinear) -> torch.dtype:
    return linear.compute_dtype if isinstance(linear, EncodedLinear) else linear.weight.dtype
