"""A model's name → local files: a Hub id, a folder or a GGUF file. Nothing of the weights is read."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import LoadOptions, cache_dir
from ..errors import CheckpointError, SourceError, UnsupportedModelError
from ..trace import ProgressCallback, silent
from .foreign import refuse_foreign, with_hint
from .hub import CheckConfig, Snapshot, fetch, read_json
from .layout import Format, choose, shard_names, whole_gguf
from .picks import Room

log = logging.getLogger(__name__)

__all__ = ["Source", "read_config", "resolve", "store_folder"]

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_HUB_GGUF = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)[:/](.+\.gguf)")


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
        Changes when the weights change: repository and commit, or names, sizes and times of local files.
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
    found = _here(text, check, room or Room())
    if found is None:
        if "://" in text:
            raise SourceError(f"{text} is a web address; give the part after the host, as org/name, or a local folder")
        repo_id, gguf = _hub_name(text)
        snapshot = fetch(repo_id, options, progress=progress, weights=weights, check_config=check, gguf=gguf, room=room)
        found = _checked(_from_hub(repo_id, snapshot, weights), check)
    if found.why:
        log.info("%s", found.why)
    return found


def _here(text: str, check: CheckConfig | None, room: Room) -> Source | None:
    """A folder or a file on this machine."""
    path = Path(text).expanduser()
    if path.is_dir():
        if check is not None and (path / "config.json").is_file():
            check(_config_of(path.absolute()))  # before a word about weights that could not be used anyway
        return _checked(_folder(path.absolute(), room), check)
    if path.is_file():
        return _file(path.absolute())
    folder, _, name = text.rpartition(":")
    if folder and name.endswith(".gguf") and (path := Path(folder).expanduser()).is_dir():
        if (path / name).is_file():
            return _file((path / name).absolute())
        choose(_sizes(path.absolute()), str(path.absolute()), name)  # which says what is there instead
    return None


def _hub_name(text: str) -> tuple[str, str | None]:
    """The repository, and the GGUF file in it where one is named."""
    if named := _HUB_GGUF.fullmatch(text):
        return named[1], named[2]
    repo_id, _, rest = text.partition(":")
    if rest and _HUB_ID.fullmatch(repo_id):
        raise SourceError(f"{text}: {rest!r} is no file; name one as {repo_id}:FILE.gguf, or {repo_id} alone to take "
                          "what suits this machine")  # fmt: skip
    if not _HUB_ID.fullmatch(text) or text.endswith((".gguf", ".safetensors", ".bin")):
        where = Path(text).expanduser().absolute()
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


def read_config(source: Source) -> dict[str, Any]:
    """The checkpoint's config as a dict; of a GGUF file, the native config that it stands for.

    Raises
    ------
    CheckpointError
        If config.json is missing, no JSON object, or names no architecture.
    """
    if gguf := source.gguf_file or source.header:
        from .gguf import gguf_config
        from .gguf_file import read_gguf

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


def store_folder(source: Source, codec_name: str | None, dtype: str, options: LoadOptions) -> Path:
    """Where the store of this source goes: one readable, unique name below the user's folder or the cache."""
    base = options.layer_shards_saving_path or cache_dir()
    return Path(base) / f"{source.name}--{codec_name or 'none'}--{dtype}--{source.fingerprint[:8]}"


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def _folder(folder: Path, room: Room) -> Source:
    sizes = _sizes(folder)
    try:
        choice = choose(sizes, str(folder), room=room, here=sizes)
    except CheckpointError as error:
        raise with_hint(error, folder, list(sizes)) from None
    shards = shard_names(folder / choice.index) if choice.index else choice.weights
    files = tuple(folder / name for name in shards)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder}: shard {file.name} is named by {choice.index} but is missing; "
                                  f"download it again ({len(files)} shards in all)")  # fmt: skip
    return replace(_local(folder, choice.format, files), why=choice.why)


def _file(path: Path) -> Source:
    if path.suffix == ".gguf":
        whole_gguf(path.name)
        return _local(path.parent, "gguf", (path,))
    raise SourceError(f"{path} is a file; name the folder that holds config.json and the weights ({path.parent}), or a "
                      ".gguf file")  # fmt: skip


def _local(folder: Path, kind: Format, files: tuple[Path, ...]) -> Source:
    for file in files:
        _refuse_pointer(file)
    gguf = files[0] if kind == "gguf" else None
    sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fingerprint = _digest(f"{name} {size} {time}" for name, size, time in sizes)
    name = _clean(gguf.stem if gguf else _folder_name(folder))
    return Source(name, folder, kind, files, sum(size for _, size, _ in sizes), fingerprint, gguf)


def _from_hub(repo_id: str, snapshot: Snapshot, weights: bool) -> Source:
    files = tuple(snapshot.folder / name for name in snapshot.weights)
    missing = [file.name for file in files if not file.is_file()]
    if missing and weights:
        raise SourceError(f"{repo_id}: {missing[0]} is not in the local cache ({len(missing)} of {len(files)} weight "
                          "files missing); load it once with a connection")  # fmt: skip
    kind = snapshot.choice.format
    gguf = files[0] if kind == "gguf" else None
    folder = (snapshot.header or gguf).parent if gguf else snapshot.folder
    return Source(
        name=_clean(gguf.stem if gguf else repo_id.split("/")[-1]),
        folder=folder,
        format=kind,
        files=() if missing else files,
        nbytes=snapshot.nbytes or (0 if missing else sum(file.stat().st_size for file in files)),
        fingerprint=_digest([repo_id, snapshot.commit, *snapshot.weights]),
        gguf_file=None if missing else gguf,
        repo_id=repo_id,
        revision=snapshot.commit,
        wanted=snapshot.weights,
        missing=snapshot.missing if missing else 0,
        header=snapshot.header,
        why=snapshot.choice.why,
    )


def _checked(source: Source, check_config: CheckConfig | None) -> Source:
    if check_config is not None and source.format != "gguf":
        check_config(read_config(source))
    return source


def _refuse_pointer(file: Path) -> None:
    if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in {file.parent}")


def _folder_name(folder: Path) -> str:
    """A snapshot in the Hub's cache is named after its repository, not after its commit."""
    for parent in folder.parents:
        if parent.name.startswith("models--"):
            return parent.name.split("--")[-1]
    return folder.name


def _clean(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
