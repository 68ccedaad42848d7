"""Weights that the config ties though the checkpoint has one for each: they are what lies there, as in transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.codecs.packing import Packed
from ..checkpoint.encoded import torch_dtype
from ..checkpoint.index import TensorInfo
from ..stream.mapped import MappedFiles

log = logging.getLogger(__name__)

# Values compared at once.
_CHUNK = 4 << 20

_AtRest = TensorInfo | Packed


def untie(model: Any, tensors: Mapping[str, TensorInfo], packed: Mapping[str, Packed] | None = None) -> None:
    """Give each of the tied weights of ``model`` that the checkpoint has in several values a parameter of its own.

    The rule, and the order in which the pairs are looked at, are those of ``PreTrainedModel.tie_weights``: a pair stays
    tied where one of both is missing, or where both are equal. Copies that are not here to be compared are not equal.
    Call it before anything is put in the place of the model's modules.
    """
    there: dict[str, _AtRest] = {**tensors, **(packed or {})}
    pairs = list(model.all_tied_weights_keys.items())
    for at, (target, source) in enumerate(pairs):
        if target in there and source in there:
            if not _are_equal(there[target], there[source]):
                log.warning("%s and %s are tied by the config and differ in the checkpoint: each is its own",
                            target, source)  # fmt: skip
                model.all_tied_weights_keys.pop(target)
            else:
                there[target] = there[source]
        elif target in there:
            there[source] = there[target]
        elif source in there:
            there[target] = there[source]
        elif backup := next((t for t, s in pairs[at + 1 :] if s == source and t in there), None):
            there[target] = there[backup]
    _part(model, there, {name for pair in pairs for name in pair})


def _part(model: Any, there: Mapping[str, _AtRest], names: set[str]) -> None:
    """One parameter for each value among those that share one."""
    parts: dict[tuple[int, int], nn.Parameter] = {}
    taken: set[int] = set()
    for name in sorted(names & there.keys()):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = module._parameters.get(attribute)
        if tensor is None:
            continue
        key = id(tensor), id(there[name])
        if key not in parts:
            # The first value keeps the parameter; it may be known by further names.
            parts[key] = tensor if id(tensor) not in taken else nn.Parameter(tensor.detach().clone(), False)
            taken.add(id(tensor))
        module._parameters[attribute] = parts[key]


def _are_equal(one: _AtRest, other: _AtRest) -> bool:
    if isinstance(one, Packed) or isinstance(other, Packed):
        return (
            isinstance(one, Packed) and isinstance(other, Packed)
            and one.packing == other.packing and one.parts.keys() == other.parts.keys()
            and all(_are_equal(part, other.parts[name]) for name, part in one.parts.items())
        )  # fmt: skip
    if one.extents == other.extents:
        return True
    if one.shape != other.shape or not all(extent.path.is_file() for extent in (*one.extents, *other.extents)):
        return False
    files, is_same = MappedFiles(), one.dtype == other.dtype
    pairs = zip(_chunks(files, one, is_same), _chunks(files, other, is_same), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _chunks(files: MappedFiles, info: TensorInfo, as_bytes: bool) -> Iterator[torch.Tensor]:
    """The values, or their bytes, some at a time: of a mapped file, so that nothing has to hold them all."""
    flat = files.tensor(info, torch_dtype(info)).reshape(-1)
    for chunk in flat.split(_CHUNK) if flat.numel() else ():
        yield chunk.view(torch.uint8) if as_bytes else chunk.to(torch.float32)
