"""An adapter's name → its files: a folder, or a repository on the Hub whose small files come first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...config import LoadOptions, cache_dir
from ...disk import entries, expanded, status
from ...errors import CheckpointError, SourceError, StoreError
from ...progress import ProgressCallback
from ...store.atomic import write_atomically
from ...store.names import ADAPTER, ADAPTERS, StoreName
from ...tensors.index import Extent, TensorInfo, read_header
from ..hub.errors import explained, unreachable
from ..hub.headers import Headers
from ..hub.repository import HUB_ID, Repository, offline
from ..source import Source

CONFIG_FILE = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MAKE_ONE = "name the folder that peft's save_pretrained wrote"


@dataclass(frozen=True)
class AdapterFiles:
    """Where an adapter is: its config is here, its weights may still be on the Hub.

    ``repo_id``, ``commit`` and ``nbytes`` are those of a repository that was asked.
    """

    name: str
    folder: Path
    weights: Path
    repo_id: str | None = None
    commit: str | None = None
    nbytes: int = 0


def find_adapter(adapter: str | Path, options: LoadOptions) -> AdapterFiles:
    """Find an adapter by folder or Hub id; of the latter the config is downloaded.

    Raises
    ------
    SourceError
        If it cannot be found or reached.
    CheckpointError
        If what is there is no adapter.
    """
    text, path = str(adapter), expanded(adapter)
    if path.is_dir():
        path = path.absolute()
        return AdapterFiles(path.name, path, path / _choose({file.name for file in entries(path)}, path))
    if path.is_file():
        raise SourceError(f"the adapter {path} is a file; name the folder that holds {CONFIG_FILE}: {path.parent}")
    if not HUB_ID.fullmatch(text):
        raise SourceError(f"there is no adapter folder {path.absolute()}, and {text!r} is no Hub id; check the path")
    from huggingface_hub import hf_hub_download

    # The revision is the model's.
    options = replace(options, revision=None)
    if options.local_files_only or offline():
        return _cached(text, "local_files_only=True or HF_HUB_OFFLINE")
    with explained(text, options):
        try:
            repo = Repository(text, options)
            weights = _choose(set(repo.sizes), text)
            # Under the branch's own name, so that the cache knows it when offline.
            folder = Path(hf_hub_download(text, CONFIG_FILE, token=options.hf_token)).parent
            return AdapterFiles(text, folder, folder / weights, text, folder.name, repo.sizes[weights])
        except unreachable() as error:
            try:
                return _cached(text, "no connection")
            except (SourceError, CheckpointError):
                raise error from None


def read_tensors(
    files: AdapterFiles, options: LoadOptions, progress: ProgressCallback, weights: bool
) -> Mapping[str, TensorInfo]:
    """The adapter's tensors by name; downloads the file, or of a file on the Hub, without ``weights``, the header."""
    if not files.weights.is_file() and files.repo_id is not None:
        known = None if weights else _headers(files, options, progress)
        if known is not None:
            return known
        options = replace(options, revision=files.commit)
        with explained(files.repo_id, options):
            Repository(files.repo_id, options).snapshot((files.weights.name,))
    if files.weights.suffix == ".safetensors":
        return read_header(files.weights)
    return _unpickled(files.weights, options, weights)


def _choose(names: set[str], where: str | Path) -> str:
    if CONFIG_FILE not in names:
        what = "a model, not an adapter" if "config.json" in names else f"no {CONFIG_FILE}"
        raise CheckpointError(f"the adapter {where} holds {what}; {_MAKE_ONE}"
                              + _below(where, names))  # fmt: skip
    for name in WEIGHTS:
        if name in names:
            return name
    raise CheckpointError(f"the adapter {where} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}; the download is not "
                          f"complete, or {_MAKE_ONE}")  # fmt: skip


def _below(where: str | Path, names: set[str]) -> str:
    """Where an adapter with a name of its own was saved: in a folder below."""
    found = [name for name in names if name.endswith(f"/{CONFIG_FILE}")]
    if isinstance(where, Path):
        found = [str(path) for path in where.glob(f"*/{CONFIG_FILE}")]
    return f" (there is {min(found)})" if found else ""


def _cached(repo_id: str, why: str) -> AdapterFiles:
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, CONFIG_FILE)
    if not isinstance(config, str):
        raise SourceError(f"the adapter {repo_id} is no folder here and not in the local cache "
                          f"({constants.HF_HUB_CACHE}), and the Hub is not asked ({why}); download it once with a "
                          "connection, or name a local folder")  # fmt: skip
    folder = Path(config).parent
    return AdapterFiles(repo_id, folder, folder / _choose({file.name for file in entries(folder)}, repo_id))


def _headers(files: AdapterFiles, options: LoadOptions, progress: ProgressCallback) -> Mapping[str, TensorInfo] | None:
    if files.weights.suffix != ".safetensors":
        return None
    source = Source(files.name, files.folder, "safetensors", (), files.nbytes, "", None, files.repo_id, files.commit,
                    (files.weights.name,))  # fmt: skip
    found = Headers(source, options, progress).by_file
    return None if found is None else found[files.weights]


def _unpickled(file: Path, options: LoadOptions, weights: bool) -> Mapping[str, TensorInfo]:
    """The tensors of a ``.bin`` file; with ``weights`` written once as safetensors, so that they lie at offsets."""
    from safetensors.torch import save

    from ...tensors.dtypes import DTYPE_NAMES
    from ..bin.pickles import load_pickle

    state = status(file)
    key = hashlib.sha256(f"{file} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(options.layer_shards_saving_path or cache_dir()) / ADAPTERS
    copy = folder / str(StoreName(file.parent.name, ADAPTER, "", key))
    if copy.is_file():
        return read_header(copy)
    tensors = load_pickle(file)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{file}: tensor {name!r} is {tensor.dtype}; save the adapter again with a newer peft"
            )
    if not weights:
        return {
            name: TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), (Extent(file, 0, tensor.nbytes),))
            for name, tensor in tensors.items()
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        write_atomically(copy, save(plain, metadata={"origin": str(file)}))
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error}); name another folder: "
                         "layer_shards_saving_path") from None  # fmt: skip
    return read_header(copy)
