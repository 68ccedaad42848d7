"""Encoded weights by native name: transformers' own conversions move rows, and packed bytes follow them.

A packed weight goes into the mapping as a matrix of one byte a value that lies nowhere. What comes out says which rows
of which weights make up each parameter: whole matrices are stacked, rows are cut where the encoding allows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import UnsupportedModelError
from ..tensors.index import Extent, TensorInfo
from .base import Encoded


def stand_ins(packed: Mapping[str, Encoded]) -> dict[str, TensorInfo]:
    """What stands for packed weights in a mapping of names."""
    return {
        name: TensorInfo(name, "F8_E4M3", weight.shape, (Extent(Path(name), 0, math.prod(weight.shape)),))
        for name, weight in packed.items()
    }


def split(
    mapped: Mapping[str, TensorInfo], packed: Mapping[str, Encoded]
) -> tuple[dict[str, TensorInfo], dict[str, Encoded]]:
    """The plain and the packed parameters, by native name, of a mapping that had :func:`stand_ins` among its tensors.

    Raises
    ------
    UnsupportedModelError
        If a parameter is made of packed weights in a way that their encoding does not allow.
    """
    sources = {Path(name): weight for name, weight in packed.items()}
    plain: dict[str, TensorInfo] = {}
    found: dict[str, Encoded] = {}
    for name, info in mapped.items():
        if not any(extent.path in sources for extent in info.extents):
            plain[name] = info
        elif all(extent.path in sources for extent in info.extents):
            found[name] = _made_of(name, info, [(sources[extent.path], extent) for extent in info.extents])
        else:
            raise _cannot(name, "some of what it is made of is packed, some is not")
    return plain, found


def _made_of(name: str, info: TensorInfo, runs: list[tuple[Encoded, Extent]]) -> Encoded:
    first, columns = runs[0][0], info.shape[-1]
    if len(runs) == 1 and first.shape == info.shape:
        return first
    if any(weight.order is not None for weight, _ in runs):
        raise _cannot(name, "its rows lie in another order")
    pieces = [piece for weight, extent in runs for piece in _whole_pieces(weight, extent)]
    rows = {weight.shape[-2] // (weight.pieces or 1) for weight, _ in runs}
    if None not in pieces and len(rows) == 1 and info.shape[-2] % min(rows) == 0:
        return _stack(name, info, [piece for piece in pieces if piece is not None], info.shape[-2] // min(rows))
    encoding = first.encodings[0]
    steps = encoding.row_steps(columns)
    if steps is None or any(weight.encodings != first.encodings or len(weight.encodings) > 1 for weight, _ in runs):
        raise _cannot(name, f"{encoding.name} cannot be cut by rows")
    if any((extent.offset // columns) % step or (extent.nbytes // columns) % step
           for _, extent in runs for step in steps.values()):  # fmt: skip
        raise _cannot(name, f"it begins or ends within a block of {encoding.name}")
    parts = {}
    for attribute, step in steps.items():
        cut = [
            _flat(weight.parts[attribute], weight).rows(
                name, [(extent.offset // columns // step, (extent.offset + extent.nbytes) // columns // step)]
            )
            for weight, extent in runs
        ]
        head = (*info.shape[:-2], info.shape[-2] // step)
        parts[attribute] = _joined(name, cut, head, cut[0].shape[1:])
    return Encoded(info.shape, first.encodings, parts, None if len(info.shape) == 2 else 1)


def _whole_pieces(weight: Encoded, extent: Extent) -> Iterable[tuple[Encoded, int] | None]:
    """The pieces of ``weight`` in a run of its rows; ``None`` among them where the run cuts one."""
    count = math.prod(weight.shape[:-2]) * (weight.pieces or 1)
    size = math.prod(weight.shape) // count
    if extent.offset % size or extent.nbytes % size:
        return [None]
    return [(weight, number) for number in range(extent.offset // size, (extent.offset + extent.nbytes) // size)]


def _stack(name: str, info: TensorInfo, pieces: list[tuple[Encoded, int]], each: int) -> Encoded:
    parts = {}
    for attribute, part in pieces[0][0].parts.items():
        taken = [weight.part(attribute, number) for weight, number in pieces]
        shape = part.shape if pieces[0][0].pieces is None else part.shape[1:]
        if any(one.dtype != part.dtype or one.nbytes != taken[0].nbytes for one in taken):
            raise _cannot(name, "what it is made of is packed in different ways")
        parts[attribute] = _joined(name, taken, (len(taken),), shape)
    encodings = [weight.encoding(number) for weight, number in pieces]
    if len(names := {encoding.name for encoding in encodings}) > 1:
        raise _cannot(name, f"what it is made of is packed as {' and '.join(sorted(names))}")
    same = all(encoding == encodings[0] for encoding in encodings)
    return Encoded(info.shape, tuple(encodings[:1] if same else encodings), parts, each)


def _flat(part: TensorInfo, weight: Encoded) -> TensorInfo:
    """The part with one dimension for all rows."""
    return part if weight.pieces is None else replace(part, shape=(math.prod(part.shape[:2]), *part.shape[2:]))


def _joined(name: str, parts: list[TensorInfo], head: tuple[int, ...], tail: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, parts[0].dtype, (*head, *tail), tuple(extent for part in parts for extent in part.extents))


def _cannot(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} cannot be streamed packed: {why}; load the unquantised checkpoint, with "
                                 "compression='4bit' if it should be small")  # fmt: skip
