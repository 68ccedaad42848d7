"""Checkpoint names → native parameter names, by transformers' own conversion table, and without touching a weight.

Renames cost nothing. Merges and splits (per-expert matrices into one parameter, fused q/k/v apart) are run by the
library's own operations on tensors of *row numbers* instead of weights: what comes out says which rows of which file
make up each parameter, and rows are extents. An operation that moves things within a row (a transposition) cannot be
said that way and is refused by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..tensors.index import Extent, TensorInfo

log = logging.getLogger(__name__)


def map_checkpoint(index: Mapping[str, TensorInfo], model: Any) -> dict[str, TensorInfo]:
    """The tensors of ``index`` by the parameter names of ``model`` (a ``PreTrainedModel``, weights on ``meta``).

    Tensors that the model does not know are left out, as transformers does.

    Raises
    ------
    UnsupportedModelError
        If the checkpoint's layout needs a conversion that is more than moving rows.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, TensorInfo] = {}
    groups: dict[str, _Group] = {}
    strangers: dict[str, None] = {}
    for name in sorted(index, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            strangers[".".join(name.split(".")[:2])] = None
            continue
        if pattern is None:
            found[target] = index[name]
        else:
            if target not in groups:
                groups[target] = _Group(target, deepcopy(by_pattern[pattern]))
            groups[target].add(name, pattern, index[name])
    for group in groups.values():
        found.update(group.convert(model, wanted))
    if strangers:
        log.info("left on disk, as %s has no use for it: tensors of %s", type(model).__name__, ", ".join(strangers))
    return found


class _Group:
    """The tensors that one conversion turns into one parameter or several."""

    def __init__(self, target: str, converter: Any):
        self._target, self._converter = target, converter
        self._sources: list[TensorInfo] = []
        self._first_row: list[int] = []
        self._rows = 0

    def add(self, name: str, pattern: str, info: TensorInfo) -> None:
        shape = info.shape[:-1] if len(info.shape) > 1 else info.shape
        count = math.prod(shape)
        first, shape = self._rows, (*shape, *([1] if len(info.shape) > 1 else []))

        def numbers() -> torch.Tensor:  # made when they are asked for: of 256 experts they are a gigabyte
            return torch.arange(first, first + count).view(shape)

        self._converter.add_tensor(self._target, name, pattern, numbers)
        self._sources.append(info)
        self._first_row.append(self._rows)
        self._rows += count

    def convert(self, model: Any, wanted: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
        if self._is_done(wanted):
            return {self._target: replace(self._sources[0], name=self._target)}
        try:
            results = self._converter.convert(self._target, model=model, config=model.config)
            return {name: self._describe(name, rows, wanted[name]) for name, rows in results.items() if name in wanted}
        except (RuntimeError, ValueError, IndexError, _NotRows) as error:
            operations = ", ".join(type(operation).__name__ for operation in self._converter.operations)
            raise UnsupportedModelError(
                f"{type(model).__name__}: {self._target} is stored in a layout that cannot be streamed in place "
                f"({operations}: {error}); load it with transformers once, save it with "
                "save_pretrained(folder, save_original_format=False), and load that folder"
            ) from None

    def _is_done(self, wanted: Mapping[str, torch.Tensor]) -> bool:
        """Operations that look at the shape first see that of rows here; whether the real one asks for nothing."""
        return all(getattr(operation, "check_dims", False) for operation in self._converter.operations) and (
            len(self._sources) == 1 and self._sources[0].shape == tuple(wanted[self._target].shape)
        )

    def _describe(self, name: str, rows: Any, parameter: torch.Tensor) -> TensorInfo:
        rows = rows[0] if isinstance(rows, list) else rows
        first = self._sources[0]
        row_bytes = first.nbytes // max(math.prod(first.shape[:-1] if len(first.shape) > 1 else first.shape), 1)
        shape = (*rows.shape[:-1], first.shape[-1]) if len(first.shape) > 1 else tuple(rows.shape)
        if tuple(shape) != tuple(parameter.shape) or any(info.dtype != first.dtype for info in self._sources):
            raise _NotRows(f"rows give {list(shape)}, the model wants {list(parameter.shape)}")
        extents = tuple(self._extents(rows.reshape(-1), row_bytes))
        return TensorInfo(name, first.dtype, tuple(shape), extents)

    def _extents(self, rows: torch.Tensor, row_bytes: int) -> list[Extent]:
        """Runs of consecutive rows of one source, as extents."""
        owner = torch.bucketize(rows, torch.tensor(self._first_row), right=True) - 1
        breaks = torch.nonzero((rows[1:] != rows[:-1] + 1) | (owner[1:] != owner[:-1])).reshape(-1) + 1
        starts = [0, *breaks.tolist()]
        extents = []
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            source = self._sources[int(owner[start])]
            if len(source.extents) != 1:
                raise _NotRows("a source is in several files")
            local = int(rows[start]) - self._first_row[int(owner[start])]
            whole = source.extents[0]
            extents.append(Extent(whole.path, whole.offset + local * row_bytes, (end - start) * row_bytes))
        return extents


class _NotRows(Exception):
    """A conversion is more than moving rows."""
