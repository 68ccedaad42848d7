"""A finished store: a folder of safetensors shards, and the manifest that says what they are, which is written last."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..disk import entries, open_file, read_json, status
from ..encoding.base import PART
from ..errors import FileError, StoreError
from ..progress import Progress, ProgressCallback, silent
from ..tensors.index import PAD, CheckpointIndex, TensorInfo, read_header
from ..tensors.inside import inside
from .locks import tidy
from .names import MANIFEST, is_shard, parse_expert
from .shard import ShardJob

# The newest that is read. What has no experts apart is written as the first, which earlier versions read too.
FORMAT = 2
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors \d+ [0-9a-f]{64}")


@dataclass(frozen=True)
class StoreMeta:
    """What a store is of; two stores with equal meta and equal jobs are the same bytes.

    Parameters
    ----------
    codec
        ``"none"``, ``"4bit"`` or ``"8bit"``.
    dtype
        The dtype that the weights were cast to before they were encoded, as in ``"bfloat16"``.
    source
        Fingerprint of the source files.
    """

    codec: str
    dtype: str
    source: str

    @property
    def key(self) -> str:
        return _digest({**asdict(self), "format": 1})  # of the second the shards' entries are others

    def key_of(self, job: ShardJob) -> str:
        """The same for shards that would be written the same."""
        return _digest({"store": self.key, "entries": [(e.name, e.dtype, e.shape) for e in job.entries()]})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Store:
    """A finished store; holds no weights.

    Attributes
    ----------
    folder
        Where it is.
    meta
        What it is of.
    shards
        File, bytes, sha256 and key of each.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder = folder
        self.meta = StoreMeta(manifest["codec"], manifest["dtype"], manifest["source"])
        self.shards: list[dict[str, Any]] = manifest["shards"]
        said = (f"{inside(folder, s['file']).relative_to(folder)} {s['bytes']!r} {s['sha256']}" for s in self.shards)
        if not all(map(_SHARD.fullmatch, said)):
            raise ValueError("a shard's entry makes no sense")

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.folder / shard["file"] for shard in self.shards)

    @property
    def nbytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    @functools.cached_property
    def index(self) -> CheckpointIndex:
        """The stored tensors by name, the parts of encoded parameters included, padding left out.

        What all experts of a module have is one tensor, which lies in as many places.
        """
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            tensors |= {name: info for name, info in read_header(file).items() if not name.startswith(PAD)}
        return CheckpointIndex(_stacked(self.folder, tensors), self.files)

    def verify(self, progress: ProgressCallback = silent) -> None:
        """Read every byte and compare it with what was written.

        Raises
        ------
        StoreError
            If a shard is not what it was; the message names it.
        """
        self.check()
        for path, digest, written in damaged(self.folder, self.shards, progress):
            raise StoreError(f"{path} is not what was written (its sha256 begins {digest[:12]}, the manifest has "
                             f"{written[:12]}); delete it and convert again")  # fmt: skip

    def check(self) -> None:
        """Raise :class:`StoreError` if a shard is missing or has another size."""
        for shard in self.shards:
            path = self.folder / shard["file"]
            size = status(path).st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
                raise StoreError(f"{path} {found}; convert again, the other shards are kept")


def _stacked(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of single experts below one another: ``[number, *shape of one]``."""
    whole: dict[str, TensorInfo] = {}
    apart: dict[str, dict[int, TensorInfo]] = {}
    for name, info in tensors.items():
        if (said := parse_expert(name)) is None:
            whole[name] = info
        else:
            module, number, rest = said
            apart.setdefault(f"{module}.{rest.replace('.', PART)}", {})[number] = info
    for name, found in apart.items():
        each = [found[number] for number in sorted(found)]
        if len(each) != max(found) + 1 or len({(info.dtype, info.shape) for info in each}) > 1:
            raise StoreError(f"{folder} is damaged: {name} is not there for each expert alike; delete it and convert "
                             "again")  # fmt: skip
        extents = tuple(extent for info in each for extent in info.extents)
        whole[name] = TensorInfo(name, each[0].dtype, (len(each), *each[0].shape), extents)
    return whole


def damaged(
    folder: Path, shards: list[dict[str, Any]], progress: ProgressCallback = silent
) -> Iterable[tuple[Path, str, str]]:
    """The shards that are not what was written, with the sha256 that each has, and had; reads every byte."""
    done, total = 0, sum(shard["bytes"] for shard in shards)
    for shard in shards:
        path, digest = folder / shard["file"], hashlib.sha256()
        with open_file(path) as file:
            while block := file.read(8 << 20):
                digest.update(block)
                done += len(block)
                progress(Progress("verify", done, total, detail=shard["file"]))
        if digest.hexdigest() != shard["sha256"]:
            yield path, digest.hexdigest(), shard["sha256"]


def open_store(folder: Path) -> Store | None:
    """The finished store in ``folder``, or ``None`` when there is none; sizes are checked, sums are not.

    Raises
    ------
    StoreError
        If the manifest or a shard is damaged, or was written by a newer version.
    """
    store = read_manifest(folder)
    if store is not None:
        store.check()
        tidy(folder)
    return store


def finished_store(folder: Path, meta: StoreMeta, jobs: Iterable[ShardJob]) -> Store | None:
    """The finished store, if it is this one; ``None`` if there is work to do, damage to repair included."""
    try:
        store = open_store(folder)
    except StoreError:
        if _is_newer(folder):
            raise
        return None
    if store is None:
        return None
    if store.meta != meta or [shard.get("key") for shard in store.shards] != [meta.key_of(job) for job in jobs]:
        raise StoreError(f"{folder} holds a store of other weights or with other options ({store.meta.codec}, "
                         f"{store.meta.dtype}); name another folder or delete this one")  # fmt: skip
    return store


def read_manifest(folder: Path) -> Store | None:
    """What a finished store says of itself, its shards not looked at; ``None`` where there is none.

    Nor where no shard of ours lies beside a manifest that cannot be read: it is another program's.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    if _is_newer(folder):
        raise StoreError(f"{path} was written by a newer version of airllm_nb; update it, or delete {folder}")
    try:
        return Store(folder, read_json(path))
    except FileError:
        raise  # the disk's fault: the store may be whole
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if any(is_shard(file.name) for file in entries(folder)):
            raise StoreError(f"{path} is damaged ({error!r}); delete it and convert again") from None
        return None


def _is_newer(folder: Path) -> bool:
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return int(read_json(folder / MANIFEST).get("format", 0)) > FORMAT
    return False
