"""Where a model's weights lie: by native name, in the checkpoint's own files, packed or as they are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.bin.in_place import is_wide, pickle_index
from ..checkpoint.bin.pickles import load_pickle
from ..checkpoint.gguf.header import read_gguf
from ..checkpoint.gguf.in_place import InPlace, in_place
from ..checkpoint.gguf.weights import GGUFWeights, gguf_config
from ..checkpoint.hub.headers import Headers
from ..checkpoint.legacy.families import native_tensors, normalised
from ..checkpoint.mapping import map_checkpoint
from ..checkpoint.sizes import Holds
from ..checkpoint.source import Source, read_config
from ..disk import read_json, status
from ..encoding import formats
from ..encoding.base import Encoded
from ..encoding.names import split, stand_ins
from ..errors import CheckpointError, UnsupportedModelError
from ..model.skeleton import lacking
from ..tensors.dtypes import TORCH_DTYPES, torch_dtype
from ..tensors.index import CheckpointIndex, Extent, TensorInfo, read_header, read_index

if TYPE_CHECKING:
    import torch

    from ..store.manifest import Store

log = logging.getLogger(__name__)

WIDEST = 8  # bytes of a value


@dataclass(frozen=True)
class Weights:
    """Where to read: config and tokenizer from ``folder``, parameters from ``tensors`` (by native name).

    Those that lie packed in the checkpoint are in ``packed`` instead.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    packed: Mapping[str, Encoded] = field(default_factory=dict)

    @property
    def folders(self) -> set[Path]:
        """What is read, and must not be removed meanwhile."""
        parts = (part for weight in self.packed.values() for part in weight.parts.values())
        infos = [*self.tensors.values(), *parts]
        return {self.folder, *(extent.path.parent for info in infos for extent in info.extents)}


def stored_dtype(source: Source, headers: Headers) -> torch.dtype | None:
    """The dtype of the first weights of floating point, as transformers chooses; ``None`` where that says nothing."""
    if source.format == "bin" and source.files:
        return next((t.dtype for t in load_pickle(source.files[0]).values() if t.is_floating_point()), None)
    if source.format == "gguf":
        return None
    if source.files:
        first = read_header(source.files[0])
    else:
        first = dict(headers.by_file[source.folder / source.wanted[0]]) if headers.by_file else {}
    dtypes = (TORCH_DTYPES[info.dtype] for info in first.values() if info.dtype in TORCH_DTYPES)
    # One byte is how a weight is packed, not what to compute in.
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), None)


def holds(source: Source, headers: Headers, store: Store | None = None) -> Holds | None:
    """What the weight files hold, here or on the Hub; ``None`` where no header says it."""
    if store is not None:
        return Holds.of(store.index.values())
    if gguf := source.gguf_file or source.header:
        return read_gguf(gguf).holds
    index = index_in_place(source, WIDEST) if source.files else headers.index
    return None if index is None else Holds.of(index.values())


def expected(source: Source, skeleton: Any, headers: Headers) -> Weights | None:
    """The parameters that are read in place, once what is missing is here; ``None`` where unknown.

    Those that are written once are left out. Where headers are no help, ``headers.why_not`` says why.

    Raises
    ------
    UnsupportedModelError
        If the checkpoint's layout cannot be streamed.
    """
    if source.gguf_file is not None or source.header is not None:
        found = gguf_in_place(source, dtype_name(skeleton.dtype))
        return Weights(source.folder, found.tensors, found.packed)
    index = index_in_place(source, skeleton.dtype.itemsize)
    index = headers.index if index is None else index
    if index is not None and source.format == "bin" and is_wide(index, skeleton.dtype.itemsize):
        headers.why_not = f"its weights are rewritten once, as {dtype_name(skeleton.dtype)}"
        return None
    if index is None:
        return None
    once = normalised_names(source)
    try:
        tensors, packed = mapped(index, source, skeleton)
    except formats.UnknownShapeError as error:
        headers.why_not = str(error)
        return None
    return Weights(source.folder, {name: info for name, info in tensors.items() if name not in once}, packed)


def index_in_place(source: Source, itemsize: int) -> CheckpointIndex | None:
    """What is read where it lies; ``None`` where it is not here, or is rewritten once.

    Parameters
    ----------
    itemsize
        Of what is computed in; .bin files with wider matrices are rewritten.
    """
    if source.files and source.format == "safetensors":
        return read_index(source.folder)
    return pickle_index(source.files, itemsize) if source.files and source.format == "bin" else None


def mapped(
    index: Mapping[str, TensorInfo], source: Source, skeleton: Any
) -> tuple[dict[str, TensorInfo], dict[str, Encoded]]:
    """The plain and the packed parameters by native name, whatever names and layout the checkpoint has.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        If a weight is packed and what it stands for is not known: a part of it is missing, or the layout is another.
    """
    if source.gguf_file is not None:
        return map_checkpoint(index, skeleton), {}
    config = _config(source, index)
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
    for info in plain.values():  # now that it is known which are needed
        torch_dtype(info)
    return plain, packed


def _config(
    source: Source, index: Mapping[str, TensorInfo] | None = None, headers: Headers | None = None
) -> Mapping[str, Any]:
    """``config.json``, with what a file beside it says of how its weights are packed, if they are."""
    config = read_config(source)
    file = next((name for name in formats.BESIDE if (source.folder / name).is_file()), None)
    if file is None or source.format == "gguf" or formats.quantisation(config):
        return config
    if index is None:
        index = index_in_place(source, WIDEST)
    if index is None and headers is not None:
        index = headers.index
    if index is not None and not formats.look_packed(index):
        log.info("%s is left aside: no weight is packed", source.folder / file)
        return config
    return {**config, "quantization_config": formats.beside(file, read_json(source.folder / file))}


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
    name = next(filter(formats.layout, index), None)
    if name is None:
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


def gguf_in_place(source: Source, dtype: str) -> InPlace:
    # Of a file on the Hub the header alone; its table and the length of the file are the real ones.
    path = source.gguf_file or source.header
    assert path is not None
    stat = status(path)
    return _gguf_in_place(path, stat.st_size, stat.st_mtime_ns, dtype)


@functools.lru_cache(maxsize=4)
def _gguf_in_place(path: Path, nbytes: int, changed: int, dtype: str) -> InPlace:
    """Seconds for a large model: a plan and a load after it ask several times."""
    file = read_gguf(path)
    return in_place(GGUFWeights(file, gguf_config(file), dtype))


def packed_as(source: Source, headers: Headers) -> str:
    """How the weights of a checkpoint are packed, for people; empty where they are plain."""
    if source.format == "gguf":
        return "GGUF"
    return str(formats.quantisation(_config(source, None, headers)).get("quant_method", ""))


def written_once(source: Source, dtype: torch.dtype) -> tuple[str, ...]:
    """The weights that are written once, beside those that are read where they lie."""
    is_gguf = source.gguf_file is not None or source.header is not None
    return gguf_in_place(source, dtype_name(dtype)).rest if is_gguf else normalised_names(source)


def normalised_names(source: Source) -> tuple[str, ...]:
    """Weights that are written once with rows of length 1, whatever the checkpoint's format."""
    return () if source.gguf_file is not None else normalised(read_config(source))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
