"""A repository on the Hub, and the Hub's own cache.

This folder is all that imports ``huggingface_hub`` here. Its cache, its token, its
environment variables (``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``) and its progress bars are used as they are.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ...config import LoadOptions
from ...disk import read_json, read_text
from ...progress import Progress, ProgressCallback
from ...tensors.inside import is_inside

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


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
