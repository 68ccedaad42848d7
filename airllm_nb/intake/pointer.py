"""Folders whose weights were deleted once a store was made of them: which store it is, and the deleting.

It is recorded in our cache, and a pointer is left beside what is deleted, before the first file goes: whenever the
deleting is cut short, the store is found. The record notes the files that it replaces, as they were, so that it never
speaks for any others; what came with a model is not believed (:mod:`~airllm_nb.intake.replacements`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checkpoint.gguf.split import part_names, whole_name
from ..checkpoint.originals import delete_original, is_own
from ..checkpoint.source import Source
from ..config import LoadOptions, cache_dir
from ..disk import expanded, is_file
from ..errors import FileError, OptionError, SourceError, StoreError
from ..store.atomic import sweep
from ..store.listing import named, written_beside
from ..store.locks import exclusively
from ..store.manifest import Store, open_store
from ..store.names import ADAPTERS, POINTER, StoreName
from ..stream.trial import MACHINE
from ..tensors.inside import inside
from .find.local import fingerprint_of, weight_names
from .replacements import (
    DAMAGED,
    FOLDER,
    RECORDS,
    Replacement,
    Stamp,
    is_record,
    is_vouched,
    pointed,
    record,
    recorded,
    stamps,
)

log = logging.getLogger(__name__)


def original_of(model: str | Path, shards: str | Path | None = None) -> str | Path:
    """The model that is opened by a name: of a folder that was written beside a GGUF file, that file.

    Of a folder of ours, where stores are: what another one names is not opened.

    Raises
    ------
    SourceError
        If the file is not here any more, or was not noted.
    """
    folder = expanded(model)
    beside = written_beside(folder) if str(model).strip() and folder.is_dir() else None
    if beside is None:
        return model
    is_ours = folder.resolve().parent in {base.resolve() for base in _bases(shards)}
    if is_ours and beside.endswith(".gguf") and is_file(Path(beside)):
        log.info("%s was written beside %s, which is opened", folder, beside)
        return Path(beside)
    what, remedy = (named(beside), "name that file") if beside else ("a checkpoint", "name that checkpoint")
    raise SourceError(f"{folder} holds only what was written beside {what}; {remedy}")


def _sweep(shards: str | Path | None) -> None:
    """Where stores are, what was on its way; a folder that the user named is theirs, not what else lies in it."""
    with suppress(OptionError):
        sweep(cache_dir(), lambda name: name == MACHINE)
        sweep(cache_dir() / RECORDS, is_record)
    for base in _bases(shards):
        sweep(base / ADAPTERS, StoreName.parse_copy)


def _bases(shards: str | Path | None) -> list[Path]:
    """Where stores of ours are; a user without a home has none but those that are named."""
    bases = [expanded(shards)] if shards else []
    with suppress(OptionError):
        bases.insert(0, cache_dir())
    return bases


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
        If the weights were deleted and the store is not there, or the pointer to it is damaged or not to be trusted.
    """
    if not str(model).strip():
        return None  # the source room says what is wrong
    folder, meant_there = _place(model)
    sweep(folder, lambda name: name == POINTER)
    _sweep(options.layer_shards_saving_path)
    key, replacement = _followed(folder, meant_there, options)
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
        _finish(folder, key, store, replacement)
    return store


def _is_unfinished(folder: Path, replacement: Replacement, options: LoadOptions) -> bool:
    return replacement.deleting or (options.delete_original and bool(_left(folder, replacement)))


def _left(folder: Path, one: Replacement) -> list[Path]:
    """The files that the deleting was begun with, and no others in their place."""
    there = stamps(folder, one.files)
    return [path for name, stamp in one.files.items()
            if stamp is not None and there[name] == stamp and is_own(path := inside(folder, name))]  # fmt: skip


def _finish(folder: Path, key: str, store: Store, one: Replacement) -> None:
    if recorded(folder).get(key) != one:
        log.warning("%s does not record what was deleted in %s: what is left of the original weights stays; delete it "
                    "yourself", cache_dir(), folder)  # fmt: skip
        return
    log.warning("the deleting of the original weights in %s was cut short; finishing it", folder)
    _delete(folder, key, store, one.files, _left(folder, one))


def replace_original(source: Source, folder: Path) -> None:
    """Delete the source's weight files, every byte of the store in ``folder`` verified first."""
    store = open_store(folder)
    # Of a Hub id, also what a deletion that was cut short left.
    left = () if source.header else (inside(source.folder, name) for name in source.wanted)
    files = source.files or tuple(path for path in left if path.is_file())
    if store is None or not files:
        return
    if source.repo_id is not None:  # the Hub has them: nothing needs to point to the store
        _delete(source.folder, None, store, {}, list(files))
        return
    there = stamps(source.folder, [file.relative_to(source.folder).as_posix() for file in files])
    if None in there.values() or fingerprint_of(source.folder, files) != store.meta.source:
        log.warning("the weights in %s were changed since %s was made of them: they stay", source.folder, folder)
        return
    own = [file for file in files if is_own(file)]
    if linked := [file for file in files if file not in own]:
        log.warning("%s and what it points to stay: links out of a model's folder are not followed (%d of its %d "
                    "weight files)", linked[0], len(linked), len(files))  # fmt: skip
    if own:
        _delete(source.folder, source.gguf_file.name if source.gguf_file else FOLDER, store, there, own)


def _delete(
    folder: Path, key: str | None, store: Store, replaced: Mapping[str, Stamp | None], files: list[Path]
) -> None:
    """Delete the files, noting before and after what the store replaces; without a key nothing is noted."""

    def note(deleting: bool) -> None:
        if key is not None:
            now = stamps(folder, replaced)
            left = {name: stamp if now[name] is not None else None for name, stamp in replaced.items()}
            record(folder, key, Replacement(store.folder.absolute(), left, deleting, store.meta.source))

    with exclusively(folder) as is_free:
        if not is_free:
            log.warning("%s is read by another process or model: the original weights stay; load again with "
                        "delete_original=True once it has ended", folder)  # fmt: skip
            return
        with _warned(folder):
            try:
                deleted = delete_original(store, files, before=lambda: note(True)) if files else []
            except OSError:  # not to be tried again at every load
                note(False)
                raise
            note(False)
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


def _followed(folder: Path, key: str, options: LoadOptions) -> tuple[str, Replacement | None]:
    """What replaces ``key`` in the folder, unless the files that were replaced, or others, are there.

    Of a folder that may be a GGUF file that was there: the key that is found comes with it.
    """
    if not (folder / POINTER).is_file():
        return key, None
    if key != FOLDER and part_names(key) == (key,) and (folder / key).exists():
        return key, None
    try:
        said = pointed(folder)
    except DAMAGED as error:
        if _are_there(folder, key):
            return key, None
        if isinstance(error, FileError):  # not to be read is not damaged: deleted, the store would not be found
            raise
        reason = f"{type(error).__name__}: {str(error).partition(';')[0][:200]!r}"
        raise SourceError(f"{folder / POINTER}, which says what store replaces the weights that were deleted there, is "
                          f"damaged ({reason}); delete it and name the store itself (airllm-nb cache lists them), "
                          "or download the model again") from None  # fmt: skip
    if key != FOLDER:  # the first part, whichever was named
        key = next((first for first in said if key in (whole_name(first), *part_names(first))), key)
    if not (known := _trusted(folder, said, options)) and said and not _are_there(folder, key):
        store = str(next(iter(said.values())).store)
        raise SourceError(f"{folder / POINTER} says that a store, {store[:200]!r}, replaces the weights of this "
                          "folder, but this machine has no record of that; name that store itself if you made it, or "
                          "download the model again")  # fmt: skip
    if key != FOLDER:
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


def _are_there(folder: Path, key: str) -> bool:
    return bool(weight_names(folder)) if key == FOLDER else (folder / key).exists()


def _trusted(folder: Path, said: Mapping[str, Replacement], options: LoadOptions) -> dict[str, Replacement]:
    """What our cache records of the keys that the pointer has, and what of the rest leads to a store of ours."""
    known, bases = recorded(folder), _bases(options.layer_shards_saving_path)
    ours = {key: one for key, one in said.items() if key in known or is_vouched(one, folder, key, bases)}
    return {key: known.get(key, one) for key, one in ours.items()}


def _is_followed(folder: Path, one: Replacement, names: list[str]) -> bool:
    """Whether nothing is there, of these names too, but what is left of the files that it replaces, and not all."""
    is_whole = bool(one.files) and all(inside(folder, name).is_file() for name in one.files)
    # Not by their numbers: a network may number files anew.
    known = {name: stamp[:2] for name, stamp in one.files.items() if stamp is not None}
    there = stamps(folder, [*names, *one.files])
    return not is_whole and all(stamp is None or stamp[:2] == known.get(name) for name, stamp in there.items())


def _pointed_to(folder: Path, replacement: Replacement) -> Store:
    gone = f"the weights in {folder} were deleted once a store was made of them, and the store"
    remedy = f"download the model again, or delete {folder / POINTER}"
    try:
        store = open_store(replacement.store)
    except StoreError as error:
        raise SourceError(f"{gone} is damaged: {error} (to convert again, {remedy} first)") from None
    if store is None:
        raise SourceError(f"{gone}, {replacement.store}, is not there any more; bring it back, or {remedy}")
    if replacement.source not in ("", store.meta.source):
        raise SourceError(f"{gone}, {replacement.store}, is of other weights by now; bring it back, or {remedy}")
    return store
