"""The disk: the one door through which files are opened and read, and how much room a folder has.

Whatever a disk, a network or its rights refuse is a :class:`~airllm_nb.errors.FileError` of one line that names the
file and the remedy; ``tests/test_layering.py`` says that no other module opens a file to read it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, overload

from .errors import AirLLMError, CheckpointError, FileError, MissingFileError, OptionError

log = logging.getLogger(__name__)

# More than any config, index or tokenizer takes; what is larger is no such file.
MOST_BYTES = 128 << 20
# What some file systems say that can be read, but not mapped.
UNMAPPABLE = (errno.ENODEV, errno.EOPNOTSUPP)
# Opening a pipe would wait for somebody who writes into it.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes; reading it raises ``FileError`` too. Use it in ``with``.

    Raises
    ------
    FileError
        If it cannot be opened, or is a folder, a pipe or a device.
    """
    with told(path, "opened"):
        return cast(BinaryIO, io.BufferedReader(_File(path)))


def open_descriptor(path: Path, flags: int = 0) -> int:
    """As :func:`open_file`, a descriptor for positional reads, with further ``flags``; whoever asks closes it."""
    with told(path, "opened"):
        return _open(path, flags)


def status(path: Path) -> os.stat_result:
    """Size, time and kind of a file or folder; raises ``FileError``."""
    with told(path, "opened"):
        return path.stat()


def is_file(path: Path) -> bool:
    """Whether it is a regular file; nothing can be where no file can be called so, or this user may not look."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name; raises ``FileError``."""
    with told(folder, "listed"):
        return sorted(folder.iterdir())


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A whole small file; raises ``FileError``, or ``CheckpointError`` if it has more than ``most`` bytes."""
    with open_file(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise CheckpointError(f"{path} has more than {most:,} bytes, which no such file takes; is it another file?")
    return data


def read_text(path: Path) -> str:
    """A small file of UTF-8; raises ``FileError``, or ``CheckpointError`` if it is none."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: its byte {error.start:,} is not UTF-8; download it again") from None


@overload
def read_json(path: Path, *, optional: Literal[False] = False) -> dict[str, Any]: ...
@overload
def read_json(path: Path, *, optional: bool) -> dict[str, Any] | None: ...
def read_json(path: Path, *, optional: bool = False) -> dict[str, Any] | None:
    """A JSON object, as transformers reads it: of UTF-8 without a byte order mark.

    Parameters
    ----------
    optional
        Whether the model can do without: then a file that is not there is ``None``, and so is, with a warning, one
        that cannot be read.

    Raises
    ------
    FileError
        If it cannot be read.
    CheckpointError
        If it is no JSON object.
    """
    try:
        return _json_object(path)
    except MissingFileError:
        if not optional:
            raise
    except CheckpointError as error:
        if not optional:
            raise
        log.warning("%s; going on without it", error)
    return None


def _json_object(path: Path) -> dict[str, Any]:
    text = read_text(path)
    if text.startswith("\ufeff"):
        raise CheckpointError(f"{path} begins with a byte order mark, which JSON may not; save it as UTF-8 without one")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise CheckpointError(f"{path} is damaged: it is not JSON ({reason}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object; download it again")
    return value


# --- what the system refuses, in words


@contextlib.contextmanager
def told(path: str | os.PathLike[str] | None = None, done: str = "read") -> Iterator[None]:
    """What the system refuses inside is a ``FileError``: ``path`` cannot be ``done``.

    Without a path, about the file that the error itself names, and only where it is of files: errors of sockets, pipes
    and libraries pass.
    """
    try:
        yield
    except AirLLMError:
        raise
    except OSError as error:
        if path is None and (error.errno not in _REMEDIES or isinstance(error, ConnectionError)):
            raise
        raise refused(error, path, done) from None
    except ValueError as error:  # a name that no file can have
        if path is None or not ("null byte" in str(error) or isinstance(error, UnicodeEncodeError)):
            raise
        raise FileError(f"{os.fspath(path)!r} cannot be the name of a file ({error})") from None


def refused(error: OSError, path: str | os.PathLike[str] | None = None, done: str = "read") -> FileError:
    """The error to raise for what the system said of ``path``, or of the file that ``error`` names."""
    name = os.fsdecode(path or error.filename or "a file of the model")
    code = error.errno
    if code is None and (found := _OS_ERROR.search(str(error))):  # of Rust, which has it in words only
        code = int(found[1])
    reason = (error.strerror or str(error) or type(error).__name__).splitlines()[0]
    remedy = _REMEDIES.get(code or 0, "check the disk, then load the model again")
    if code in (errno.EACCES, errno.EPERM):
        remedy = _whose(name)
    elif code in (errno.EMFILE, errno.ENFILE):
        remedy = f"close other models and files, or allow more (ulimit -n{_open_files()})"
    kind = MissingFileError if isinstance(error, FileNotFoundError) else FileError
    made = kind(f"{name} cannot be {done} ({reason}); {remedy}")
    made.errno = code
    return made


def refusal(error: BaseException | None, path: Path) -> FileError | None:
    """What the system refused at last behind an error of a library; ``None`` where a file is missing or damaged."""
    while error is not None:
        found = _OS_ERROR.search(str(error))
        code = int(found[1]) if found else getattr(error, "errno", None) or 0
        if code in _OF_THE_SYSTEM:
            return refused(error if isinstance(error, OSError) else OSError(code, os.strerror(code)), path)
        error = error.__cause__ or error.__context__
    return None


# Of these no file is the cause, whatever is in it.
_OF_THE_SYSTEM = {
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.EROFS,
    getattr(errno, "ESTALE", errno.EIO), getattr(errno, "EDQUOT", errno.ENOSPC),
}  # fmt: skip
_REMEDIES = {
    errno.ENOENT: "was it moved or deleted? Put it back or download it again, then load the model again",
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EMFILE: "",
    errno.ENFILE: "",
    errno.EIO: "the disk or the network failed; check it, then load the model again",
    getattr(errno, "ESTALE", errno.EIO): "the server of this file system has another file there by now, or none; "
                                         "load the model again, and mount it anew if that does not help",
    errno.ENOSPC: "free some disk space, or name a folder on a larger disk",
    getattr(errno, "EDQUOT", errno.ENOSPC): "free some of your share of the disk, or name a folder on another one",
    errno.EROFS: "the disk is mounted read-only; name a folder that can be written",
    errno.ENOTDIR: "a part of this path is a file; check the path",
    errno.EISDIR: "it is a folder; name the file in it",
    errno.ELOOP: "its links lead in a circle; remove them, or download it again",
    errno.ENAMETOOLONG: "the name is too long for this disk; check it",
    errno.EINVAL: "it is no regular file; check what the path leads to",
    errno.ENOMEM: "the system has no memory left for it; close other programs",
}  # fmt: skip


def _whose(name: str) -> str:
    """Weights that one user saved are often of mode 0600: others meet them in a shared folder."""
    with contextlib.suppress(OSError, ValueError):
        found = Path(name).stat()
        return (f"it is of user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}; have its owner run "
                f"`chmod a+r` on it, or copy it")  # fmt: skip
    return "a folder above it may not be entered by this user; have its owner run `chmod a+rx` on it"


def _open_files() -> str:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        return f", now {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    return ""


def _open(path: str | Path, flags: int = 0) -> int:
    descriptor = os.open(path, _FLAGS | flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "Is a directory" if code == errno.EISDIR else "Not a regular file", os.fspath(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class _File(io.FileIO):
    """A file whose reads fail as :func:`told` says."""

    def __init__(self, path: Path):
        super().__init__(os.fspath(path), opener=lambda name, _: _open(name))

    def readinto(self, buffer: Any) -> int | None:  # type: ignore[override]
        with told(str(self.name)):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with told(str(self.name)):
            return super().readall()


# --- folders


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` as the user's home; raises ``OptionError`` where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise OptionError(f"{path}: this user has no home folder; give the whole path") from None


def nearest(path: str | Path) -> Path:
    """The folder that exists nearest to ``path``: itself, or the first above it."""
    absolute = expanded(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def free_disk(path: str | Path, environ: Mapping[str, str] = os.environ) -> int | None:
    """Free bytes where this path is, or would be made.

    Returns
    -------
    int or None
        ``None`` where the system's answer is not ours: on Kaggle the root folder is on the host's disk of terabytes, of
        which a session is given a share that nobody tells.
    """
    existing = nearest(path)
    if "KAGGLE_KERNEL_RUN_TYPE" in environ and status(existing).st_dev == status(Path("/")).st_dev:
        return None
    with told(existing):
        return shutil.disk_usage(existing).free
