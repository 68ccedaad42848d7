"""Whether a model's bytes are here: in the checkpoint's own files, or in a store that is found, or written once."""

from __future__ import annotations

import functools
import logging
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.bin.pickles import convert_pickles
from ..checkpoint.companions import copy_companions, own_companions
from ..checkpoint.gguf.in_place import write_rest
from ..checkpoint.gguf.weights import convert_gguf
from ..checkpoint.hub.headers import Headers
from ..checkpoint.legacy.normalised import write_normalised
from ..checkpoint.mapping import map_checkpoint
from ..checkpoint.rewrite import is_complete
from ..checkpoint.source import Source, store_folder
from ..config import LoadOptions
from ..disk import status
from ..encoding.base import Encoding
from ..encoding.formats import get_encoding
from ..errors import StoreError
from ..model.placing import compressible
from ..model.skeleton import kept_in_float32
from ..model.tying import untie
from ..store.jobs import encode_jobs
from ..store.listing import remove_store
from ..store.locks import hold, locked
from ..store.manifest import Store, StoreMeta, open_store
from ..store.names import BESIDE, MANIFEST
from ..store.shard import ShardJob
from ..store.writer import write_store
from ..tensors.files import Unchanged
from ..tensors.index import TensorInfo, read_index
from ..trace import ProgressCallback
from .in_place import Weights, dtype_name, expected, gguf_in_place, index_in_place, mapped, normalised_names
from .piecewise import Piecewise, is_piecewise

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def find(source: Source, skeleton: Any, codec: Encoding, dtype: torch.dtype, options: LoadOptions) -> Weights | None:
    """What is here already and needs nothing written; ``None`` when there is work to do."""
    if codec.compression == "none" and source.format == "gguf":
        return _gguf(source, skeleton, dtype, options)
    folder, index = source.folder, index_in_place(source, dtype.itemsize) if codec.compression == "none" else None
    if index is None and (codec.compression != "none" or source.format != "safetensors"):
        folder = _folder(source, codec.compression, dtype, options)
        store = _whole(folder)
        index = store.index if store is not None and (folder / "config.json").is_file() else None
    if index is None or codec.compression != "none":
        return None if index is None else Weights(folder, index)
    names = normalised_names(source)
    extra = _whole(_folder(source, BESIDE, dtype, options)) if names else None
    if names and extra is None:
        return None
    tensors, packed = mapped(index, source, skeleton)
    return Weights(folder, {**tensors, **(extra.index if extra else {})}, packed)


@contextmanager
def alone(
    source: Source, codec: Encoding, dtype: torch.dtype, options: LoadOptions, progress: ProgressCallback
) -> Iterator[None]:
    """Be the one that writes what is missing, its download included; another process that is comes first.

    What :func:`find` says may be another thing then.
    """
    in_place = codec.compression == "none" and (
        source.format != "bin" or index_in_place(source, dtype.itemsize) is not None
    )
    if in_place and source.format != "gguf" and not normalised_names(source):
        yield
        return
    folder = _folder(source, BESIDE if in_place else codec.compression, dtype, options)
    with locked(folder, progress):
        _keep_private(folder, source)
        yield


def to_write(
    source: Source, skeleton: Any, codec: Encoding, dtype: torch.dtype, options: LoadOptions, known: Weights | None
) -> int:
    """Bytes in ``dtype`` that :func:`write` puts on the disk beside the compressed store.

    Parameters
    ----------
    known
        What of the checkpoint is read in place, where that is known.
    """
    parameters = skeleton.named_parameters()
    if source.format == "gguf" and (source.gguf_file or source.header) and codec.compression == "none":
        once = gguf_in_place(source, dtype_name(dtype)).rest
        return sum(tensor.numel() * dtype.itemsize for name, tensor in parameters if name in once)
    if source.format == "gguf" or (
        source.format == "bin" and known is None and index_in_place(source, dtype.itemsize) is None
    ):
        done = _is_store(_folder(source, "none", dtype, options))
        return 0 if done else sum(tensor.numel() * tensor.element_size() for _, tensor in parameters)
    once = normalised_names(source)
    if not once or _is_store(_folder(source, BESIDE, dtype, options)):
        return 0
    return sum(tensor.numel() * dtype.itemsize for name, tensor in parameters if name in once)


def write(
    source: Source, skeleton: Any, codec: Encoding, dtype: torch.dtype, options: LoadOptions, progress: ProgressCallback
) -> Weights:
    """Write the store that is missing, from what an earlier start left; the source's files must be here."""
    with hold(source.folder):
        return _write(source, skeleton, codec, dtype, options, progress)


def _write(
    source: Source, skeleton: Any, codec: Encoding, dtype: torch.dtype, options: LoadOptions, progress: ProgressCallback
) -> Weights:
    if source.gguf_file is not None and codec.compression == "none":
        rest, name = gguf_in_place(source, dtype_name(dtype)).rest, dtype_name(dtype)
        write_rest(source.gguf_file, rest, _folder(source, BESIDE, dtype, options), name,
                   _meta(source, codec, dtype), progress)  # fmt: skip
        written = _gguf(source, skeleton, dtype, options)
        assert written is not None
        return written
    once = _folder(source, BESIDE, dtype, options)
    was_there, once_was_there = _is_store(_folder(source, "none", dtype, options)), _is_store(once)
    index, plain = index_in_place(source, dtype.itemsize), source.folder
    if index is None:
        plain = _rewritten(source, dtype, options, progress)
        index = open_store(plain).index  # type: ignore[union-attr]
    tensors, packed = mapped(index, source, skeleton)
    if rows := normalised_names(source):
        tensors |= write_normalised(
            once, tensors, rows, dtype, _meta(source, get_encoding(None), dtype), progress
        ).index
    if codec.compression == "none":
        return Weights(plain, tensors, packed)
    folder = _folder(source, codec.compression, dtype, options)
    own_companions(plain)  # before the weights: what cannot be copied should not cost a conversion first
    jobs = _jobs(tensors, skeleton, codec, dtype)
    beside = functools.partial(copy_companions, plain)
    meta = _meta(source, codec, dtype)
    sources = Unchanged(extent.path for info in tensors.values() for extent in info.extents)
    store = write_store(folder, jobs, meta, progress=progress, beside=beside, origin=source.origin,
                        revision=source.revision or "", unchanged=sources)  # fmt: skip
    if not (folder / "config.json").is_file():  # a store that was finished before these came first
        beside(folder)
    # Written a moment ago, as a step on the way: what it held is in the store now.
    if plain != source.folder and not was_there:
        _discard(plain)
    if once.is_dir() and not once_was_there:
        _discard(once)
    return Weights(folder, store.index)


def write_piecewise(
    source: Source, skeleton: Any, codec: Encoding, dtype: torch.dtype, options: LoadOptions,
    progress: ProgressCallback, headers: Headers, known: Weights | None,
) -> Weights | None:  # fmt: skip
    """As :func:`write`, each file downloaded, encoded and deleted before the next; ``None`` where that is no better."""
    if known is None and is_piecewise(_folder(source, codec.compression, dtype, options)):
        known = expected(source, skeleton, headers)
    pieces = piecewise(source, skeleton, codec, dtype, options, progress, headers, known)
    if pieces is None or not pieces.is_better():
        return None
    store = pieces.write(functools.partial(copy_companions, source.folder))
    return Weights(store.folder, store.index)


def piecewise(
    source: Source, skeleton: Any, codec: Encoding, dtype: torch.dtype, options: LoadOptions,
    progress: ProgressCallback, headers: Headers, known: Weights | None,
) -> Piecewise | None:  # fmt: skip
    """What would write the store from one file of the Hub after the other; ``None`` where that cannot be done."""
    if codec.compression == "none" or source.format == "gguf" or source.repo_id is None or normalised_names(source):
        return None
    if known is None or known.packed:
        return None
    folder, meta = _folder(source, codec.compression, dtype, options), _meta(source, codec, dtype)
    jobs_of = functools.partial(_jobs, skeleton=skeleton, codec=codec, dtype=dtype)
    return Piecewise(source, known.tensors, headers, folder, jobs_of, meta, options, progress)


def _jobs(tensors: Mapping[str, TensorInfo], skeleton: Any, codec: Encoding, dtype: torch.dtype) -> list[ShardJob]:
    untie(skeleton, tensors)
    names, is_exact = [f"{name}.weight" for name in compressible(skeleton)], kept_in_float32(skeleton, dtype)
    exact = [name for name in tensors if is_exact(name)]
    return encode_jobs(tensors, codec, names, dtype, keep=exact, device=skeleton.device)


def _gguf(source: Source, skeleton: Any, dtype: torch.dtype, options: LoadOptions) -> Weights | None:
    """A GGUF file and what was written once beside it; ``None`` if that is not done."""
    folder = _folder(source, BESIDE, dtype, options)
    if source.gguf_file is None or not is_complete(folder, _meta(source, get_encoding(None), dtype)):
        return None
    found, extra = gguf_in_place(source, dtype_name(dtype)), read_index(folder)
    return Weights(folder, map_checkpoint({**found.tensors, **extra}, skeleton), found.packed)


def _is_store(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _whole(folder: Path) -> Store | None:
    """The store, unless shards of it are missing: then it is written again as far as it must be."""
    try:
        return open_store(folder)
    except StoreError as error:
        log.warning("%s", error)
        return None


def _discard(folder: Path) -> None:
    """Remove a step on the way, unless another process reads it or waits to."""
    with suppress(StoreError):
        remove_store(folder)


def _rewritten(source: Source, dtype: torch.dtype, options: LoadOptions, progress: ProgressCallback) -> Path:
    """A folder of plain safetensors, written once from pickles or GGUF."""
    folder, name = _folder(source, "none", dtype, options), dtype_name(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _keep_private(folder, source)
    if source.format == "gguf":
        return convert_gguf(source, folder, name, progress=progress)
    return convert_pickles(source, folder, name, progress=progress)


def _keep_private(folder: Path, source: Source) -> None:
    """Who may not read the weights may not read what is made of them."""
    modes = [status(file).st_mode for file in source.files if file.is_file()]  # or another process deleted it
    closed = 0
    for who, read in ((0o070, stat.S_IRGRP), (0o007, stat.S_IROTH)):
        closed |= 0 if all(mode & read for mode in modes) else who
    if closed:
        folder.chmod(stat.S_IMODE(status(folder).st_mode) & ~closed)


def _folder(source: Source, codec: str, dtype: torch.dtype, options: LoadOptions) -> Path:
    return store_folder(source, codec, dtype_name(dtype), options)


def _meta(source: Source, codec: Encoding, dtype: torch.dtype) -> StoreMeta:
    return StoreMeta(codec.compression, dtype_name(dtype), source.fingerprint)
