"""A folder or a GGUF file on this machine → a :class:`~airllm_nb.checkpoint.source.Source`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoint.gguf.split import whole_name
from ...checkpoint.source import Format, Source, config_of, read_config
from ...disk import entries, expanded, read_bytes, status
from ...errors import CheckpointError, SourceError
from ...tensors.index import BIN_INDEX_FILE, INDEX_FILE, shard_names
from ...tensors.inside import inside
from .foreign import with_hint
from .layout import choose, layouts, whole_gguf
from .picks import NOT_A_MODEL, Room

CheckConfig = Callable[[dict[str, Any]], None]


def local_source(text: str, check: CheckConfig | None, room: Room) -> Source | None:
    """The folder or the file on this machine that a name means; ``None`` if there is none.

    Raises
    ------
    CheckpointError, SourceError
        If what is there is no complete checkpoint.
    """
    path = expanded(text)
    if path.is_dir():
        if check is not None and (path / "config.json").is_file():
            check(config_of(path.absolute()))  # before a word about weights that could not be used anyway
        return checked(_folder(path.absolute(), room), check)
    if path.is_file():
        return _file(path.absolute())
    folder, _, name = text.rpartition(":")
    if folder and name.endswith(".gguf") and (path := expanded(folder)).is_dir():
        if (path / name).is_file():
            return _file((path / name).absolute())
        choice = choose(_sizes(path.absolute()), str(path.absolute()), name)  # which says what is there instead
        return _file(inside(path.absolute(), choice.weights[0]))
    return None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: status(path).st_size for path in entries(folder) if path.is_file()}


def _without_bare_indexes(sizes: dict[str, int]) -> dict[str, int]:
    """An index whose shards have all gone does not hide weights in another format that are there."""
    bare = {index for index, suffix in ((INDEX_FILE, ".safetensors"), (BIN_INDEX_FILE, ".bin"))
            if index in sizes and not any(name.endswith(suffix) for name in sizes)}  # fmt: skip
    others = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in sizes)
    return {name: size for name, size in sizes.items() if name not in bare} if others else sizes


def _folder(folder: Path, room: Room) -> Source:
    sizes = _without_bare_indexes(_sizes(folder))
    try:
        choice = choose(sizes, str(folder), room=room, here=sizes)
    except CheckpointError as error:
        raise with_hint(error, folder, list(sizes)) from None
    shards = shard_names(folder / choice.index) if choice.index else choice.weights
    files = tuple(inside(folder, name) for name in shards)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder}: shard {file.name} is named by {choice.index} but is missing; "
                                  f"download it again ({len(files)} shards in all)")  # fmt: skip
    return replace(_local(folder, choice.format, files), why=choice.why)


def _file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return _local(path.parent, "gguf", whole_gguf(path))
    raise SourceError(f"{path} is a file; name the folder that holds config.json and the weights ({path.parent}), or a "
                      ".gguf file")  # fmt: skip


def _local(folder: Path, kind: Format, files: tuple[Path, ...]) -> Source:
    for file in files:
        _refuse_pointer(file)
    gguf = files[0] if kind == "gguf" else None
    fingerprint, nbytes = fingerprint_of(folder, files), sum(status(file).st_size for file in files)
    name = clean_name(Path(whole_name(gguf.name)).stem if gguf else _folder_name(folder))
    return Source(name, folder, kind, files, nbytes, fingerprint, gguf)


def weight_names(folder: Path) -> list[str]:
    """The files of a folder that a model could be loaded from, whole or not."""
    names = [path.name for path in entries(folder) if path.is_file()]
    found = {name for _, files in layouts(names) for name in files}
    return sorted(found.union(n for n in names if n.endswith(".gguf") and not NOT_A_MODEL.search(n.lower())))


def fingerprint_of(folder: Path, files: Iterable[Path]) -> str:
    """By names, sizes and times of change."""
    found = ((file.relative_to(folder).as_posix(), status(file)) for file in files)
    return digest(f"{name} {seen.st_size} {seen.st_mtime_ns}" for name, seen in found)


def checked(source: Source, check_config: CheckConfig | None) -> Source:
    """The same, unless its config is refused."""
    if check_config is not None and source.format != "gguf":
        check_config(read_config(source))
    return source


def _refuse_pointer(file: Path) -> None:
    if status(file).st_size < 1024 and read_bytes(file).startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in {file.parent}")


def _folder_name(folder: Path) -> str:
    """A snapshot in the Hub's cache is named after its repository, not after its commit."""
    for parent in folder.parents:
        if parent.name.startswith("models--"):
            return parent.name.split("--")[-1]
    return folder.name


def clean_name(name: str) -> str:
    """A name as part of a folder's."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def digest(lines: Iterable[str]) -> str:
    """A fingerprint of what the lines say."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
