"""Adapters that came as pickles, written once as safetensors: one file each, in a folder beside the stores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..disk import entries, open_file, status
from ..errors import StoreError
from ..tensors.index import header_length
from .locks import exclusively

# Their folder, and how they are named.
ADAPTERS, COPY = "adapters", re.compile(r"(?P<model>.+)--[0-9a-f]{16}\.safetensors")
# Before all names in an adapter that peft saved.
_PEFT = "base_model."


def copies(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        if not folder.is_symlink():
            yield from sorted(path for path in entries(folder) if path.is_file())


def copied_from(path: Path) -> str | None:
    """What an adapter's copy was made from, empty where it was not noted; ``None`` if the file is no such copy."""
    if path.is_symlink() or path.parent.name != ADAPTERS or not COPY.fullmatch(path.name):
        return None
    header: Any = None
    with suppress(OSError, ValueError), open_file(path) as file:
        header = json.loads(file.read(header_length(path, file.read(8), status(path).st_size)))
    if not isinstance(header, dict):
        return None
    about = header.pop("__metadata__", None) or {}
    is_ours = header and all(name.startswith(_PEFT) for name in header)
    return str(about.get("origin", "")) if is_ours else None


def remove_copy(path: Path) -> int:
    with exclusively(path.parent) as is_free:
        if not is_free:
            raise StoreError(f"{path} may be in use; unload the model, or end the process that has it open")
        nbytes = status(path).st_size
        path.unlink()
        return nbytes
