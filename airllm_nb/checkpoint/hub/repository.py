"""A Hub id → files in the Hub's own cache: listed first, the config looked at, the disk checked, then downloaded.

With its neighbours ``hub_*`` and ``ranges``, all that imports ``huggingface_hub`` here. Its cache, its token, its
environment variables (``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``) and its progress bars are used as they are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...config import LoadOptions, format_bytes
from ...disk import free_disk, read_json, read_text, status
from ...errors import CheckpointError, SourceError
from ...tensors.index import shard_names
from ...tensors.inside import is_inside
from ...trace import Progress, ProgressCallback
from ..layout import Choice, choose, companions
from ..picks import Room
from .errors import explained, unreachable
from .gguf_header import gguf_header
from .ranges import NoRanges

log = logging.getLogger(__name__)

CheckConfig = Callable[[dict[str, Any]], None]


class Snapshot(NamedTuple):
    """A repository at one commit: ``weights`` are names relative to ``folder``; ``nbytes`` is 0 when unknown.

    ``missing`` is how many of those bytes are not here yet, ``None`` when the Hub was not asked. ``header`` stands for
    a GGUF file that is not here, see :func:`~airllm_nb.checkpoint.hub.gguf_header.gguf_header`. ``contents`` are the
    names that the cache gives to what is in the files, as far as they are known.
    """

    folder: Path
    commit: str
    choice: Choice
    weights: tuple[str, ...]
    nbytes: int
    missing: int | None = None
    header: Path | None = None
    contents: Mapping[str, str] = {}


def fetch(
    repo_id: str,
    options: LoadOptions,
    *,
    progress: ProgressCallback,
    weights: bool,
    check_config: CheckConfig | None,
    gguf: str | None = None,
    room: Room | None = None,
) -> Snapshot:
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
            return _download(repo, choice, progress, weights, check_config)
        except unreachable() as error:
            try:
                found = _cached(repo_id, options, gguf, room, "no connection")
            except (SourceError, CheckpointError):
                raise error from None
            log.warning("the Hub cannot be reached; using the cached copy of %s", repo_id)
            return found


def answers(repo_id: str, seconds: float) -> bool:
    """Whether the Hub shows us the repository within ``seconds``."""
    from huggingface_hub import HfApi

    if offline():
        return False
    try:
        HfApi().model_info(repo_id, timeout=seconds)
    except Exception as error:  # whatever keeps it from answering, the answer is no
        log.info("the Hub does not answer for %s: %s", repo_id, type(error).__name__)
        return False
    return True


class Repository:
    """One repository at one commit, through the Hub's library."""

    def __init__(self, repo_id: str, options: LoadOptions):
        from huggingface_hub import HfApi

        self.id, self.token, self.revision = repo_id, options.hf_token, options.revision
        self._api = HfApi(token=options.hf_token)
        self.list(options.revision)

    def list(self, revision: str | None) -> None:
        info = self._api.model_info(self.id, revision=revision, files_metadata=True, timeout=30)
        self.commit = str(info.sha)
        # Names that lead out of the repository are nothing that it can hold.
        files = [file for file in info.siblings or () if is_inside(file.rfilename)]
        self.sizes = {file.rfilename: file.size or 0 for file in files}
        self.contents = {file.rfilename: str(file.lfs.sha256 if file.lfs else file.blob_id or "") for file in files}

    def config(self) -> dict[str, Any]:
        """Fetch config.json under the name that the user gave, so that the cache knows the branch when offline."""
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(self.id, "config.json", revision=self.revision, token=self.token))
        if path.parent.name != self.commit:
            self.list(path.parent.name)
        return read_json(path)

    def snapshot(self, names: Collection[str], **bars: Any) -> Path:
        from huggingface_hub import snapshot_download

        literal = [name.replace("[", "[[]") for name in names]
        return Path(snapshot_download(self.id, revision=self.commit, token=self.token, allow_patterns=literal, **bars))

    def remember(self, name: str) -> None:
        """As :meth:`config` does, with another file that is here already."""
        from huggingface_hub import hf_hub_download

        hf_hub_download(self.id, name, revision=self.revision, token=self.token)

    def here(self) -> set[str]:
        """The names of the files that are in the cache, whole."""
        from huggingface_hub import try_to_load_from_cache

        return {n for n in self.sizes if isinstance(try_to_load_from_cache(self.id, n, revision=self.commit), str)}


def _download(
    repo: Repository, choice: Choice, progress: ProgressCallback, weights: bool, check_config: CheckConfig | None
) -> Snapshot:
    has_config, is_gguf = "config.json" in repo.sizes, choice.format == "gguf"
    if has_config:
        config = repo.config()
        if check_config is not None and not is_gguf:
            check_config(config)
    small = companions(repo.sizes, choice)
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
        return Snapshot(folder, repo.commit, choice, names, total, 0, contents=repo.contents)
    header = _header(repo, names[0], has_config, progress) if is_gguf else None
    return Snapshot(folder, repo.commit, choice, names, total, need, header, repo.contents)


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


def _cached(repo_id: str, options: LoadOptions, gguf: str | None, room: Room, why: str) -> Snapshot:
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
    return Snapshot(folder, folder.name, choice, shards, 0, contents=cached_contents(folder))


def cached_commit(repo_id: str, revision: str | None) -> str:
    """The commit that a branch or a tag was at when it was last asked for; any other name as it is."""
    ref = repository_folder(repo_id) / "refs" / (revision or "main")
    return read_text(ref).strip() if ref.is_file() else revision or "main"


def cached_contents(snapshot: Path) -> dict[str, str]:
    """The names that the cache gives to what is in the files; none where it has no links."""
    links = (path for path in snapshot.rglob("*") if path.is_symlink())
    return {path.relative_to(snapshot).as_posix(): path.readlink().name for path in links}


def cache_folder() -> Path:
    """Where downloads go."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(repo_id: str) -> Path:
    """Where downloads of a repository go."""
    return cache_folder() / f"models--{repo_id.replace('/', '--')}"


def _free() -> int | None:
    return free_disk(cache_folder())


def _check_disk(repo_id: str, need: int) -> None:
    cache, free = cache_folder(), _free()
    if free is not None and need > free:
        raise SourceError(f"{repo_id} needs {format_bytes(need)} more on disk but {cache} has {format_bytes(free)} "
                          "free; free some, or set HF_HOME to a folder on a larger disk")  # fmt: skip


def reporting_bars(progress: ProgressCallback, done: int, total: int, detail: str) -> type:
    """The library's own bars, which also report the bytes that reach the disk."""
    from huggingface_hub.utils import tqdm

    lock, state = threading.Lock(), {"done": done}

    class Bars(tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            # Of the byte bars, ".transfer" counts the same bytes on the wire.
            self._reports = kwargs.get("unit") == "B" and not str(kwargs.get("name")).endswith(".transfer")
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            if self._reports and n:
                with lock:
                    state["done"] = min(state["done"] + int(n), total)
                    progress(Progress("download", state["done"], total, detail=detail))
            return super().update(n)

    return Bars


def offline() -> bool:
    """Whether the environment forbids requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
