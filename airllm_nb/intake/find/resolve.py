"""A model's name → local files: a Hub id, a folder or a GGUF file. Nothing of the weights is read."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from ...checkpoint.hub.errors import unreachable
from ...checkpoint.hub.repository import HUB_ID, offline
from ...checkpoint.source import Source
from ...config import LoadOptions
from ...disk import expanded
from ...errors import CheckpointError, SourceError
from ...progress import ProgressCallback, silent
from ...tensors.inside import inside
from .foreign import refuse_foreign
from .hub import fetch
from .identity import stored
from .local import CheckConfig, checked, local_source
from .picks import Room

log = logging.getLogger(__name__)

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
        What the machine has, to choose among several files: see :func:`~airllm_nb.intake.find.picks.pick`.

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
    found = local_source(text, check, room or Room())
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
        found = fetch(repo_id, options, progress=progress, weights=weights, check_config=check, gguf=gguf, room=room)
        if weights and not found.files:
            missing = [name for name in found.wanted if not inside(found.folder, name).is_file()]
            raise SourceError(f"{repo_id}: {Path(missing[0]).name} is not in the local cache ({len(missing)} of "
                              f"{len(found.wanted)} weight files missing); load it once with a connection")  # fmt: skip
    except (SourceError, CheckpointError) as error:
        is_asked = not (options.local_files_only or offline() or isinstance(error.__cause__, unreachable()))
        store = None if weights or is_asked else _from_store(repo_id, gguf, options)
        if store is None:
            raise
        return checked(store, check)
    if found.missing is None:
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


def _from_store(repo_id: str, gguf: str | None, options: LoadOptions, *weights: tuple[str, ...]) -> Source | None:
    """A store stands for its repository: config and tokenizer lie in it, and its fingerprint leads to it."""
    store = stored(repo_id, gguf, options, *weights)
    if store is None:
        return None
    log.info("the weights of %s are not here and the Hub is not asked; %s was made of them", repo_id, store.folder)
    return Source(store.model, store.folder, "safetensors", (), store.nbytes, store.source, repo_id=repo_id)
