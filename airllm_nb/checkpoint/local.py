"""A checkpoint on this machine: what is known of it, and how a folder or a GGUF file becomes one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..disk import entries, expanded, read_bytes, read_json, status
from ..errors import CheckpointError, SourceError, UnsupportedModelError
from ..tensors.index import INDEX_FILE, shard_names
from ..tensors.inside import inside
from .foreign import with_hint
from .gguf.split import whole_name
from .hub.repository import CheckConfig
from .layout import BIN_INDEX_FILE, Format, choose, whole_gguf
from .picks import Room


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is on this machine.

    Attributes
    ----------
    name
        Short name for people and for folder names.
    folder
        Where config and tokenizer are (for GGUF: the folder of the file).
    format
        ``"safetensors"``, ``"bin"`` or ``"gguf"``.
    files
        The weight files; empty when the weights were not asked for and are not here.
    nbytes
        Size of the weight files, also of those that are not here yet; 0 when unknown.
    fingerprint
        Changes when the weights change: by what is in the files on the Hub, or names, sizes and times of local files.
    gguf_file, repo_id, revision
        Where they apply; ``revision`` is the commit hash.
    wanted
        Of a Hub id, the names of all weight files in ``folder``, also of those that are not here.
    missing
        How many of ``nbytes`` are not here yet; ``None`` when unknown.
    header
        Of a GGUF file that is not here, a file as long as that one with its header alone: good for its config and its
        table of tensors, and for nothing else.
    why
        Where there were several files to choose from: what was taken and why, one line for people.
    """

    name: str
    folder: Path
    format: Format
    files: tuple[Path, ...]
    nbytes: int
    fingerprint: str
    gguf_file: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    wanted: tuple[str, ...] = ()
    missing: int | None = 0
    header: Path | None = None
    why: str = ""

    @property
    def origin(self) -> str:
        """Hub id or path, for people."""
        return self.repo_id or str(self.gguf_file or self.folder)


def here(text: str, check: CheckConfig | None, room: Room) -> Source | None:
    """The folder or the file on this machine that a name means; ``None`` if there is none.

    Raises
    ------
    CheckpointError, SourceError
        If what is there is no complete checkpoint.
    """
    path = expanded(text)
    if path.is_dir():
        if check is not None and (path / "config.json").is_file():
            check(_config_of(path.absolute()))  # before a word about weights that could not be used anyway
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


def read_config(source: Source) -> dict[str, Any]:
    """The checkpoint's config as a dict; of a GGUF file, the native config that it stands for.

    Raises
    ------
    CheckpointError
        If config.json is missing, no JSON object, or names no architecture.
    """
    if gguf := source.gguf_file or source.header:
        from .gguf.header import read_gguf
        from .gguf.weights import gguf_config

        try:
            return dict(gguf_config(read_gguf(gguf)).to_dict())
        except UnsupportedModelError as error:
            name = f"{source.repo_id}:{gguf.name}"
            raise UnsupportedModelError(str(error).replace(str(source.header), name)) from None
    return _config_of(source.folder)


def _config_of(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type", ""), str) or not isinstance(config.get("architectures") or [], list):
        raise CheckpointError(f"{folder / 'config.json'} is damaged: model_type should be text and "
                              "architectures a list; download it again")  # fmt: skip
    if not config.get("model_type") and not config.get("architectures"):
        raise CheckpointError(f"{folder / 'config.json'} names no model_type and no architectures; it is not "
                              "the config of a transformers model")  # fmt: skip
    return config


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
