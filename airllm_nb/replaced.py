"""Folders whose weights were deleted once a store was made of them: which store it is, and the deleting.

A pointer is left beside what is deleted, and before it: whenever the deleting is cut short, the store is found. It
notes the files that it replaces, as they were, so that it never speaks for any others.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .checkpoint.cached import named, written_beside
from .checkpoint.folder import exclusively
from .checkpoint.gguf_split import part_names, whole_name
from .checkpoint.journal import write_atomically
from .checkpoint.local import POINTER, Source
from .checkpoint.originals import delete_original, weight_names
from .checkpoint.store import Store, open_store
from .config import LoadOptions
from .disk import expanded, read_json, status
from .errors import OptionError, SourceError, StoreError

log = logging.getLogger(__name__)

# In the pointer, what stands for the folder itself; a GGUF file stands for itself.
FOLDER = "."
# What reading a pointer raises that is not what was written.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)


class Replacement(NamedTuple):
    """A store in the place of weight files.

    Attributes
    ----------
    files
        The names of those files → size and time of change of what is left of them, ``None`` of what is gone. Empty
        where they were not noted.
    deleting
        Whether the deleting was begun and not ended.
    """

    store: Path
    files: dict[str, tuple[int, int] | None]
    deleting: bool


def meant(model: str | Path) -> str | Path:
    """The model that is opened by a name: of a folder that was written beside a GGUF file, that file.

    Raises
    ------
    SourceError
        If the file is not here any more, or was not noted.
    """
    folder = expanded(model)
    beside = written_beside(folder) if str(model).strip() and folder.is_dir() else None
    if beside is None:
        return model
    if beside.endswith(".gguf") and Path(beside).is_file():
        log.info("%s was written beside %s, which is opened", folder, beside)
        return Path(beside)
    what, remedy = (named(beside), "name that file") if beside else ("a checkpoint", "name that checkpoint")
    raise SourceError(f"{folder} holds only what was written beside {what}; {remedy}")


def opened_store(model: str | Path, options: LoadOptions, *, finish: bool = True) -> Store | None:
    """The store that ``model`` names directly: its own folder, or a folder or a GGUF file whose weights it replaced.

    Parameters
    ----------
    finish
        Whether a deletion that was cut short is finished.

    Raises
    ------
    OptionError
        If another compression was asked for than the store has.
    SourceError
        If the weights were deleted and the store is not there, or the pointer to it is damaged.
    """
    if not str(model).strip():
        return None  # the source room says what is wrong
    folder, meant_there = _place(model)
    key, replacement = _followed(folder, meant_there)
    if replacement is not None:
        store: Store | None = _pointed_to(folder, replacement)
    else:
        store = open_store(folder) if meant_there == FOLDER and folder.is_dir() else None
    if store is None or store.meta.codec == "none":
        return None
    if options.compression not in (None, store.meta.codec):
        original = f"the original, whose weights in {folder} were deleted" if replacement else "the original model"
        raise OptionError(f"{store.folder} is compressed as {store.meta.codec!r}, compression={options.compression!r} "
                          f"was asked for; leave the option out, or load {original}")  # fmt: skip
    if replacement is not None and finish and _is_unfinished(folder, replacement, options):
        log.warning("the deleting of the original weights in %s was cut short; finishing it", folder)
        _delete(folder, key, store, [folder / name for name in replacement.files])
    return store


def _is_unfinished(folder: Path, replacement: Replacement, options: LoadOptions) -> bool:
    left = any((folder / name).is_file() for name in replacement.files)
    return replacement.deleting or (options.delete_original and left)


def replace_original(source: Source, folder: Path) -> None:
    """Delete the source's weight files, every byte of the store in ``folder`` verified first."""
    store = open_store(folder)
    # Of a Hub id, also what a deletion that was cut short left.
    left = () if source.header else (source.folder / name for name in source.wanted)
    files = source.files or tuple(path for path in left if path.is_file())
    if store is not None and files:
        key = None if source.repo_id else source.gguf_file.name if source.gguf_file else FOLDER
        _delete(source.folder, key, store, files)


def _delete(folder: Path, key: str | None, store: Store, files: list[Path] | tuple[Path, ...]) -> None:
    """Delete the files, pointing at the store before and after; without a key nothing points: the Hub has them."""
    names = [path.name for path in files]

    def point(deleting: bool) -> None:
        if key is not None:
            _write(folder, key, Replacement(store.folder.absolute(), _stamps(folder, names), deleting))

    with exclusively(folder) as is_free:
        if not is_free:
            log.warning("%s is read by another process or model: the original weights stay; load again with "
                        "delete_original=True once it has ended", folder)  # fmt: skip
            return
        with _warned(folder):
            try:
                deleted = delete_original(store, files, before=lambda: point(True))
            except OSError:  # not to be tried again at every load
                point(False)
                raise
            point(False)
            log.info("deleted %d original weight files; %s replaces them", len(deleted), store.folder)


@contextmanager
def _warned(folder: Path) -> Iterator[None]:
    """What the disk refuses is no reason not to open the store."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        log.warning("the original weights in %s cannot be deleted (%s); check who owns them and load again with "
                    "delete_original=True", folder, error)  # fmt: skip


def _place(model: str | Path) -> tuple[Path, str]:
    """The folder that a name leads to, and what in it is meant."""
    path = expanded(model)
    if path.suffix != ".gguf" or path.is_dir():
        return path, FOLDER
    above, _, name = str(model).rpartition(":")
    folder = expanded(above)
    return (folder, name) if above and folder.is_dir() else (path.parent, path.name)


def _followed(folder: Path, key: str) -> tuple[str, Replacement | None]:
    """What the folder's pointer says of ``key``, unless the files that it replaces, or others, are there.

    Of a folder that may be a GGUF file that was there: the key that is found comes with it.
    """
    if not (folder / POINTER).is_file():
        return key, None
    if key != FOLDER and part_names(key) == (key,) and (folder / key).exists():
        return key, None
    try:
        known = _read(folder)
    except _DAMAGED as error:
        if weight_names(folder) if key == FOLDER else (folder / key).exists():
            return key, None
        raise SourceError(f"{folder / POINTER}, which says what store replaces the weights that were deleted there, is "
                          f"damaged ({error!r}); delete it and name the store itself (airllm-nb cache lists the "
                          "stores), or download the model again") from None  # fmt: skip
    if key != FOLDER:  # the first part, whichever was named
        key = next((first for first in known if key in (whole_name(first), *part_names(first))), key)
        one = known.get(key)
        return key, one if one is not None and _is_followed(folder, one, []) else None
    there = weight_names(folder)
    found = {name: one for name, one in known.items() if _is_followed(folder, one, there)}
    if FOLDER in found or not found:
        return FOLDER, found.get(FOLDER)
    if len(found) > 1:
        names = ", ".join(str(folder / name) for name in sorted(found))
        raise SourceError(f"{folder}: stores replace {len(found)} GGUF files that were there; name one of {names}")
    return next(iter(found.items()))


def _is_followed(folder: Path, one: Replacement, names: list[str]) -> bool:
    """Whether nothing is there, of these names too, but what is left of the files that it replaces, and not all."""
    is_whole = bool(one.files) and all((folder / name).is_file() for name in one.files)
    stamps = _stamps(folder, [*names, *one.files])
    return not is_whole and all(stamp in (None, one.files.get(name)) for name, stamp in stamps.items())


def _pointed_to(folder: Path, replacement: Replacement) -> Store:
    gone = f"the weights in {folder} were deleted once a store was made of them, and the store"
    remedy = f"download the model again, or delete {folder / POINTER}"
    try:
        store = open_store(replacement.store)
    except StoreError as error:
        raise SourceError(f"{gone} is damaged: {error} (to convert again, {remedy} first)") from None
    if store is None:
        raise SourceError(f"{gone}, {replacement.store}, is not there any more; bring it back, or {remedy}")
    return store


def _stamps(folder: Path, names: list[str]) -> dict[str, tuple[int, int] | None]:
    found: dict[str, tuple[int, int] | None] = {}
    for name in names:
        try:
            seen = status(folder / name)
            found[name] = (seen.st_size, seen.st_mtime_ns)
        except FileNotFoundError:
            found[name] = None
    return found


def _read(folder: Path) -> dict[str, Replacement]:
    said = read_json(folder / POINTER)
    if "store" in said:  # of an earlier version, which noted no files
        return {FOLDER: Replacement(Path(said["store"]), {}, False)}
    return {
        key: Replacement(
            Path(one["store"]),
            {name: tuple(stamp) if stamp else None for name, stamp in one["files"].items()},
            bool(one["deleting"]),
        )
        for key, one in said["stores"].items()
    }


def _write(folder: Path, key: str, one: Replacement) -> None:
    known = {}
    if (folder / POINTER).is_file():
        try:
            known = _read(folder)
        except _DAMAGED as error:
            log.warning("%s was damaged (%r) and is written anew", folder / POINTER, error)
    stores = {name: said._asdict() | {"store": str(said.store)} for name, said in {**known, key: one}.items()}
    write_atomically(folder / POINTER, json.dumps({"stores": stores}, indent=1).encode())
