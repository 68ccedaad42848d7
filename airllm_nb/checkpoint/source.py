"""A model's name → local files: a Hub id, a folder or a GGUF file. Nothing of the weights is read."""

from __future__ import annotations

import glob
import logging
import os
import re
from pathlib import Path
from typing import Any

from ..config import LoadOptions, cache_dir
from ..disk import expanded, status
from ..errors import CheckpointError, SourceError
from ..store.listing import cached_stores
from ..store.names import StoreName
from ..tensors.inside import inside
from ..trace import ProgressCallback, silent
from .foreign import refuse_foreign
from .gguf.split import whole_name
from .hub.errors import unreachable
from .hub.repository import CheckConfig, Snapshot, fetch, offline
from .identity import by_commit, by_contents, stored
from .local import Source, checked, clean_name, here, read_config
from .picks import Room

log = logging.getLogger(__name__)

__all__ = ["Source", "read_config", "resolve", "store_folder"]

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_HUB_GGUF = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)[:/](.+\.gguf)")


def resolve(
    model: str | Path,
    options: LoadOptions,
    *,
    progress: ProgressCallback = silent,
    weights: bool = True,
    check_config: CheckConfig | None = None,
    room: Room | None = None,
) -> Source:
    """Find a model on this machine, or download it.

    Parameters
    ----------
    model
        Hub id (``"org/name"``), local folder, either with ``":file.gguf"`` behind it to name one of several, or a
        ``.gguf`` file.
    weights
        ``False`` brings only config, tokenizer and index: enough for a plan.
    check_config
        Called with config.json's content before any weight is downloaded; raises to refuse the model.
    room
        What the machine has, to choose among several files: see :func:`~airllm_nb.checkpoint.picks.pick`.

    Raises
    ------
    SourceError
        If the model cannot be found, reached or downloaded.
    CheckpointError
        If what is there is no complete checkpoint.
    """
    text = os.fspath(model)
    if not text.strip():
        raise SourceError("no model is named; give a Hub id such as org/name, a local folder, or a .gguf file")
    check = _with_foreign(check_config, text)
    found = here(text, check, room or Room())
    if found is None:
        if "://" in text:
            raise SourceError(f"{text} is a web address; give the part after the host, as org/name, or a local folder")
        found = _on_hub(text, options, progress, weights, check, room)
    elif options.revision is not None:
        raise SourceError(f"{text} is on this machine and has no revision {options.revision!r}: those are of the Hub; "
                          "leave the revision out, or name the repository")  # fmt: skip
    if found.why:
        log.info("%s", found.why)
    return found


def _on_hub(
    text: str, options: LoadOptions, progress: ProgressCallback, weights: bool, check: CheckConfig | None,
    room: Room | None,
) -> Source:  # fmt: skip
    """A repository; where its weights are not here and the Hub is not asked, the store that was made of it."""
    repo_id, gguf = _hub_name(text)
    try:
        snapshot = fetch(repo_id, options, progress=progress, weights=weights, check_config=check, gguf=gguf, room=room)
        found = _from_hub(repo_id, snapshot, options, weights)
    except (SourceError, CheckpointError) as error:
        is_asked = not (options.local_files_only or offline() or isinstance(error.__cause__, unreachable()))
        store = None if weights or is_asked else _from_store(repo_id, gguf, options)
        if store is None:
            raise
        return checked(store, check)
    if snapshot.missing is None and not found.files:
        found = _from_store(repo_id, gguf, options, found.wanted) or found
    return checked(found, check)


def _hub_name(text: str) -> tuple[str, str | None]:
    """The repository, and the GGUF file in it where one is named."""
    if named := _HUB_GGUF.fullmatch(text):
        return named[1], named[2]
    repo_id, _, rest = text.partition(":")
    if rest and HUB_ID.fullmatch(repo_id):
        raise SourceError(f"{text}: {rest!r} is no file; name one as {repo_id}:FILE.gguf, or {repo_id} alone to take "
                          "what suits this machine")  # fmt: skip
    if not HUB_ID.fullmatch(text) or text.endswith((".gguf", ".safetensors", ".bin")):
        where = expanded(text).absolute()
        raise SourceError(f"there is no file or folder {where}, and {text!r} is no Hub id; check the path")
    return text, None


def _with_foreign(check_config: CheckConfig | None, where: str) -> CheckConfig | None:
    """The caller's check, after the refusal of what another program packed."""
    if check_config is None:
        return None

    def check(config: dict[str, Any]) -> None:
        refuse_foreign(config, where)
        check_config(config)

    return check


def store_folder(source: Source, codec_name: str | None, dtype: str, options: LoadOptions) -> Path:
    """Where the store of this source goes: one readable, unique name below the user's folder or the cache."""
    # Absolute: the working directory may be another when the weights are read.
    base = Path(options.layer_shards_saving_path or cache_dir()).absolute()
    return base / str(StoreName(source.name, codec_name or "none", dtype, source.fingerprint[:8]))


def _from_store(repo_id: str, gguf: str | None, options: LoadOptions, *weights: tuple[str, ...]) -> Source | None:
    """A store stands for its repository: config and tokenizer lie in it, and its fingerprint leads to it."""
    store = stored(repo_id, gguf, options, *weights)
    if store is None:
        return None
    log.info("the weights of %s are not here and the Hub is not asked; %s was made of them", repo_id, store.folder)
    return Source(store.model, store.folder, "safetensors", (), store.nbytes, store.source, repo_id=repo_id)


def _from_hub(repo_id: str, snapshot: Snapshot, options: LoadOptions, weights: bool) -> Source:
    files = tuple(inside(snapshot.folder, name) for name in snapshot.weights)
    missing = [file.name for file in files if not file.is_file()]
    if missing and weights:
        raise SourceError(f"{repo_id}: {missing[0]} is not in the local cache ({len(missing)} of {len(files)} weight "
                          "files missing); load it once with a connection")  # fmt: skip
    kind = snapshot.choice.format
    gguf = files[0] if kind == "gguf" else None
    folder = (snapshot.header or gguf).parent if gguf else snapshot.folder
    name = clean_name(Path(whole_name(gguf.name)).stem if gguf else repo_id.split("/")[-1])
    return Source(
        name=name,
        folder=folder,
        format=kind,
        files=() if missing else files,
        nbytes=snapshot.nbytes or (0 if missing else sum(status(file).st_size for file in files)),
        fingerprint=_fingerprint(name, repo_id, snapshot, options),
        gguf_file=None if missing else gguf,
        repo_id=repo_id,
        revision=snapshot.commit,
        wanted=snapshot.weights,
        missing=snapshot.missing if missing else 0,
        header=snapshot.header,
        why=snapshot.choice.why,
    )


def _fingerprint(name: str, repo_id: str, snapshot: Snapshot, options: LoadOptions) -> str:
    """By what is in the files, unless a store of an earlier version is there, which has the commit's."""
    base = Path(options.layer_shards_saving_path or cache_dir())
    old = by_commit(repo_id, snapshot.commit, snapshot.weights)
    new = by_contents(repo_id, snapshot.contents, snapshot.weights)
    if not new:  # a cache without links does not say it, but a store may know its commit
        finished = (store for store in cached_stores(base.absolute()) if store.state == "finished")
        same = (store for store in finished if store.source.isalnum())  # it becomes part of a path
        named = repo_id, snapshot.commit, name
        return next((store.source for store in same if (store.origin, store.revision, store.model) == named), old)
    # Without compression the store is called none or normalised.
    of_this = f"{glob.escape(name)}--{options.compression or 'no*'}--*--"
    has_old, has_new = (any(base.glob(of_this + said[:8])) for said in (old, new))
    return old if has_old and not has_new else new
