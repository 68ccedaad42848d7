"""Tensors by the names that files have for them → the parameters of a model, packed ones apart, or a refusal."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.legacy.families import native_tensors
from ..checkpoint.mapping import map_checkpoint
from ..checkpoint.source import Source
from ..encoding import formats
from ..encoding.base import Encoded
from ..encoding.names import split, stand_ins
from ..errors import CheckpointError, UnsupportedModelError
from ..model.skeleton import lacking
from ..tensors.dtypes import torch_dtype
from ..tensors.index import Extent, TensorInfo

log = logging.getLogger(__name__)


def native_weights(
    index: Mapping[str, TensorInfo], config: Mapping[str, Any], source: Source, skeleton: Any
) -> tuple[dict[str, TensorInfo], dict[str, Encoded]]:
    """The plain and the packed parameters by native name, whatever names and layout the checkpoint has.

    Parameters
    ----------
    config
        Its config.json, with what another file says of how weights are packed.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        If a weight is packed and what it stands for is not known: a part of it is missing, or the layout is another.
    """
    formats.check(config, source.name)  # what a file beside config.json says was not looked at before
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if formats.quantisation(config) and not formats.are_here(index.values()):
        shapes = _shapes_by_old_names(skeleton) | shapes
    plain, packed = formats.find(config, index, shapes)
    is_said = bool(formats.quantisation(config))
    if is_said and (name := _wanted(formats.unknown(plain), skeleton)):
        raise formats.UnknownShapeError(name)
    if is_said and (name := _wanted(formats.coded(plain), skeleton)):
        raise CheckpointError(f"{plain[name].extents[0].path}: {name} is quantised ({plain[name].dtype}) and has no "
                              "scale beside it; a shard may be missing, download the checkpoint again")  # fmt: skip
    native = map_checkpoint({**native_tensors(plain, config), **stand_ins(packed)}, skeleton)
    if is_said:
        _refuse_strangers(native, packed, skeleton)
    else:
        _refuse_scaled(native, index, source, skeleton)
        _refuse_unsaid(native, index, skeleton)
    plain, packed = split(native, packed)
    for info in plain.values():
        torch_dtype(info)  # what nothing here can compute with is said now, not by whoever casts or encodes it
    return plain, packed


def _refuse_scaled(
    native: Mapping[str, TensorInfo], index: Mapping[str, TensorInfo], source: Source, skeleton: Any
) -> None:
    """A byte of FP8 is a value by itself only where nothing says that it is scaled."""
    parameters = skeleton.state_dict()
    extents = {
        _begin(extent)
        for name, info in native.items()
        if info.dtype in formats.FP8 and parameters[name].is_floating_point()
        for extent in info.extents
    }
    if not extents:
        return
    cast = [name for name, info in index.items() if info.extents and _begin(info.extents[0]) in extents]
    if found := formats.scale_of(cast, index):
        name, scale = found
        raise UnsupportedModelError(
            f"{index[name].extents[0].path}: {name} is quantised ({index[name].dtype}) with {scale} beside it, and "
            "nothing says how; add the quantization_config that its publisher has in config.json, or load the "
            "unquantised checkpoint, with compression='4bit' if it should be small"
        )
    log.warning("%s: weights are FP8 without any scale (%s, …): taken as they are", source.name, next(iter(cast), ""))


def _refuse_unsaid(native: Mapping[str, TensorInfo], index: Mapping[str, TensorInfo], skeleton: Any) -> None:
    """Where the model lacks a weight, or has integers for it, and some are packed, no shard is missing."""
    if (name := formats.first_packed(index)) is None:
        return
    parameters = skeleton.state_dict()
    if lacking(skeleton, native) or any(parameters[whole].is_floating_point() for whole in formats.coded(native)):
        raise UnsupportedModelError(
            f"{index[name].extents[0].path}: {name} is packed ({formats.layout(name)}) and nothing says how: no "
            f"quantization_config in config.json, no {' or '.join(formats.BESIDE)}; add what the publisher has, or "
            "load the unquantised checkpoint, with compression='4bit' if it should be small"
        )


def _refuse_strangers(native: Mapping[str, TensorInfo], packed: Mapping[str, Encoded], skeleton: Any) -> None:
    """The same where it is known how they are packed, but not which weights they are."""
    taken = {extent.path for info in native.values() for extent in info.extents}
    strangers = [name for name in packed if Path(name) not in taken]
    if not strangers or not (missing := lacking(skeleton, native)):
        return
    # Other parts of a model, such as a vision tower, may be packed as they like.
    places = {name.removesuffix(".weight").rpartition(".")[0] + "." for name in missing}
    if name := next((name for name in strangers if name.startswith(tuple(places))), None):
        raise UnsupportedModelError(
            f"{name} is packed ({packed[name].encodings[0].name}) in a place that {type(skeleton).__name__} has no "
            f"weight for, while {missing[0]} is not there: a layout that cannot be streamed; load the unquantised "
            "checkpoint, with compression='4bit' if it should be small, or a GGUF version"
        )


def _begin(extent: Extent) -> tuple[Path, int]:
    return extent.path, extent.offset


def _shapes_by_old_names(skeleton: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that the model's checkpoints have, where those are others than the native ones."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        reverted = revert_weight_conversion(skeleton, skeleton.state_dict())
    except Exception as error:  # whatever an architecture's own conversion runs into: then they are not known
        log.info("no names of checkpoints for %s: %s", type(skeleton).__name__, error)
        return {}
    return {name: tuple(tensor.shape) for name, tensor in reverted.items()}


def _wanted(tensors: Mapping[str, TensorInfo], skeleton: Any) -> str | None:
    """The first of them that the model has as a parameter of floating point, or as a part of one."""
    if not tensors:
        return None
    try:
        native = map_checkpoint(tensors, skeleton)
    except UnsupportedModelError:  # it has, but not as they are
        return next(iter(tensors))
    parameters = skeleton.state_dict()
    begins = {info.extents[0]: name for name, info in tensors.items() if info.extents}
    found = (info for name, info in native.items() if parameters[name].is_floating_point())
    return next((begins.get(info.extents[0], next(iter(tensors))) for info in found if info.extents), None)
