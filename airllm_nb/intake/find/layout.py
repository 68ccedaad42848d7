"""Which files of a checkpoint matter: pure functions over names and sizes, the same for a folder and a Hub listing."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...checkpoint.gguf.split import part_names, whole_name
from ...checkpoint.source import Format
from ...config import format_bytes
from ...errors import CheckpointError
from ...tensors.index import BIN_INDEX_FILE, INDEX_FILE, SINGLE_FILE
from .foreign import why_not
from .picks import Room, incomplete, listed, missing_parts, models, pick

BIN_FILE = "pytorch_model.bin"

_LAYOUTS: tuple[tuple[Format, str, str, str], ...] = (
    ("safetensors", INDEX_FILE, SINGLE_FILE, ".safetensors"),
    ("bin", BIN_INDEX_FILE, BIN_FILE, ".bin"),
)

_NOT_THE_MODEL = re.compile(r"(adapter|consolidated|optimizer|training_args|scheduler|rng_state).*")


@dataclass(frozen=True)
class Choice:
    """What to read: ``weights`` by name, or ``index``, the JSON file that names them.

    ``why`` is one line for people where there was something to choose.
    """

    format: Format
    index: str | None
    weights: tuple[str, ...]
    why: str = ""


def choose(
    sizes: Mapping[str, int],
    where: str,
    gguf: str | None = None,
    *,
    room: Room = Room(),  # noqa: B008 - frozen
    here: Collection[str] = (),
    keep_format: bool = False,
) -> Choice:
    """Choose the weight files: safetensors before bin before GGUF, and of several GGUF files the one that suits.

    A GGUF file goes before the others only where the disk has room for it and not for them.

    Parameters
    ----------
    sizes
        Bytes by name, relative to the checkpoint; 0 where unknown.
    where
        The folder or the Hub id, for messages.
    gguf
        The GGUF file that the user named, if any.
    room
        What the machine has, see :func:`~airllm_nb.intake.find.picks.pick`.
    here
        The names of the files that need no disk.
    keep_format
        Whether a GGUF file never takes the place of the others.

    Raises
    ------
    CheckpointError
        If there is nothing that can be loaded; the message says what is there instead.
    """
    if gguf is not None:
        return _named(gguf, sizes, where)
    found = layouts([name for name in sizes if "/" not in name])
    whole = models(sizes)
    if not found:
        return _gguf_alone(whole, sizes, where, room, here)
    choice, files = found[0]
    need = sum(sizes[name] for name in files if name not in here)
    fitting = {name: size for name, size in whole.items() if not missing_parts(name, here) or room.stores(size)}
    if fitting and not room.stores(need) and not keep_format:
        name, _ = pick(fitting, room, where, here)
        return Choice("gguf", None, part_names(name), f"took {whole_name(name)} ({format_bytes(whole[name])}): the "
                      f"{choice.format} files need {format_bytes(need)} more on disk, which has "
                      f"{format_bytes(room.disk or 0)} free; name another as {where}:FILE.gguf")  # fmt: skip
    others: list[str] = [other.format for other, _ in found[1:]]
    if whole:
        others.append("GGUF")
    if others:
        total = format_bytes(sum(sizes[name] for name in files))
        hint = f"; name a GGUF file as {where}:FILE.gguf" if whole else ""
        choice = replace(choice, why=f"took {choice.format} ({total}) before {' and '.join(others)}{hint}")
    return choice


def _named(gguf: str, names: Collection[str], where: str) -> Choice:
    """A file, or all parts of a split one: any of them may be named, or all by the name without its number."""
    all_parts = (part_names(name) for name in sorted(names) if whole_name(name) == gguf)
    parts = part_names(gguf) if gguf in names else next(all_parts, ())
    if not parts:
        others = [name for name in names if name.endswith(".gguf")]
        raise CheckpointError(f"{where} holds no {gguf}; GGUF files there: {listed(others) or 'none'}")
    if any(part not in names for part in parts):
        raise CheckpointError(f"{where}: {incomplete([name for name in names if name in parts])}")
    return Choice("gguf", None, parts)


def _gguf_alone(
    whole: Mapping[str, int], names: Collection[str], where: str, room: Room, here: Collection[str]
) -> Choice:
    """What suits of several GGUF files, where there is nothing else."""
    lacks = incomplete(names)
    if not whole:
        raise CheckpointError(f"{where}: {lacks}" if lacks else f"{where} {why_not(names, where)}")
    name, why = pick(whole, room, where, here)
    if lacks:
        why = f"{why or f'took {whole_name(name)}'}; left out: {lacks}"
    return Choice("gguf", None, part_names(name), why)


def layouts(top: list[str]) -> list[tuple[Choice, list[str]]]:
    """Whole checkpoints among files of one folder, the preferred first, with all weight files of each."""
    made: list[tuple[Choice, list[str]]] = []
    if "config.json" not in top:
        return made
    for kind, index, single, suffix in _LAYOUTS:
        files = sorted(name for name in top if name.endswith(suffix) and not _NOT_THE_MODEL.match(name))
        named = kind == "safetensors" or all(name.startswith("pytorch_model") for name in files)
        if single in top:  # before the index, as transformers does: that of an earlier save may be left over
            made.append((Choice(kind, None, (single,)), [single]))
        elif index in top:
            made.append((Choice(kind, index, ()), files))
        elif files and named:
            made.append((Choice(kind, None, tuple(files)), files))
    return made


def whole_gguf(path: Path) -> tuple[Path, ...]:
    """The files of the GGUF model that ``path`` is, or is a part of.

    Raises
    ------
    CheckpointError
        If a part is missing; the message names it.
    """
    parts = tuple(path.with_name(name) for name in part_names(path.name))
    here = [part.name for part in parts if part.is_file()]
    if len(here) < len(parts):
        raise CheckpointError(f"{path.parent}: {incomplete(here)}")
    return parts
