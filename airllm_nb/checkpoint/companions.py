"""Config, tokenizer and templates are copied into a store, so that it is a model of its own; nothing else is.

A link is not followed out of the folder: what it leads to need not be part of the model, and the store may be open to
more people. Copies are open to no more than the files were.
"""

from __future__ import annotations

import logging
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from ..config import format_bytes
from ..disk import MOST_BYTES, entries, read_bytes, status
from ..errors import CheckpointError
from ..store.atomic import write_atomically
from ..store.names import MANIFEST, POINTER
from ..tensors.index import BIN_INDEX_FILE, INDEX_FILE
from ..tensors.inside import inside
from .originals import is_own

log = logging.getLogger(__name__)

CONFIG = "config.json"
_TEMPLATES = "additional_chat_templates"
# Besides the weights: config, tokenizer, templates. Never code, and no weights of another framework.
_COMPANIONS = re.compile(r"[^/]+\.(json|jinja|txt|model|tiktoken)|additional_chat_templates/[^/]+\.jinja")
# Megabytes of a training's history.
_NOT_NEEDED = {"trainer_state.json"}


def companions(names: Iterable[str], index: str | None = None) -> tuple[str, ...]:
    """The small files beside the weights: config, tokenizer, templates and the ``index`` that names the weights."""
    unwanted = ({INDEX_FILE, BIN_INDEX_FILE} - {index}) | _NOT_NEEDED
    return tuple(sorted(name for name in names if _COMPANIONS.fullmatch(name) and name not in unwanted))


def own_companions(folder: Path) -> list[str]:
    """The names of what is copied, config.json last.

    Raises
    ------
    CheckpointError
        If config.json is a link out of the folder.
    """
    above, templates = entries(folder), folder / _TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        above += entries(templates)
    names = [path.relative_to(folder).as_posix() for path in above if path.name not in (MANIFEST, POINTER)]
    found = [name for name in companions(names) if _is_copied(folder, name)]
    return sorted(found, key=lambda name: name == CONFIG)


def copy_companions(folder: Path, target: Path) -> None:
    """Copy them into ``target``, each whole or not at all."""
    for name in own_companions(folder):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_small(inside(folder, name), inside(target, name))


def copy_small(path: Path, target: Path) -> None:
    """Copy one small file, for at most those who may read it."""
    write_atomically(target, read_bytes(path), stat.S_IMODE(status(path).st_mode) & 0o777)


def _is_copied(folder: Path, name: str) -> bool:
    path = inside(folder, name)
    if not path.is_file():
        return False  # nothing, or a pipe or a device that somebody named so
    if not is_own(path) and path.resolve().parent != folder.resolve():
        what = f"{path} is a link to {path.resolve()}, outside of the model's folder"
        if name == CONFIG:
            raise CheckpointError(f"{what}, and is not copied into a store; put the file itself there, or load the "
                                  "model without compression")  # fmt: skip
        log.warning("%s: it is not copied into the store", what)
        return False
    if (nbytes := status(path).st_size) > MOST_BYTES:
        log.warning("%s has %s, more than any config or tokenizer: it is not copied into the store", path,
                    format_bytes(nbytes))  # fmt: skip
        return False
    return True
