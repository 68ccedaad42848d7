"""Where a model's bytes come from: the checkpoint's own files, or a store that is found, or written once."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.codec import Codec, compressible, get_codec
from .checkpoint.convert import delete_original, encode_jobs
from .checkpoint.encoded import TORCH_DTYPES
from .checkpoint.gguf import convert_gguf
from .checkpoint.hub_headers import Headers
from .checkpoint.index import TensorInfo, read_header, read_index
from .checkpoint.journal import write_atomically
from .checkpoint.layout import Choice, companions
from .checkpoint.legacy.families import native_tensors, normalised
from .checkpoint.legacy.normalised import write_normalised
from .checkpoint.mapping import map_checkpoint
from .checkpoint.pickles import convert_pickles, load_pickle
from .checkpoint.source import Source, read_config, store_folder
from .checkpoint.store import MANIFEST, Store, StoreMeta, open_store, write_store
from .config import LoadOptions
from .errors import OptionError
from .model.skeleton import kept_in_float32
from .trace import ProgressCallback

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Left in a local folder whose weights were deleted after compression; says where the store is.
POINTER = "airllm_nb_store.json"
# In the name of the folder where the weights are that are written once beside a checkpoint that is read in place.
NORMALISED = "normalised"


@dataclass(frozen=True)
class Weights:
    """Where to read: config and tokenizer from ``folder``, parameters from ``tensors`` (by native name)."""

    folder: Path
    tensors: Mapping[str, TensorInfo]


def opened_store(model: str | Path, options: LoadOptions) -> Store | None:
    """The store that ``model`` names directly: its own folder, or a folder whose weights it replaced.

    Raises
    ------
    OptionError
        If another compression was asked for than the store has.
    """
    folder = Path(model).expanduser()
    if not str(model).strip():
        return None  # the source room says what is wrong
    if (folder / POINTER).is_file() and not any(folder.glob("*.safetensors")):
        folder = Path(json.loads((folder / POINTER).read_text(encoding="utf-8"))["store"])
    store = open_store(folder) if folder.is_dir() else None
    if store is None or store.meta.codec == "none":
        return None
    if options.compression not in (None, store.meta.codec):
        raise OptionError(f"{folder} is compressed as {store.meta.codec!r}, compression={options.compression!r} was "
                          "asked for; leave the option out, or load the original model")  # fmt: skip
    return store


def stored_dtype(source: Source, headers: Headers) -> torch.dtype | None:
    """The dtype of the first weights of floating point, as transformers chooses; ``None`` where that says nothing."""
    if source.format == "bin" and source.files:
        return next((t.dtype for t in load_pickle(source.files[0]).values() if t.is_floating_point()), None)
    if source.format != "safetensors":
        return None
    if source.files:
        first = read_header(source.files[0])
    else:
        first = dict(headers.by_file[source.folder / source.wanted[0]]) if headers.by_file else {}
    dtypes = (TORCH_DTYPES[info.dtype] for info in first.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def find(source: Source, skeleton: Any, codec: Codec, dtype: torch.dtype, options: LoadOptions) -> Weights | None:
    """What is here already and needs nothing written; ``None`` when there is work to do."""
    if codec.name == "none" and source.format == "safetensors":
        index, folder = read_index(source.folder) if source.files else None, source.folder
    else:
        folder = _folder(source, codec.name, dtype, options)
        store = open_store(folder)
        index = store.index if store is not None and (folder / "config.json").is_file() else None
    if index is None or codec.name != "none":
        return None if index is None else Weights(folder, index)
    names = normalised_names(source)
    extra = open_store(_folder(source, NORMALISED, dtype, options)) if names else None
    if names and extra is None:
        return None
    return Weights(folder, {**_mapped(index, source, skeleton), **(extra.index if extra else {})})


def expected(source: Source, skeleton: Any, headers: Headers) -> dict[str, TensorInfo] | None:
    """The parameters of safetensors that are read in place, once what is missing is here; ``None`` where unknown.

    Those that are written once are left out.

    Raises
    ------
    UnsupportedModelError
        If the checkpoint's layout cannot be streamed.
    """
    here = source.format == "safetensors" and source.files
    index = read_index(source.folder) if here else headers.index
    if index is None:
        return None
    once = normalised_names(source)
    return {name: info for name, info in _mapped(index, source, skeleton).items() if name not in once}


def to_write(source: Source, skeleton: Any, dtype: torch.dtype, options: LoadOptions) -> int:
    """Bytes in ``dtype`` that :func:`write` puts on the disk beside the compressed store."""
    parameters = skeleton.named_parameters()
    if source.format != "safetensors":
        done = _is_store(_folder(source, "none", dtype, options))
        return 0 if done else sum(tensor.numel() * tensor.element_size() for _, tensor in parameters)
    once = normalised_names(source)
    if not once or _is_store(_folder(source, NORMALISED, dtype, options)):
        return 0
    return sum(tensor.numel() * dtype.itemsize for name, tensor in parameters if name in once)


def write(
    source: Source, skeleton: Any, codec: Codec, dtype: torch.dtype, options: LoadOptions, progress: ProgressCallback
) -> Weights:
    """Write the store that is missing, from what an earlier start left; the source's files must be here."""
    once = _folder(source, NORMALISED, dtype, options)
    was_there, once_was_there = _is_store(_folder(source, "none", dtype, options)), _is_store(once)
    plain = _plain(source, dtype, options, progress)
    index = open_store(plain).index if plain != source.folder else read_index(plain)  # type: ignore[union-attr]
    tensors = _mapped(index, source, skeleton)
    if rows := normalised_names(source):
        tensors |= write_normalised(once, tensors, rows, dtype, _meta(source, get_codec(None), dtype), progress).index
    if codec.name == "none":
        return Weights(plain, tensors)
    folder = _folder(source, codec.name, dtype, options)
    names, is_exact = [f"{name}.weight" for name in compressible(skeleton)], kept_in_float32(skeleton, dtype)
    exact = [name for name in tensors if is_exact(name)]
    jobs = encode_jobs(tensors, codec, names, dtype, keep=exact, device=skeleton.device)
    store = write_store(folder, jobs, _meta(source, codec, dtype), progress=progress)
    _copy_companions(plain, folder)
    # Written a moment ago, as a step on the way: what it held is in the store now.
    if plain != source.folder and not was_there:
        shutil.rmtree(plain)
    if once.is_dir() and not once_was_there:
        shutil.rmtree(once)
    return Weights(folder, store.index)


def _mapped(index: Mapping[str, TensorInfo], source: Source, skeleton: Any) -> dict[str, TensorInfo]:
    """The parameters by native name, whatever names and layout the checkpoint has."""
    native = index if source.gguf_file is not None else native_tensors(index, read_config(source))
    return map_checkpoint(native, skeleton)


def normalised_names(source: Source) -> tuple[str, ...]:
    """Weights that are written once with rows of length 1, whatever the checkpoint's format."""
    return () if source.gguf_file is not None else normalised(read_config(source))


def _is_store(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _plain(source: Source, dtype: torch.dtype, options: LoadOptions, progress: ProgressCallback) -> Path:
    """A folder of plain safetensors: the source's own, or one written once from pickles or GGUF."""
    if source.format == "safetensors":
        return source.folder
    folder, name = _folder(source, "none", dtype, options), str(dtype).removeprefix("torch.")
    if source.format == "gguf":
        return convert_gguf(source, folder, name, progress=progress)
    return convert_pickles(source, folder, name, progress=progress)


def _folder(source: Source, codec: str, dtype: torch.dtype, options: LoadOptions) -> Path:
    return store_folder(source, codec, str(dtype).removeprefix("torch."), options)


def _meta(source: Source, codec: Codec, dtype: torch.dtype) -> StoreMeta:
    return StoreMeta(codec.name, str(dtype).removeprefix("torch."), source.fingerprint)


def _copy_companions(plain: Path, folder: Path) -> None:
    """Config and tokenizer beside the weights: the store is a model of its own. config.json comes last."""
    names = [
        path.relative_to(plain).as_posix() for path in plain.rglob("*") if path.is_file() and path.name != MANIFEST
    ]
    for name in sorted(companions(names, Choice("safetensors", None, ())), key=lambda name: name == "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, (plain / name).read_bytes())


def replace_original(source: Source, folder: Path) -> None:
    """Delete the source's weight files, every byte of the store in ``folder`` verified first."""
    store = open_store(folder)
    if store is None or not source.files:
        return
    deleted = delete_original(store, source.files)
    log.info("deleted %d original weight files; %s replaces them", len(deleted), store.folder)
    if source.repo_id is None:
        write_atomically(source.folder / POINTER, json.dumps({"store": str(store.folder)}).encode())
