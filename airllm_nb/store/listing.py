"""The stores below a folder: what each is of, its size, who uses it; and removing one, whole or not at all.

Only what is provably a store is listed, and only what is listed can be removed. Links are never followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..disk import entries, open_file, read_json, status, told
from ..errors import StoreError
from ..tensors.index import header_length
from ..tensors.inside import inside
from . import names
from .locks import contents, exclusively, in_use, vacated
from .names import ADAPTER, ADAPTERS, BESIDE, JOURNAL, LOCK, MANIFEST, SYNTHETIC, StoreName

_MANIFEST_KEYS = {"codec", "dtype", "source", "format", "shards", "parameters"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+/(.+)")
# Before all names in an adapter that peft saved.
_PEFT = "base_model."

State = Literal["finished", "unfinished", "converting", "damaged", "half removed"]


@dataclass(frozen=True)
class CachedStore:
    """One store on the disk; of an adapter, the one file.

    Attributes
    ----------
    name
        Of the folder, relative to where the stores are.
    model, codec, dtype
        What it is of; empty where that is not known.
    nbytes
        Of all its files.
    state
        ``"converting"`` by some process now, ``"damaged"`` where a shard is missing or has another size.
    used
        When it was last written or opened, in seconds since the epoch.
    is_open
        Whether a process reads from it.
    origin, revision, source
        Hub id or path that it was made from, the commit, and the fingerprint; empty where they were not noted.
    """

    name: str
    folder: Path
    model: str
    codec: str
    dtype: str
    nbytes: int
    state: State
    used: float
    is_open: bool
    origin: str = ""
    revision: str = ""
    source: str = ""

    @property
    def what(self) -> str:
        """What it holds, in a word or two; empty where that is not known."""
        if self.codec == BESIDE:
            return "beside GGUF" if self.origin.endswith(".gguf") else "beside"
        return "plain" if self.codec == "none" else self.codec

    @property
    def made_from(self) -> str:
        """``origin`` as a model is named: a file in the Hub's cache as ``ORG/REPO:FILE``."""
        return named(self.origin)


def cached_stores(base: Path, strict: bool = False) -> list[CachedStore]:
    """The stores directly below ``base``, by name; none where there is no such folder.

    Nor where it cannot be listed, unless ``strict``: then that is a ``FileError``.
    """
    found = (_look(folder, base) for folder in _folders(base, strict))
    copies = (_copy(path, base) for path in _files(base / ADAPTERS))
    return [store for store in (*found, *copies) if store is not None]


def written_beside(folder: Path) -> str | None:
    """Of a folder that holds only what was written beside a checkpoint: that checkpoint, empty where it was not noted.

    ``None`` of any other folder.
    """
    name = StoreName.parse(folder.resolve().name)
    return origin_of(folder) if name is not None and name.codec == BESIDE else None


def origin_of(folder: Path) -> str | None:
    """What a finished store says that it was made from, empty where it was not noted; ``None`` if it is none."""
    manifest = _json(folder / MANIFEST)
    return str(manifest.get("origin", "")) if _is_manifest(manifest) else None


def named(origin: str) -> str:
    """A path in the Hub's cache as ``ORG/REPO:FILE``, any other as it is."""
    found = _SNAPSHOT.fullmatch(Path(origin).as_posix())
    return f"{found[1].replace('--', '/', 1)}:{found[2]}" if found else origin


@told()
def remove_store(folder: Path) -> int:
    """Remove a store and all that is in its folder; returns the bytes that it had. One that has gone is no error.

    Raises
    ------
    StoreError
        If a process writes into it or reads from it, or it cannot be removed.
    """
    before = folder
    try:
        if folder.is_file() and _copied_from(folder) is not None:
            return _remove_copy(folder)
        if folder.is_symlink() or not folder.is_dir():
            return 0
        with vacated(folder):
            # Looked at again: it may be another one by now, or none.
            if not _is_ours(folder):
                raise StoreError(f"{folder} is not a store any more; nothing of it was removed")
            nbytes = contents(folder)[0]
            if names.removed(folder.name) is None:
                folder = folder.rename(folder.with_name(names.removing(folder.name)))
            _empty(folder)
            folder.rmdir()
            return nbytes
    except StoreError:
        raise
    except FileNotFoundError:
        return 0
    except OSError as error:
        left = f"; what is left is in {folder}" if folder != before else ""
        raise StoreError(f"{before} cannot be removed ({error.strerror or error}){left}; check who owns it and "
                         "remove it again") from error  # fmt: skip


def _empty(folder: Path) -> None:
    """The manifest first, and last the file that says whose this is."""
    order = {MANIFEST: 0, JOURNAL: 0, LOCK: 2}
    for path in sorted(entries(folder), key=lambda path: order.get(path.name, 1)):
        if path.is_dir() and not path.is_symlink():
            _empty(path)
            path.rmdir()
        else:
            path.unlink()


def _folders(base: Path, strict: bool) -> Iterator[Path]:
    for above in (base, base / SYNTHETIC):
        with suppress(FileNotFoundError if strict else OSError):
            found = sorted(path for path in entries(above) if not path.is_symlink() and path.is_dir())
            yield from (path for path in found if _is_ours(path))


def _files(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        if not folder.is_symlink():
            yield from (path for path in entries(folder) if path.is_file())


def _is_ours(folder: Path) -> bool:
    """A manifest or a journal of ours; or our lock, in a folder that is named as only we name them."""
    if _is_manifest(_json(folder / MANIFEST)) or _is_journal(folder / JOURNAL):
        return True
    is_synthetic = folder.parent.name == SYNTHETIC
    if is_synthetic and "recipe" in _json(folder / names.SYNTHETIC_MARKER):
        return True
    if names.removed(folder.name) is not None and not any(entries(folder)):
        return True
    is_named = names.removed(folder.name) is not None or StoreName.parse(folder.name) is not None
    return (is_named or (is_synthetic and names.is_partial(folder.name))) and (folder / LOCK).is_file()


def _is_manifest(found: dict[str, Any]) -> bool:
    return found.keys() >= _MANIFEST_KEYS


def _is_journal(path: Path) -> bool:
    with suppress(OSError, ValueError), open_file(path) as file:
        first = json.loads(file.readline(1 << 16))
        return isinstance(first, dict) and _SHA256.fullmatch(str(first.get("key", ""))) is not None
    return False


def _look(folder: Path, base: Path) -> CachedStore | None:
    """``None`` if it goes away meanwhile."""
    try:
        manifest, use = _json(folder / MANIFEST), in_use(folder)
        nbytes, used = contents(folder)
        state = _state(folder, manifest, use)
    except FileNotFoundError:
        return None
    name = folder.relative_to(base).as_posix()
    before = names.removed(folder.name) or folder.name
    parts = StoreName.parse(before) or StoreName(before, "", "", "")
    codec, dtype = manifest.get("codec", parts.codec), manifest.get("dtype", parts.dtype)
    # The codec of the name says more where the manifest's is none: what of the model it holds.
    codec = parts.codec if codec == "none" and parts.codec else codec
    where_from = (str(manifest.get(key, "")) for key in ("origin", "revision", "source"))
    return CachedStore(name, folder, parts.model, str(codec), str(dtype), nbytes, state, used, use == "open",
                       *where_from)  # fmt: skip


def _copy(path: Path, base: Path) -> CachedStore | None:
    origin, name = _copied_from(path), StoreName.parse_copy(path.name)
    if origin is None or name is None:
        return None
    try:
        found, use = status(path), in_use(path.parent)
    except FileNotFoundError:
        return None
    used = max(found.st_atime, found.st_mtime)
    return CachedStore(path.relative_to(base).as_posix(), path, name.model, ADAPTER, "", found.st_size, "finished",
                       used, use == "open", origin)  # fmt: skip


def _copied_from(path: Path) -> str | None:
    """What an adapter's copy was made from, empty where it was not noted; ``None`` if the file is no such copy."""
    if path.is_symlink() or path.parent.name != ADAPTERS or StoreName.parse_copy(path.name) is None:
        return None
    header: Any = None
    with suppress(OSError, ValueError), open_file(path) as file:
        header = json.loads(file.read(header_length(path, file.read(8), status(path).st_size)))
    if not isinstance(header, dict):
        return None
    about = header.pop("__metadata__", None) or {}
    is_ours = header and all(name.startswith(_PEFT) for name in header)
    return str(about.get("origin", "")) if is_ours else None


def _remove_copy(path: Path) -> int:
    with exclusively(path.parent) as is_free:
        if not is_free:
            raise StoreError(f"{path} may be in use; unload the model, or end the process that has it open")
        nbytes = status(path).st_size
        path.unlink()
        return nbytes


def _state(folder: Path, manifest: dict[str, Any], use: str) -> State:
    if names.removed(folder.name) is not None:
        return "half removed"
    if use == "converting":
        return "converting"
    if (folder / names.SYNTHETIC_MARKER).is_file():
        files = _json(folder / names.SYNTHETIC_MARKER).get("files", {})
        return "finished" if are_whole(folder, files) else "damaged"
    if not _is_manifest(manifest):
        return "damaged" if (folder / MANIFEST).is_file() else "unfinished"
    try:
        files = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    except (TypeError, KeyError):
        return "damaged"
    return "finished" if are_whole(folder, files) else "damaged"


def are_whole(folder: Path, files: Any) -> bool:
    """Whether all files are there in their sizes, whatever was read as those."""
    try:
        return all(status(inside(folder, name)).st_size == nbytes for name, nbytes in files.items())
    except (OSError, TypeError, ValueError, AttributeError):
        return False


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_json(path)
    return {}
