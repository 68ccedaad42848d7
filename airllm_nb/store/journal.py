"""What makes a conversion resumable: a journal of finished shards, and small files that are whole or not there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..disk import open_file, status
from ..errors import CheckpointError
from ..tensors.inside import inside
from .leftovers import begin
from .locks import JOURNAL, locked
from .shard import sync_folder

__all__ = ["Journal", "locked", "write_atomically"]

log = logging.getLogger(__name__)


class Journal:
    """The finished shards of an unfinished store, one line each, synced before the next shard begins.

    A line that a kill cut short is ignored, and so is a journal of another configuration.

    Parameters
    ----------
    folder
        The store's.
    key
        Identifies source, codec, dtype and format.
    known
        Records that are true already, from the manifest of a damaged store.
    """

    def __init__(self, folder: Path, key: str, known: Mapping[str, dict[str, Any]]):
        self._path = folder / JOURNAL
        self.records: dict[str, dict[str, Any]] = {**known, **self._read(key)}
        # Written anew, so that a line cut short is never continued.
        write_atomically(self._path, b"".join(_line(r) for r in [{"key": key}, *self.records.values()]))

    def add(self, record: dict[str, Any]) -> None:
        """Record a shard that is on the disk."""
        with self._path.open("ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self.records[record["file"]] = record

    def has(self, file: str, key: str, nbytes: int) -> bool:
        """Whether a shard is recorded so, and there."""
        record, path = self.records.get(file), self._path.parent / file
        return (record is not None and record["key"] == key
                and path.is_file() and status(path).st_size == record["bytes"] == nbytes)  # fmt: skip

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()

    def _read(self, key: str) -> dict[str, dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        with suppress(FileNotFoundError), open_file(self._path) as file:
            for line in file:
                with suppress(ValueError):
                    value = json.loads(line)
                    lines += [value] if isinstance(value, dict) else []
        if lines and lines[0].get("key") != key:
            log.warning("%s: the unfinished conversion there had another configuration; starting anew", self._path)
            self._discard(lines[1:])
            return {}
        return {line["file"]: line for line in lines[1:] if {"file", "key", "bytes", "sha256"} <= line.keys()}

    def _discard(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            name = str(record.get("file", ""))
            if name.endswith(".safetensors") and "/" not in name:
                with suppress(FileNotFoundError, CheckpointError):
                    inside(self._path.parent, name).unlink()


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a small file by way of a temporary one: it is whole or it is not there, whoever writes it at once.

    Parameters
    ----------
    mode
        What may be done with it at most; the process may have a stricter rule for new files.
    """
    temporary, file = begin(path, mode)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":  # still locked, so that nobody takes it for a leftover
                temporary.replace(path)
        if os.name == "nt":
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode() + b"\n"
