"""A GGUF file read in place: its blocks stream as they are; only vectors and what must be computed is written once.

Which rows of the file make up a parameter is found by running transformers' own rules on row numbers in the place of
weights: rows that stay whole can be streamed in any order, everything else cannot.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trace import ProgressCallback, silent
from .codecs.ggml import packing_of
from .codecs.packing import Packed, Plain
from .gguf import GGUFWeights, gguf_config, save_companions
from .gguf_file import GGUFTensor, read_gguf
from .index import Extent, TensorInfo
from .rewrite import rewrite
from .store import StoreMeta

if TYPE_CHECKING:
    from .shard import Entry

log = logging.getLogger(__name__)

# ggml's numbers of the types that torch has too.
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
# Rows that lie in another order are read in that order where runs of them have at least so many bytes; else as they
# lie, and what is computed is put in order.
_RUN_BYTES = 256 << 10


@dataclass(frozen=True)
class InPlace:
    """What of a GGUF file is streamed as it lies, by native parameter name, and what is written once.

    Attributes
    ----------
    tensors
        Matrices of the dtypes that torch has.
    packed
        Matrices in blocks.
    rest
        The names of all others, in the order of the model.
    """

    tensors: dict[str, TensorInfo]
    packed: dict[str, Packed]
    rest: tuple[str, ...]


def in_place(weights: GGUFWeights) -> InPlace:
    """Sort the parameters of a file; nothing of the weights is read."""
    tensors: dict[str, TensorInfo] = {}
    packed: dict[str, Packed] = {}
    rest = []
    for name, spec in weights.specs.items():
        found = _placed(weights, name, spec)
        if found is None:
            rest.append(name)
        elif isinstance(found, Packed):
            packed[name] = found
        else:
            tensors[name] = found
    if large := [name for name in rest if len(weights.specs[name].shape) > 1]:
        log.info("%s: written once, as their layout in the file is another: %d matrices (%s, …)",
                 weights.file.path.name, len(large), large[0])  # fmt: skip
    return InPlace(tensors, packed, tuple(rest))


def write_rest(path: Path, names: Collection[str], folder: Path, dtype: str, meta: StoreMeta,
               progress: ProgressCallback = silent) -> Path:  # fmt: skip
    """Write what cannot be streamed in place, with config and tokenizer, into ``folder``, once.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        If the file is damaged, or its tokenizer is not one that transformers reads.
    StoreError
        If the folder cannot be written.
    """
    file = read_gguf(path)
    config = gguf_config(file)

    def companions(target: Path) -> None:
        save_companions(file, config, target, dtype)

    weights = _Some(GGUFWeights(file, config, dtype), names)
    return rewrite(folder, weights, meta, companions, progress, str(path))


class _Some:
    """Some of the weights of a file."""

    def __init__(self, weights: GGUFWeights, names: Collection[str]):
        self._weights = weights
        self.specs = {name: weights.specs[name] for name in names}

    def __getitem__(self, name: str) -> Any:
        return self._weights[name]


def _placed(weights: GGUFWeights, name: str, spec: Entry) -> TensorInfo | Packed | None:
    sources, shape = weights.sources(name), spec.shape
    kind = sources[0].ggml_type
    alike = all(source.ggml_type == kind and source.shape[-1:] == shape[-1:] for source in sources)
    packing = Plain() if kind in _PLAIN else packing_of(kind)
    order = _row_order(weights, name, spec) if len(shape) > 1 and alike and packing is not None else None
    if order is None or packing is None:
        return None
    nbytes = sum(source.nbytes for source in sources)
    runs = _runs(weights.file.path, sources, order, nbytes // len(order))
    few = 4 * math.prod(shape[:-2]) * len(sources)
    is_moved = len(runs) > few and len(runs) * _RUN_BYTES > nbytes
    if is_moved:
        if len(shape) > 2 or len(sources) > 1:
            return None
        runs = [Extent(weights.file.path, sources[0].offset, nbytes)]
    if kind in _PLAIN:
        info = TensorInfo(name, _PLAIN[kind], shape, tuple(runs))
        return Packed(shape, (packing,), {"weight": info}, None, tuple(order.tolist())) if is_moved else info
    info = TensorInfo(name, "U8", (*shape[:-1], nbytes // len(order)), tuple(runs))
    pieces = None if len(shape) == 2 else 1
    return Packed(shape, (packing,), {"weight": info}, pieces, tuple(order.tolist()) if is_moved else None)


def _row_order(weights: GGUFWeights, name: str, spec: Entry) -> Any:
    """For each row of a parameter, which of the file's rows it is (counted through its tensors); ``None`` if none."""
    import numpy as np

    first, count = {}, 0
    for source in weights.sources(name):
        first[source.name] = count
        count += math.prod(source.shape[:-1])

    def numbers(source: GGUFTensor) -> Any:
        rows = math.prod(source.shape[:-1])
        return np.arange(first[source.name], first[source.name] + rows).reshape(*source.shape[:-1], 1)

    try:
        with np.errstate(all="ignore"):  # a rule that computes (Mamba's logarithm) gets row numbers here
            moved = np.asarray(weights.rearranged(name, numbers))
    except (ValueError, IndexError, RuntimeError):  # a rule that needs whole rows
        return None
    if moved.shape != (*spec.shape[:-1], 1) or not np.array_equal(np.sort(moved, axis=None), np.arange(count)):
        return None
    return moved.reshape(-1)


def _runs(path: Path, sources: list[GGUFTensor], order: Any, row_bytes: int) -> list[Extent]:
    """Consecutive rows of one tensor, as extents."""
    import numpy as np

    begins = np.cumsum([0, *(math.prod(source.shape[:-1]) for source in sources)])
    owner = np.searchsorted(begins, order, side="right") - 1
    breaks = np.flatnonzero((np.diff(order) != 1) | (np.diff(owner) != 0)) + 1
    extents = []
    for start, end in itertools.pairwise([0, *breaks.tolist(), len(order)]):
        which = int(owner[start])
        local = int(order[start] - begins[which])
        extents.append(Extent(path, sources[which].offset + local * row_bytes, (end - start) * row_bytes))
    return extents
