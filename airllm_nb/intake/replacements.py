"""What says that a store took the place of weight files: a record in our own cache, and a pointer beside them.

The record is what counts. The pointer lies in the model's folder, so whoever made that folder may have written it: it
says that weights were deleted there, and names the store for people and for tools; nothing is deleted by its word, and
no other place is opened by it, unless a store lies there that is ours and says itself that it was made of this folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config import cache_dir
from ..disk import read_json, status
from ..errors import FileError
from ..store.atomic import write_atomically
from ..store.listing import origin_of
from ..store.names import POINTER
from ..tensors.inside import inside
from .find.local import digest

log = logging.getLogger(__name__)

# Below the cache folder; one file for each folder whose weights were deleted.
RECORDS = "replaced"
_RECORD = re.compile(r"[0-9a-f]{16}\.json")
# What stands for the folder itself; a GGUF file stands for itself.
FOLDER = "."
# What reading raises that is not what was written.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)

# Size, time of change and number of a file.
Stamp = tuple[int, int, int]


class Replacement(NamedTuple):
    """A store in the place of weight files.

    Attributes
    ----------
    files
        The names of those files → what tells each from another one in its place, as it was when the deleting began;
        ``None`` of what was gone by then. Empty where they were not noted.
    deleting
        Whether the deleting was begun and not ended.
    source
        The fingerprint of what the store was made of; empty where it was not noted.
    """

    store: Path
    files: Mapping[str, Stamp | None]
    deleting: bool
    source: str = ""


def recorded(folder: Path) -> dict[str, Replacement]:
    """What our own cache says that was replaced in a folder: by GGUF file, or :data:`FOLDER`."""
    path = _record(folder)
    try:
        said = read_json(path)
        return _parsed(said, folder) if said["folder"] == str(folder.resolve()) else {}
    except FileNotFoundError:
        return {}
    except FileError as error:
        log.warning("%s; what it says of %s is not used", error, folder)
        return {}
    except DAMAGED as error:
        log.warning("%s is damaged (%r); what it says of %s is not used", path, error, folder)
        return {}


def is_record(name: str) -> bool:
    """Whether a record is called so."""
    return _RECORD.fullmatch(name) is not None


def pointed(folder: Path) -> dict[str, Replacement]:
    """What the pointer in a folder says; raises one of :data:`DAMAGED` if it is not what was written."""
    return _parsed(read_json(folder / POINTER), folder)


def is_vouched(one: Replacement, folder: Path, key: str, bases: Iterable[Path]) -> bool:
    """Whether a pointer's store is one of ours, below one of ``bases``, and says that it was made of this very folder.

    So a store is found whose record was lost.
    """
    store = one.store
    if not store.is_absolute() or store.is_symlink() or store.parent.resolve() not in {b.resolve() for b in bases}:
        return False
    origin = origin_of(store) or ""
    return bool(origin) and Path(origin).resolve() == (folder.resolve() if key == FOLDER else folder.resolve() / key)


def record(folder: Path, key: str, one: Replacement) -> None:
    """Note a replacement, first in our cache, then beside the weights."""
    known = {**recorded(folder), key: one}
    stores = {name: said._asdict() | {"store": str(said.store)} for name, said in known.items()}
    text = json.dumps({"folder": str(folder.resolve()), "stores": stores}, indent=1).encode()
    path = _record(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    write_atomically(folder / POINTER, text)


def stamps(folder: Path, names: Iterable[str]) -> dict[str, Stamp | None]:
    """What tells files of a folder from others that may take their place; ``None`` of what is not there."""
    found: dict[str, Stamp | None] = {}
    for name in names:
        try:
            seen = status(inside(folder, name))
            found[name] = (seen.st_size, seen.st_mtime_ns, seen.st_ino)
        except FileNotFoundError:
            found[name] = None
    return found


def _record(folder: Path) -> Path:
    return cache_dir() / RECORDS / f"{digest([str(folder.resolve())])}.json"


def _parsed(said: Any, folder: Path) -> dict[str, Replacement]:
    found = {}
    for key, one in said["stores"].items():
        for name in (*one["files"], *([key] if key != FOLDER else [])):
            inside(folder, name)
        if "\0" in one["store"]:
            raise ValueError("a store's path cannot be one")
        files = {name: _stamp(*stamp) if stamp else None for name, stamp in one["files"].items()}
        found[key] = Replacement(Path(one["store"]), files, bool(one["deleting"]), str(one.get("source", "")))
    return found


def _stamp(size: Any, time: Any, number: Any) -> Stamp:
    return int(size), int(time), int(number)
