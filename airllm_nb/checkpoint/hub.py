"""A Hub id → files in the Hub's own cache: listed first, the config looked at, the disk checked, then downloaded.

With :mod:`~airllm_nb.checkpoint.hub_headers`, all that imports ``huggingface_hub`` here. Its cache, its token, its
environment variables (``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``) and its progress bars are used as they are.
"""

from __future__ import annotations

import errno
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..config import LoadOptions, format_bytes
from ..disk import free_disk
from ..errors import CheckpointError, SourceError
from ..trace import Progress, ProgressCallback
from .layout import Choice, choose, companions, shard_names

log = logging.getLogger(__name__)

CheckConfig = Callable[[dict[str, Any]], None]


class Snapshot(NamedTuple):
    """A repository at one commit: ``weights`` are names relative to ``folder``; ``nbytes`` is 0 when unknown.

    ``missing`` is how many of those bytes are not here yet, ``None`` when unknown.
    """

    folder: Path
    commit: str
    choice: Choice
    weights: tuple[str, ...]
    nbytes: int
    missing: int | None = None


def fetch(
    repo_id: str,
    options: LoadOptions,
    *,
    progress: ProgressCallback,
    weights: bool,
    check_config: CheckConfig | None,
    gguf: str | None = None,
) -> Snapshot:
    """Bring a repository into the local cache; without ``weights`` only config, tokenizer and index.

    Raises
    ------
    SourceError
        If it cannot be found, reached or stored; one line with the remedy.
    CheckpointError
        If it holds nothing that can be loaded.
    """
    if options.local_files_only or offline():
        return _cached(repo_id, options, gguf, "local_files_only=True or HF_HUB_OFFLINE")
    with _explained(repo_id, options):
        try:
            return _download(_Repository(repo_id, options), progress, weights, check_config, gguf)
        except unreachable() as error:
            try:
                found = _cached(repo_id, options, gguf, "no connection")
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


class _Repository:
    """One repository at one commit, through the Hub's library."""

    def __init__(self, repo_id: str, options: LoadOptions):
        from huggingface_hub import HfApi

        self.id, self.token, self.revision = repo_id, options.hf_token, options.revision
        self._api = HfApi(token=options.hf_token)
        self.list(options.revision)

    def list(self, revision: str | None) -> None:
        info = self._api.model_info(self.id, revision=revision, files_metadata=True, timeout=30)
        self.commit = str(info.sha)
        self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}

    def config(self) -> dict[str, Any]:
        """Fetch config.json under the name that the user gave, so that the cache knows the branch when offline."""
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(self.id, "config.json", revision=self.revision, token=self.token))
        if path.parent.name != self.commit:
            self.list(path.parent.name)
        return read_json(path)

    def snapshot(self, names: tuple[str, ...], **bars: Any) -> Path:
        from huggingface_hub import snapshot_download

        literal = [name.replace("[", "[[]") for name in names]
        return Path(snapshot_download(self.id, revision=self.commit, token=self.token, allow_patterns=literal, **bars))

    def missing(self, names: tuple[str, ...]) -> int:
        """Bytes of ``names`` that are not in the cache yet."""
        from huggingface_hub import try_to_load_from_cache

        here = {name for name in names if isinstance(try_to_load_from_cache(self.id, name, revision=self.commit), str)}
        return sum(self.sizes.get(name, 0) for name in names if name not in here)


def _download(
    repo: _Repository, progress: ProgressCallback, weights: bool, check_config: CheckConfig | None, gguf: str | None
) -> Snapshot:
    choice = choose(repo.sizes, repo.id, gguf)
    if "config.json" in repo.sizes:
        config = repo.config()
        if check_config is not None and choice.format != "gguf":
            check_config(config)
    elif not weights:
        raise SourceError(f"{repo.id}: the config of a GGUF model is inside the weight file; load the model, or "
                          f"download {choice.weights[0]} and name the local file")  # fmt: skip
    small = companions(repo.sizes, choice)
    folder = repo.snapshot(small) if small else Path()
    names = shard_names(folder / choice.index) if choice.index else choice.weights
    absent = [name for name in names if name not in repo.sizes]
    if absent:
        raise CheckpointError(f"{repo.id}: {choice.index} names {absent[0]}, which the repository does not hold "
                              f"({len(absent)} of {len(names)} shards missing)")  # fmt: skip
    total, need = sum(repo.sizes[name] for name in names), repo.missing(names)
    if weights:
        _check_disk(repo.id, need)
        bars = _reporting_bars(progress, total - need, total, repo.id)
        folder = repo.snapshot(names, tqdm_class=bars)
        progress(Progress("download", total, total, detail=repo.id))
    return Snapshot(folder, repo.commit, choice, names, total, 0 if weights else need)


def _cached(repo_id: str, options: LoadOptions, gguf: str | None, why: str) -> Snapshot:
    """The repository as far as the cache holds it, without any request."""
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    config = try_to_load_from_cache(repo_id, gguf or "config.json", revision=options.revision)
    try:
        # Without a config (a GGUF repository) any cached snapshot will do: its listing decides.
        found = config if isinstance(config, str) else None
        folder = (
            Path(found).parents[len(Path(gguf or "x").parts) - 1]
            if found
            else Path(
                snapshot_download(repo_id, revision=options.revision, local_files_only=True, allow_patterns=["*.gguf"])
            )
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise SourceError(f"{repo_id} is not in the local cache ({constants.HF_HUB_CACHE}) and the Hub is not asked "
                          f"({why}); download it once with a connection, or name a local folder") from None  # fmt: skip
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    choice = choose(names, repo_id, gguf)
    shards = shard_names(folder / choice.index) if choice.index else choice.weights
    return Snapshot(folder, folder.name, choice, shards, 0)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises
    ------
    CheckpointError
        If it is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return value


def cache_folder() -> Path:
    """Where downloads go."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _check_disk(repo_id: str, need: int) -> None:
    cache = cache_folder()
    free = free_disk(cache)
    if free is not None and need > free:
        raise SourceError(f"{repo_id} needs {format_bytes(need)} more on disk but {cache} has {format_bytes(free)} "
                          "free; free some, or set HF_HOME to a folder on a larger disk")  # fmt: skip


def _reporting_bars(progress: ProgressCallback, done: int, total: int, detail: str) -> type:
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


def unreachable() -> tuple[type[BaseException], ...]:
    """What a missing connection raises; the HTTP library below differs between versions of the Hub's."""
    from huggingface_hub import errors

    http = getattr(errors, "HTTPError", None)
    return tuple(kind for kind in (http, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) if kind)


@contextmanager
def _explained(repo_id: str, options: LoadOptions) -> Iterator[None]:
    """Turn what the Hub's library raises into one line with the remedy."""
    try:
        yield
    except (SourceError, CheckpointError):
        raise
    except Exception as error:
        line = _explain(error, repo_id, options)
        if line is None:
            raise
        raise SourceError(line) from error


def _explain(error: Exception, repo_id: str, options: LoadOptions) -> str | None:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        return (f"{repo_id} is gated: accept its licence at {page}, then give a token with access as hf_token=... or "
                "in the environment as HF_TOKEN")  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {options.revision!r}; name a branch, a tag or a commit that exists"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return (f"{repo_id} is neither a local folder nor a repository on the Hub that can be seen; check the "
                "spelling, and if it is private give hf_token=... or HF_TOKEN")  # fmt: skip
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (f"the disk of {constants.HF_HUB_CACHE} is full while downloading {repo_id}; free some, or set HF_HOME "
                "to a folder on a larger disk, and load again")  # fmt: skip
    if isinstance(error, PermissionError):
        return f"the cache {constants.HF_HUB_CACHE} cannot be written ({error}); set HF_HOME to a folder that can"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refuses access to {repo_id} ({status}); check the token in hf_token=... or HF_TOKEN"
    if status is not None:
        return f"the Hub answers {status} for {repo_id}; try again later, what was downloaded is kept"
    if isinstance(error, (*unreachable(), errors.LocalEntryNotFoundError, errors.EntryNotFoundError)):
        return (f"the Hub cannot be reached for {repo_id} ({type(error).__name__}) and the cache does not hold it; "
                "check the connection, or name a local folder")  # fmt: skip
    return None
