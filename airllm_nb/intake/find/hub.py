"""A Hub id → files in the Hub's own cache: listed first, the config looked at, the disk checked, then downloaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...checkpoint.companions import companions
from ...checkpoint.gguf.split import whole_name
from ...checkpoint.hub.errors import explained, unreachable
from ...checkpoint.hub.gguf_header import gguf_header
from ...checkpoint.hub.ranges import NoRanges
from ...checkpoint.hub.repository import (
    Repository,
    cache_folder,
    cached_commit,
    cached_contents,
    offline,
    reporting_bars,
    repository_folder,
)
from ...checkpoint.source import Source
from ...config import LoadOptions, format_bytes
from ...disk import free_disk, status
from ...errors import CheckpointError, SourceError
from ...progress import Progress, ProgressCallback
from ...tensors.index import shard_names
from ...tensors.inside import inside
from .identity import fingerprint
from .layout import Choice, choose
from .local import CheckConfig, clean_name
from .picks import Room

log = logging.getLogger(__name__)


def fetch(
    repo_id: str,
    options: LoadOptions,
    *,
    progress: ProgressCallback,
    weights: bool,
    check_config: CheckConfig | None,
    gguf: str | None = None,
    room: Room | None = None,
) -> Source:
    """Bring a repository into the local cache; without ``weights`` only config, tokenizer and index.

    Parameters
    ----------
    room
        What the machine has, where there are several files to choose from; its disk is looked up if it is not said.

    Raises
    ------
    SourceError
        If it cannot be found, reached or stored; one line with the remedy.
    CheckpointError
        If it holds nothing that can be loaded.
    """
    room = room or Room()
    if options.local_files_only or offline():
        return _cached(repo_id, options, gguf, room, "local_files_only=True or HF_HUB_OFFLINE")
    with explained(repo_id, options):
        try:
            repo = Repository(repo_id, options)
            if room.disk is None:
                room = replace(room, disk=_free())
            # What is compressed on the way needs less: a GGUF file is no better then.
            choice = choose(
                repo.sizes, repo.id, gguf, room=room, here=repo.here(), keep_format=bool(options.compression)
            )
            return _download(repo, options, choice, progress, weights, check_config)
        except unreachable() as error:
            try:
                found = _cached(repo_id, options, gguf, room, "no connection")
            except (SourceError, CheckpointError):
                raise error from None
            log.warning("the Hub cannot be reached; using the cached copy of %s", repo_id)
            return found


def _download(
    repo: Repository,
    options: LoadOptions,
    choice: Choice,
    progress: ProgressCallback,
    weights: bool,
    check_config: CheckConfig | None,
) -> Source:
    has_config, is_gguf = "config.json" in repo.sizes, choice.format == "gguf"
    if has_config:
        config = repo.config()
        if check_config is not None and not is_gguf:
            check_config(config)
    small = companions(repo.sizes, choice.index)
    folder = repo.snapshot(small) if small else Path()
    names = shard_names(folder / choice.index) if choice.index else choice.weights
    absent = [name for name in names if name not in repo.sizes]
    if absent:
        raise CheckpointError(f"{repo.id}: {choice.index} names {absent[0]}, which the repository does not hold "
                              f"({len(absent)} of {len(names)} shards missing)")  # fmt: skip
    here = repo.here()
    total, need = (sum(repo.sizes[name] for name in files) for files in (names, set(names) - here))
    if weights or not need:
        _check_disk(repo.id, need)
        bars = reporting_bars(progress, total - need, total, repo.id)
        folder = repo.snapshot(names, tqdm_class=bars)
        if not has_config:
            repo.remember(names[0])
        if weights:
            progress(Progress("download", total, total, detail=repo.id))
        need = 0
    header = _header(repo, names[0], has_config, progress) if is_gguf and need else None
    return _source(repo.id, options, folder, repo.commit, choice, names, repo.contents, total, need, header)


def _header(repo: Repository, name: str, has_config: bool, progress: ProgressCallback) -> Path | None:
    """The config of a GGUF model is inside the file."""
    progress(Progress("headers", 0, 1, "files", repo.id))
    try:
        header = gguf_header(repo.id, repo.commit, name, repo.token)
    except (NoRanges, OSError) as error:
        log.info("no header of %s: %s", name, error)
        if has_config:
            return None
        if not isinstance(error, NoRanges):
            raise
        raise SourceError(f"{repo.id}: the config of a GGUF model is inside the weight file, and {error}; download "
                          f"{name} and name the local file") from None  # fmt: skip
    progress(Progress("headers", 1, 1, "files", repo.id))
    return header


def _cached(repo_id: str, options: LoadOptions, gguf: str | None, room: Room, why: str) -> Source:
    """The repository as far as the cache holds it, without any request."""
    cache = cache_folder()
    folder = repository_folder(repo_id) / "snapshots" / cached_commit(repo_id, options.revision)
    named = [folder / gguf, *folder.glob(f"{gguf.removesuffix('.gguf')}-00001-of-*.gguf")] if gguf else []
    found = named or [folder / "config.json", *folder.rglob("*.gguf")]
    if not any(path.is_file() for path in found):
        raise SourceError(f"{repo_id} is not in the local cache ({cache}) and the Hub is not asked ({why}); download "
                          "it once with a connection, or name a local folder")  # fmt: skip
    sizes = {path.relative_to(folder).as_posix(): status(path).st_size for path in folder.rglob("*") if path.is_file()}
    choice = choose(sizes, repo_id, gguf, room=room, here=sizes)
    shards = shard_names(folder / choice.index) if choice.index else choice.weights
    return _source(repo_id, options, folder, folder.name, choice, shards, cached_contents(folder))


def _source(
    repo_id: str, options: LoadOptions, folder: Path, commit: str, choice: Choice, names: tuple[str, ...],
    contents: Mapping[str, str], nbytes: int = 0, missing: int | None = None, header: Path | None = None,
) -> Source:  # fmt: skip
    """What is known of a repository at one commit.

    Parameters
    ----------
    names
        Of the weight files, relative to ``folder``.
    contents
        The names that the cache gives to what is in the files, as far as they are known.
    nbytes, missing
        Of the weight files; 0 and ``None`` where the Hub was not asked.
    """
    files = tuple(inside(folder, name) for name in names)
    is_here = all(file.is_file() for file in files)
    gguf = files[0] if choice.format == "gguf" else None
    name = clean_name(Path(whole_name(gguf.name)).stem if gguf else repo_id.split("/")[-1])
    return Source(
        name=name,
        folder=(header or gguf).parent if gguf else folder,
        format=choice.format,
        files=files if is_here else (),
        nbytes=nbytes or (sum(status(file).st_size for file in files) if is_here else 0),
        fingerprint=fingerprint(name, repo_id, commit, names, contents, options),
        gguf_file=gguf if is_here else None,
        repo_id=repo_id,
        revision=commit,
        wanted=names,
        missing=0 if is_here else missing,
        header=header,
        why=choice.why,
    )


def _free() -> int | None:
    return free_disk(cache_folder())


def _check_disk(repo_id: str, need: int) -> None:
    cache, free = cache_folder(), _free()
    if free is not None and need > free:
        raise SourceError(f"{repo_id} needs {format_bytes(need)} more on disk but {cache} has {format_bytes(free)} "
                          "free; free some, or set HF_HOME to a folder on a larger disk")  # fmt: skip
