"""What must be written before a model can run: whether it is here, how many bytes it would be, and the writing."""

from __future__ import annotations

import functools
import logging
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.companions import copy_companions, own_companions
from ..checkpoint.source import Source
from ..disk import status
from ..encoding.base import Encoding
from ..errors import StoreError
from ..model.placing import compressible, merged_experts
from ..model.skeleton import kept_in_float32, other_shape
from ..model.tying import untie
from ..store.jobs import encode_jobs
from ..store.listing import remove_store
from ..store.locks import Hold, locked
from ..store.manifest import Store, open_store
from ..store.names import BESIDE, MANIFEST, expert_name, expert_of
from ..store.shard import ShardJob
from ..store.writer import write_store
from ..tensors.files import Unchanged
from ..tensors.index import TensorInfo
from .containers.container import Weights
from .piecewise import Piecewise, is_piecewise
from .prepared import Prepared

log = logging.getLogger(__name__)

# In the place of a codec: of a store of plain weights.
WHOLE = "none"


def find(prepared: Prepared) -> Weights | None:
    """The weights, if all are here and nothing needs to be written; ``None`` when there is work to do."""
    kind = prepared.codec.compression
    if prepared.to_write.encoded:
        store = _whole(prepared.store(kind))
        return Weights(store.folder, store.index) if store and _has_config(store.folder) else None
    plain = _plain(prepared)
    if plain is None or not prepared.to_write.once:
        return plain
    beside = _whole(prepared.store(BESIDE))
    if beside is None:
        return None
    # Of a GGUF file config and tokenizer are there too.
    folder = beside.folder if _has_config(beside.folder) else plain.folder
    return Weights(folder, {**plain.tensors, **beside.index}, plain.packed)


def _plain(prepared: Prepared) -> Weights | None:
    """What is read in place of files that are here, or in the store of plain weights that was made of them."""
    container, skeleton = prepared.container, prepared.skeleton
    if not prepared.to_write.whole:
        return container.in_place(skeleton) if prepared.source.files else None
    store = _whole(prepared.store(WHOLE))
    plain = container.native(store.index, skeleton) if store and _has_config(store.folder) else None
    return Weights(store.folder, plain.tensors, plain.packed) if store and plain else None


def bytes_once(prepared: Prepared) -> int:
    """Bytes of plain weights that :func:`write` puts on the disk, beside a compressed store."""
    is_whole, once, _ = prepared.to_write
    if (not is_whole and not once) or _is_store(prepared.store(WHOLE if is_whole else BESIDE)):
        return 0
    parameters = prepared.skeleton.named_parameters()
    if is_whole:
        return sum(tensor.numel() * tensor.element_size() for _, tensor in parameters)
    return sum(tensor.numel() * prepared.dtype.itemsize for name, tensor in parameters if name in once)


@contextmanager
def alone(prepared: Prepared) -> Iterator[None]:
    """Be the one that writes what is missing, its download included; another process that is comes first.

    What :func:`find` says may be another thing then.
    """
    is_whole, once, is_encoded = prepared.to_write
    if not (is_whole or once or is_encoded):
        yield
        return
    folder = prepared.store(prepared.codec.compression if is_whole or is_encoded else BESIDE)
    with locked(folder, prepared.progress):
        _keep_private(folder, prepared.source)
        yield


def write(prepared: Prepared) -> Weights:
    """Write the stores that are missing, from what an earlier start left; the source's files must be here."""
    whole, beside = prepared.store(WHOLE), prepared.store(BESIDE)
    steps = [folder for folder in (whole, beside) if not _is_store(folder)]
    with Hold(prepared.source.folder):
        plain = _write_plain(prepared, whole, beside)
        if not prepared.to_write.encoded:
            return plain
        store = _encode(prepared, plain)
    for folder in steps:  # written a moment ago, as a step on the way: what it held is in the store now
        if folder.is_dir():
            _discard(folder)
    return Weights(store.folder, store.index)


def _write_plain(prepared: Prepared, whole: Path, beside: Path) -> Weights:
    container, dtype, progress = prepared.container, prepared.dtype, prepared.progress
    is_whole, once, _ = prepared.to_write
    if is_whole:
        whole.mkdir(parents=True, exist_ok=True)
        _keep_private(whole, prepared.source)
        container.rewrite(whole, (), {}, dtype, progress)
    plain = _plain(prepared)
    assert plain is not None, "its files are here"
    if not once:
        return plain
    container.rewrite(beside, once, plain.tensors, dtype, progress)
    extra = _whole(beside)
    assert extra is not None, "it was written"
    return Weights(beside if _has_config(beside) else plain.folder, {**plain.tensors, **extra.index}, plain.packed)


def _encode(prepared: Prepared, plain: Weights) -> Store:
    own_companions(plain.folder)  # before the weights: what cannot be copied should not cost a conversion first
    jobs = store_jobs(plain.tensors, prepared.skeleton, prepared.codec, prepared.dtype)
    source = prepared.source
    beside = functools.partial(copy_companions, plain.folder)
    sources = Unchanged(extent.path for info in plain.tensors.values() for extent in info.extents)
    store = write_store(prepared.store(prepared.codec.compression), jobs, prepared.meta, progress=prepared.progress,
                        beside=beside, origin=source.origin, revision=source.revision or "",
                        unchanged=sources)  # fmt: skip
    if not _has_config(store.folder):  # of a finished store somebody deleted it
        beside(store.folder)
    return store


def write_piecewise(prepared: Prepared) -> Weights | None:
    """As :func:`write`, each file downloaded, encoded and deleted before the next; ``None`` where that is no better."""
    if prepared.known is None and is_piecewise(prepared.store(prepared.codec.compression)):
        prepared.known = prepared.container.in_place(prepared.skeleton)
    pieces = piecewise(prepared)
    if pieces is None or not pieces.is_better():
        return None
    store = pieces.write(functools.partial(copy_companions, prepared.source.folder))
    return Weights(store.folder, store.index)


def piecewise(prepared: Prepared) -> Piecewise | None:
    """What would write the store from one file of the Hub after the other; ``None`` where that cannot be done."""
    source, known, (is_whole, once, is_encoded) = prepared.source, prepared.known, prepared.to_write
    if not is_encoded or is_whole or once or source.repo_id is None or known is None or known.packed:
        return None
    jobs_of = functools.partial(_jobs, skeleton=prepared.skeleton, codec=prepared.codec, dtype=prepared.dtype)
    tensors = _experts_apart(known.tensors, prepared.skeleton)
    return Piecewise(source, tensors, prepared.headers, prepared.store(prepared.codec.compression), jobs_of,
                     prepared.meta, prepared.options, prepared.progress)  # fmt: skip


def store_jobs(tensors: Mapping[str, TensorInfo], skeleton: Any, codec: Encoding, dtype: torch.dtype) -> list[ShardJob]:
    """What writes the compressed store of a model.

    Parameters
    ----------
    tensors
        Its weights by native name.
    """
    return _jobs(_experts_apart(tensors, skeleton), skeleton, codec, dtype)


def _experts_apart(tensors: Mapping[str, TensorInfo], skeleton: Any) -> dict[str, TensorInfo]:
    """The tensors, those of modules whose experts are compressed apart: all that one expert has, and then the next."""
    counts = {name: len(skeleton.get_parameter(name)) for name in merged_experts(skeleton)}
    rest, experts = dict(tensors), dict[str, dict[str, TensorInfo]]()
    for path in dict.fromkeys(name.rpartition(".")[0] for name in counts):
        for attribute, parameter in skeleton.get_submodule(path)._parameters.items():
            name = f"{path}.{attribute}"
            is_of_each = parameter is not None and parameter.ndim > 1 and len(parameter) in counts.values()
            if not is_of_each or (info := rest.pop(name, None)) is None:
                continue
            if tuple(info.shape) != tuple(parameter.shape):
                raise other_shape(name, info, parameter)
            for number, one in enumerate(info.apart()):
                key = expert_name(path, number, f"{attribute}.weight" if name in counts else attribute)
                experts.setdefault(expert_of(key), {})[key] = one
    return rest | {name: info for each in experts.values() for name, info in each.items()}


def _jobs(tensors: Mapping[str, TensorInfo], skeleton: Any, codec: Encoding, dtype: torch.dtype) -> list[ShardJob]:
    untie(skeleton, tensors)
    names, is_exact = [f"{name}.weight" for name in compressible(skeleton)], kept_in_float32(skeleton, dtype)
    for name in merged_experts(skeleton):
        path, _, attribute = name.rpartition(".")
        count = len(skeleton.get_parameter(name))
        names += [expert_name(path, number, f"{attribute}.weight") for number in range(count)]
    exact = [name for name in tensors if is_exact(name)]
    return encode_jobs(tensors, codec, names, dtype, keep=exact, device=skeleton.device)


def _is_store(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


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


def _keep_private(folder: Path, source: Source) -> None:
    """Who may not read the weights may not read what is made of them."""
    modes = [status(file).st_mode for file in source.files if file.is_file()]  # or another process deleted it
    closed = 0
    for who, read in ((0o070, stat.S_IRGRP), (0o007, stat.S_IROTH)):
        closed |= 0 if all(mode & read for mode in modes) else who
    if closed:
        folder.chmod(stat.S_IMODE(status(folder).st_mode) & ~closed)
