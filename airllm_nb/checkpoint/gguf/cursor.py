"""Walks through the header of a GGUF file, however much of the file is here, and trusts no length in it."""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError, UnsupportedModelError

# GGUF value type → struct format; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
# Far above what any model has; what a file of zeros would take minutes to walk through, or gigabytes to hold.
_MAX_STRINGS, _MAX_TEXT = 1 << 22, 1 << 27
# What messages call a file that stands for one elsewhere.
_CALLED: dict[Path, str] = {}


class _Arrays:
    """numpy, but for its ``memmap``: a view of that, as a plain array."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def memmap(*args: Any, **kwargs: Any) -> Any:
        return np.asarray(np.memmap(*args, **kwargs))


@contextlib.contextmanager
def read_as_array() -> Iterator[None]:
    """The gguf package reads a header by slices of a ``memmap``; of an array they take a third of the time.

    That is ten seconds for a vocabulary of a quarter million words. Where a thread ends this for another one, that one
    is slower, and no more.
    """
    from gguf import gguf_reader

    gguf_reader.np = _Arrays()
    try:
        yield
    finally:
        gguf_reader.np = np


class Truncated(CheckpointError):
    """The header goes on behind the last byte."""


class Cursor:
    """A position in a file, or in its beginning, that never runs past the end."""

    def __init__(self, data: mmap.mmap | bytes, path: Path):
        self.data, self.path, self.pos = data, path, 0

    def skip(self, nbytes: int) -> int:
        start, self.pos = self.pos, self.pos + nbytes
        if self.pos > len(self.data):
            raise damaged(self.path, f"its header runs past the end of the file ({len(self.data):,} bytes)", Truncated)
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        if length > _MAX_TEXT:
            raise damaged(self.path, f"the text at byte {start:,} should take {length:,} bytes")
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"the text at byte {start:,} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        raise damaged(self.path, f"value type {kind} at byte {self.pos:,} is unknown")

    def _array(self) -> int:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            if count > _MAX_STRINGS:
                raise damaged(self.path, f"an array at byte {self.pos:,} should hold {count:,} texts")
            for _ in range(count):
                self.skip(self.scalar("Q"))
        else:
            raise damaged(self.path, f"an array of value type {kind} at byte {self.pos:,} is not allowed")
        return int(count)


# Shape, type and offset.
_Entry = tuple[tuple[int, ...], int, int]


def _entry(cursor: Cursor) -> tuple[str, _Entry]:
    name, dims = cursor.string(), cursor.scalar("I")
    if dims > _MAX_DIMS:
        raise damaged(cursor.path, f"tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dims))
    return name, (shape[::-1], cursor.scalar("I"), cursor.scalar("Q"))


def walk(data: mmap.mmap | bytes, path: Path) -> tuple[dict[str, Any], dict[str, _Entry], int]:
    """Metadata, table of tensors, and where the header ends.

    Raises
    ------
    Truncated
        If it does not end in ``data``.
    CheckpointError, UnsupportedModelError
        If it is damaged, or not one that can be read.
    """
    cursor = Cursor(data, path)
    if data[cursor.skip(4) : 4] != b"GGUF":
        raise CheckpointError(f"{called(path)} is not a GGUF file (it does not begin with 'GGUF'); download it "
                              "again or name a folder of safetensors")  # fmt: skip
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise UnsupportedModelError(f"{called(path)} is GGUF version {version} (big-endian or too old or new); "
                                    "versions 2 and 3 work, convert it again with llama.cpp")  # fmt: skip
    tensor_count, kv_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(kv_count):
        if (key := cursor.string()) in metadata:
            raise damaged(path, f"its metadata has {key!r} twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    table: dict[str, _Entry] = {}
    for _ in range(tensor_count):
        name, entry = _entry(cursor)
        if name in table:
            raise damaged(path, f"it holds the tensor {name!r} twice")
        table[name] = entry
    return metadata, table, cursor.pos


def call(path: Path, name: str) -> None:
    """Let messages about ``path``, which stands for a file that is elsewhere, name that file."""
    _CALLED[path] = name


def called(path: Path) -> str:
    """What messages call a file."""
    return _CALLED.get(path, str(path))


def damaged(path: Path, what: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
    """The error for a file whose header cannot be true."""
    return kind(f"{called(path)} is truncated or damaged: {what}; download the file again")
