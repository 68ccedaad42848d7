"""A disk that fails: the n-th operation on the files below some folders goes wrong, whoever asks for it.

Python's own functions are replaced, so that what goes through :mod:`pathlib`, ``open`` and the package's door meets it,
in this package and in the libraries that it uses; what their compiled parts read does not.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from airllm_nb import disk
from airllm_nb.tensors import libc

SHORT = "short"
READS = ("open", "stat", "listdir", "scandir", "preadv", "readinto", "readall", "map_file")
WRITES = ("create", "write", "fsync", "replace", "unlink", "mkdir", "rmdir", "utime")
# What may happen to an operation: an error number, or half of what was asked for.
KINDS: dict[str, tuple[int | str, ...]] = {
    "open": (errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE),
    "stat": (errno.EACCES, errno.EIO, errno.ESTALE),
    "preadv": (errno.EIO, SHORT, errno.ESTALE, errno.EACCES),
    "readinto": (errno.EIO, SHORT),
    "readall": (errno.EIO,),
    "map_file": (errno.EIO, errno.ENOMEM, errno.ENODEV),
    "create": (errno.ENOSPC, errno.EACCES, errno.EMFILE),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC),
}
OTHERS = (errno.EIO, errno.EACCES)


class Faults:
    """Counts the operations below ``roots`` and lets one of them go wrong.

    Parameters
    ----------
    at
        Which, counted from 0; ``None`` only counts.
    turn
        Chooses among what may happen to an operation.
    """

    def __init__(self, roots: Sequence[Path], at: int | None = None, turn: int = 0):
        self._roots = tuple(os.fspath(root.resolve()) for root in roots)
        self._at, self._turn, self._lock, self._counter = at, turn, threading.Lock(), itertools.count()
        self.operations: list[str] = []
        self.done = ""

    @contextmanager
    def on(self) -> Iterator[Faults]:
        """Operations are counted from here to the end of this."""
        with ExitStack() as stack:

            def put(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
                stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

            for name in ("stat", "listdir", "scandir", "unlink", "replace", "mkdir", "rmdir", "utime", "open"):
                put(os, name, lambda real, name=name: self._call(name, real))
            for name in ("preadv", "fsync"):
                put(os, name, lambda real, name=name: self._call(name, real, by_number=True))
            put(libc, "map_file", lambda real: self._call("map_file", real, by_number=True))
            for owner in (io, builtins):
                put(owner, "open", self._opening)
            stack.enter_context(mock.patch.object(disk, "_File", self._file()))
            yield self

    def _fault(self, what: str, path: object) -> int | str | None:
        """What is to happen to this operation, if anything."""
        name = _name(path)
        if not name.startswith(self._roots):
            return None
        with self._lock:
            number = next(self._counter)
            self.operations.append(f"{what} {name}")
            if number != self._at:
                return None
            kinds = KINDS.get(what, OTHERS)
            kind = kinds[self._turn % len(kinds)]
            self.done = f"{what} {name}: {kind if kind == SHORT else errno.errorcode[int(kind)]}"
            return kind

    def _raise(self, kind: int | str | None, path: object) -> None:
        if isinstance(kind, int):
            raise OSError(kind, os.strerror(kind), *([] if isinstance(path, int) else [path]))

    def _call(self, what: str, real: Any, by_number: bool = False) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = args[0] if args else "."
            if what == "stat" and isinstance(path, int):
                return real(*args, **kwargs)
            makes = what == "open" and args[1:] and args[1] & os.O_CREAT
            kind = self._fault("create" if makes else what, path)
            if kind == SHORT:
                data = bytearray(max(len(args[1][0]) // 2, 1))
                got = real(args[0], [data], *args[2:], **kwargs)
                args[1][0][:got] = data[:got]
                return got
            self._raise(kind, path)
            return real(*args, **kwargs)

        return call

    def _opening(self, real: Any) -> Any:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = any(letter in mode for letter in "wax+")
            if not isinstance(file, int):  # what is open already was opened by an operation of its own
                self._raise(self._fault("create" if writes else "open", file), file)
            made = real(file, mode, *args, **kwargs)
            if writes and "b" in mode and self._roots and _name(file).startswith(self._roots):
                return _Written(made, lambda: self._raise(self._fault("write", file), file))
            return made

        return opened

    def _file(self) -> Any:
        faults = self

        class Failing(io.FileIO):
            def __init__(self, path: Path):
                super().__init__(os.fspath(path), opener=lambda name, _: disk._open(name))

            def readinto(self, buffer: Any) -> Any:
                with disk.told(str(self.name)):
                    kind = faults._fault("readinto", self.name)
                    faults._raise(kind, self.name)
                    view = memoryview(buffer)
                    return super().readinto(view[: max(len(view) // 2, 1)] if kind == SHORT else view)

            def readall(self) -> bytes:
                with disk.told(str(self.name)):
                    faults._raise(faults._fault("readall", self.name), self.name)
                    return super().readall()

        return Failing


def _name(path: Any) -> str:
    """The absolute path of what a path or a descriptor means; empty if there is none."""
    try:
        if isinstance(path, int):
            return str(Path(f"/proc/self/fd/{path}").readlink())
        return os.path.abspath(os.fspath(path))  # noqa: PTH100 - pathlib's way would look at the disk
    except (OSError, TypeError):
        return ""


class _Written:
    """A file whose writes are operations."""

    def __init__(self, file: Any, before: Callable[[], None]):
        self._file, self._before = file, before

    def write(self, data: Any) -> Any:
        self._before()
        return self._file.write(data)

    def __enter__(self) -> Any:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
