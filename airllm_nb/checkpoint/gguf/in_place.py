"""A GGUF file read in place: its blocks stream as they are; only vectors and what must be computed is written once.

Which rows of the file make up a parameter is found by running transformers' own rules on row numbers in the place of
weights: rows that stay whole can be streamed in any order, everything else cannot.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...config import GiB, format_bytes
from ...encoding.base import Encoded, Encoding, Plain, Stacked
from ...encoding.ggml import encoding_of
from ...tensors.index import Extent, TensorInfo
from .header import GGUFTensor
from .weights import GGUFWeights

if TYPE_CHECKING:
    from ...store.shard import Entry

log = logging.getLogger(__name__)

# ggml's numbers of the types that torch has too.
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
# Rows that lie in another order are read in that order where runs of them have at least so many bytes; else as they
# lie, and what is computed is put in order.
_RUN_BYTES = 256 << 10
# Of what is written once beside the file, more than a person would overlook.
WORTH_A_WARNING = GiB


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
    packed: dict[str, Encoded]
    rest: tuple[str, ...]


def in_place(weights: GGUFWeights) -> InPlace:
    """Sort the parameters of a file; nothing of the weights is read."""
    tensors: dict[str, TensorInfo] = {}
    packed: dict[str, Encoded] = {}
    rest = []
    for name, spec in weights.specs.items():
        found = _placed(weights, name, spec)
        if found is None:
            rest.append(name)
        elif isinstance(found, Encoded):
            packed[name] = found
        else:
            tensors[name] = found
    if large := [name for name in rest if len(weights.specs[name].shape) > 1]:
        nbytes = sum(math.prod(weights.specs[name].shape) * weights.dtype.itemsize for name in large)
        log.log(logging.INFO if nbytes < WORTH_A_WARNING else logging.WARNING,
                "%s: %d matrices (%s, …) cannot be streamed as they lie, because the model wants their values in "
                "another layout: they are written once, unpacked, which takes %s",
                weights.file.path.name, len(large), large[0], format_bytes(nbytes))  # fmt: skip
    return InPlace(tensors, packed, tuple(rest))


def _placed(weights: GGUFWeights, name: str, spec: Entry) -> TensorInfo | Encoded | None:
    sources, shape = weights.sources(name), spec.shape
    if len(shape) < 2 or any(source.shape[-1:] != shape[-1:] for source in sources):
        return None
    encodings = [_encoding(source.ggml_type) for source in sources]
    order = None if None in encodings else _row_order(weights, name, spec)
    if order is None:
        return None
    if len({source.ggml_type for source in sources}) > 1:
        return _stacked(sources, encodings, order, shape)  # type: ignore[arg-type]
    kind, encoding = sources[0].ggml_type, encodings[0]
    assert encoding is not None
    nbytes = sum(source.nbytes for source in sources)
    runs = _runs(sources, order, nbytes // len(order))
    few = 4 * math.prod(shape[:-2]) * len(sources)
    is_moved = len(runs) > few and len(runs) * _RUN_BYTES > nbytes
    if is_moved:
        if len(shape) > 2 or len(sources) > 1:
            return None
        runs = [Extent(sources[0].path, sources[0].offset, nbytes)]
    info = _info(name, kind, shape, runs)
    if kind in _PLAIN:
        return Encoded(shape, (encoding,), {"weight": info}, None, tuple(order.tolist())) if is_moved else info
    pieces = None if len(shape) == 2 else 1
    return Encoded(shape, (encoding,), {"weight": info}, pieces, tuple(order.tolist()) if is_moved else None)


def _encoding(kind: int) -> Encoding | None:
    return Plain() if kind in _PLAIN else encoding_of(kind)


def _info(name: str, kind: int, shape: tuple[int, ...], extents: list[Extent]) -> TensorInfo:
    if kind in _PLAIN:
        return TensorInfo(name, _PLAIN[kind], shape, tuple(extents))
    row_bytes = sum(extent.nbytes for extent in extents) // math.prod(shape[:-1])
    return TensorInfo(name, "U8", (*shape[:-1], row_bytes), tuple(extents))


def _stacked(
    sources: list[GGUFTensor], encodings: list[Encoding], order: Any, shape: tuple[int, ...]
) -> Encoded | None:
    """Of each expert the gate and the up, in a type of its own; ``None`` where their rows lie in another order."""
    import numpy as np

    count, begins = len(sources), _begins(sources)
    if len(shape) != 3 or shape[1] % count:
        return None
    parts, stack = {}, []
    for number, rows in enumerate(order.reshape(shape[0], count, -1).swapaxes(0, 1)):
        which = int(np.searchsorted(begins, rows[0, 0], side="right")) - 1
        if not np.array_equal(rows.reshape(-1), np.arange(begins[which], begins[which + 1])):
            return None
        source, part = sources[which], f"weight_{number}" if number else "weight"
        whole = Extent(source.path, source.offset, source.nbytes)
        parts[part] = _info(part, source.ggml_type, (*rows.shape, shape[2]), [whole])
        stack.append((part, encodings[which]))
    return Encoded(shape, (Stacked(tuple(stack)),), parts, 1)


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


def _begins(sources: list[GGUFTensor]) -> Any:
    """Before each tensor, and behind the last, how many rows there were."""
    import numpy as np

    return np.cumsum([0, *(math.prod(source.shape[:-1]) for source in sources)])


def _runs(sources: list[GGUFTensor], order: Any, row_bytes: int) -> list[Extent]:
    """Consecutive rows of one tensor, as extents."""
    import numpy as np

    begins = _begins(sources)
    owner = np.searchsorted(begins, order, side="right") - 1
    breaks = np.flatnonzero((np.diff(order) != 1) | (np.diff(owner) != 0)) + 1
    extents = []
    for start, end in itertools.pairwise([0, *breaks.tolist(), len(order)]):
        which = int(owner[start])
        source, local = sources[which], int(order[start] - begins[which])
        extents.append(Extent(source.path, source.offset + local * row_bytes, (end - start) * row_bytes))
    return extents
