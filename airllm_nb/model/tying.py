"""Weights that the config ties though the checkpoint has one for each: they are what lies there, as in transformers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..disk import status
from ..encoding.base import Encoded
from ..stream.mapped import MappedFiles
from ..tensors.dtypes import torch_dtype
from ..tensors.index import TensorInfo

log = logging.getLogger(__name__)

# Values compared at once; rows that are looked at first.
_CHUNK, _SAMPLE = 4 << 20, 16

_AtRest = TensorInfo | Encoded


def untie(
    model: Any, tensors: Mapping[str, TensorInfo], packed: Mapping[str, Encoded] | None = None, *, whole: bool = True
) -> None:
    """Give each of the tied weights of ``model`` that the checkpoint has in several values a parameter of its own.

    The rule, and the order in which the pairs are looked at, are those of ``PreTrainedModel.tie_weights``: a pair stays
    tied where one of both is missing, or where both are equal; and while they are not here to be compared. Call it
    before anything is put in the place of the model's modules.

    Parameters
    ----------
    whole
        Whether all of both is read, where some rows of them are equal; a plan goes by those rows.
    """
    there: dict[str, _AtRest] = {**tensors, **(packed or {})}
    pairs = list(model.all_tied_weights_keys.items())
    for at, (target, source) in enumerate(pairs):
        if target in there and source in there:
            are_equal = _are_equal(there[target], there[source], whole)
            if are_equal is None:
                log.info("%s and %s are tied by the config and may differ in the checkpoint, which is not here yet",
                         target, source)  # fmt: skip
            if are_equal is False:
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


def _are_equal(one: _AtRest, other: _AtRest, whole: bool) -> bool | None:
    """Whether both are the same values; ``None`` where that cannot be seen."""
    if isinstance(one, Encoded) or isinstance(other, Encoded):
        if not (
            isinstance(one, Encoded) and isinstance(other, Encoded)
            and one.encodings == other.encodings and one.parts.keys() == other.parts.keys()
        ):  # fmt: skip
            return False
        found = {_are_equal(part, other.parts[name], whole) for name, part in one.parts.items()}
        return False if False in found else None if None in found else True
    if one.extents == other.extents:
        return True
    if one.shape != other.shape:
        return False
    paths = sorted({extent.path for extent in (*one.extents, *other.extents)})
    if not all(path.is_file() for path in paths):
        return None
    stamps = tuple((seen.st_size, seen.st_mtime_ns, seen.st_ino) for seen in map(status, paths))
    return _compared(_sampled(one), _sampled(other), stamps) and (not whole or _compared(one, other, stamps))


def _sampled(info: TensorInfo) -> TensorInfo:
    """Some of its rows, from the first to the last: those of two heads that were trained apart differ."""
    rows = info.shape[0] if info.shape else 1
    if rows <= _SAMPLE or info.nbytes % rows:
        return info
    return info.rows(info.name, [(row, row + 1) for row in {n * (rows - 1) // (_SAMPLE - 1) for n in range(_SAMPLE)}])


@functools.lru_cache(maxsize=256)
def _compared(one: TensorInfo, other: TensorInfo, stamps: tuple[tuple[int, ...], ...]) -> bool:
    """Kept for the process, as long as the files are the same: a model is opened more than once."""
    files, is_same = MappedFiles(), one.dtype == other.dtype
    pairs = zip(_chunks(files, one, is_same), _chunks(files, other, is_same), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _chunks(files: MappedFiles, info: TensorInfo, as_bytes: bool) -> Iterator[torch.Tensor]:
    """The values, or their bytes, some at a time: of a mapped file, so that nothing has to hold them all."""
    flat = files.tensor(info, torch_dtype(info)).reshape(-1)
    for chunk in flat.split(_CHUNK) if flat.numel() else ():
        yield chunk.view(torch.uint8) if as_bytes else chunk.to(torch.float32)
