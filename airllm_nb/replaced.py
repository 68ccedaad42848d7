"""Folders whose weights were deleted once a store was made of them: which store it is, and the deleting."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from .checkpoint.cached import named, written_beside
from .checkpoint.folder import exclusively
from .checkpoint.journal import write_atomically
from .checkpoint.originals import delete_original
from .checkpoint.source import Source
from .checkpoint.store import Store, open_store
from .config import LoadOptions
from .errors import OptionError, SourceError

log = logging.getLogger(__name__)

# Left in a local folder whose weights were deleted after compression; says where the store is.
POINTER = "airllm_nb_store.json"


def meant(model: str | Path) -> str | Path:
    """The model that is opened by a name: of a folder that was written beside a GGUF file, that file.

    Raises
    ------
    SourceError
        If the file is not here any more, or was not noted.
    """
    folder = Path(model).expanduser()
    beside = written_beside(folder) if str(model).strip() and folder.is_dir() else None
    if beside is None:
        return model
    if beside.endswith(".gguf") and Path(beside).is_file():
        log.info("%s was written beside %s, which is opened", folder, beside)
        return Path(beside)
    what, remedy = (named(beside), "name that file") if beside else ("a checkpoint", "name that checkpoint")
    raise SourceError(f"{folder} holds only what was written beside {what}; {remedy}")


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


def replace_original(source: Source, folder: Path) -> None:
    """Delete the source's weight files, every byte of the store in ``folder`` verified first."""
    store = open_store(folder)
    if store is None or not source.files:
        return
    with exclusively(source.folder) as is_free:
        if not is_free:
            log.warning("%s is read by another process or model: the original weights stay; load again with "
                        "delete_original=True once it has ended", source.folder)  # fmt: skip
            return
        deleted = delete_original(store, source.files)
        log.info("deleted %d original weight files; %s replaces them", len(deleted), store.folder)
        if source.repo_id is None:
            write_atomically(source.folder / POINTER, json.dumps({"store": str(store.folder)}).encode())
