"""A store's folder: one process writes into it, any number read from it, one removes it while nobody does either.

Every lock is the system's own (flock), so it ends with the process that has it, however that ends. Writers lock the
file ``.lock``; readers lock the folder itself, which needs no file and works where nothing can be written.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from ..disk import entries, open_file, status
from ..errors import StoreError
from ..progress import Progress, ProgressCallback
from .atomic import sweep, unfinished_shards
from .names import JOURNAL, LOCK
from .space import explain

try:
    import fcntl
except ImportError:  # Windows: two conversions at once are then the user's to avoid
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
# Another process that looks at a lock has it for a moment: worth a few tries; one that removes a folder, for longer.
_MOMENT, _TRIES, _MOMENTS = 0.01, 4, 200

_mine = threading.local()


@contextmanager
def locked(
    folder: Path, progress: ProgressCallback, should_stop: Callable[[], bool] = lambda: False, total: int = 0
) -> Iterator[None]:
    """Be the one that writes into ``folder``; wait while another process is, and report how far it is.

    In a thread that is that one already this does nothing. A folder into which nothing was written is not left behind.

    Parameters
    ----------
    folder
        Made if it is not there.
    total
        The bytes that there will be, where that is known.

    Raises
    ------
    StoreError
        If ``should_stop`` said so while waiting, or the folder cannot be made or written.
    """
    held: set[Path] = _mine.__dict__.setdefault("folders", set())
    key = folder.resolve()
    if key in held:
        yield
        return
    with _lock_file(folder, progress, should_stop, total):
        held.add(key)
        try:
            yield
        finally:
            held.discard(key)
            _drop_if_empty(folder)


class Hold:
    """Keeps folders from being removed while they are read: until it is closed or collected, or its process ends.

    Raises
    ------
    StoreError
        If one is not there, or is being removed.
    """

    def __init__(self, *folders: Path):
        stack = ExitStack()
        self._end = weakref.finalize(self, stack.close)
        try:
            for folder in sorted(set(folders)):
                if (descriptor := _share(folder)) is not None:
                    stack.callback(os.close, descriptor)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Safe to call twice."""
        self._end()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_use(folder: Path) -> Literal["", "converting", "open"]:
    """Whether a process, this one included, writes into ``folder`` or reads from it; ``""`` where nobody tells."""
    with suppress(OSError), open_file(folder / LOCK) as file:
        if not _try_lock(file.fileno(), exclusive=False, tries=_TRIES):
            return "converting"
    with exclusively(folder) as is_free:
        return "" if is_free else "open"


@contextmanager
def exclusively(folder: Path) -> Iterator[bool]:
    """Whether nobody reads from ``folder``; where that is so, nobody begins to until the end of this."""
    descriptor = None
    with suppress(FileNotFoundError):
        descriptor = _open(folder)
    if descriptor is None:
        yield True
        return
    try:
        yield _try_lock(descriptor, exclusive=True, tries=_TRIES)
    finally:
        os.close(descriptor)


@contextmanager
def vacated(folder: Path) -> Iterator[None]:
    """Nobody writes into ``folder`` and nobody reads from it, until the end of this.

    Raises
    ------
    StoreError
        If somebody does.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("ab") as file, exclusively(folder) as is_free:
        if not _try_lock(file.fileno(), exclusive=True, tries=_TRIES):
            raise StoreError(f"{folder} is being converted by another process; wait for it, or end it first")
        if not is_free:
            raise StoreError(f"{folder} is in use; unload the model, or end the kernel or the process that has it open")
        yield


def tidy(folder: Path) -> None:
    """Remove what a process that was killed left in the folder of a finished store, unless somebody writes into it."""
    sweep(folder)
    if not (folder / JOURNAL).is_file() and not unfinished_shards(folder):
        return
    with suppress(OSError), ExitStack() as stack:
        if folder.resolve() not in _mine.__dict__.get("folders", ()):
            file = stack.enter_context((folder / LOCK).open("ab"))
            if not _try_lock(file.fileno(), exclusive=True, tries=_TRIES):
                return
        for path in (*unfinished_shards(folder), folder / JOURNAL):
            path.unlink(missing_ok=True)


def contents(folder: Path) -> tuple[int, float]:
    """Bytes of all files, and when one was last written or read."""
    nbytes, used = 0, 0.0
    with os.scandir(folder) as found:
        for entry in found:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    inner = contents(Path(entry.path))
                    nbytes, used = nbytes + inner[0], max(used, inner[1])
                else:
                    seen = entry.stat(follow_symlinks=False)
                    # Only models read the weights; the small files are read for a list, too.
                    read = seen.st_atime if entry.name.endswith(".safetensors") else 0.0
                    nbytes, used = nbytes + seen.st_size, max(used, seen.st_mtime, read)
    return nbytes, used


def _lock_file(folder: Path, progress: ProgressCallback, should_stop: Callable[[], bool], total: int) -> IO[bytes]:
    for last in (*[False] * _MOMENTS, True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("ab")
        except (FileNotFoundError, FileExistsError):  # removed in the middle of either
            if last and not folder.exists() and not folder.is_symlink():
                raise StoreError(f"{folder} cannot be made: what should be above it is not there; name another folder "
                                 "with layer_shards_saving_path=…") from None  # fmt: skip
            if last or folder.exists():
                raise StoreError(f"{folder} is in the way, or is removed again and again; name another folder with "
                                 "layer_shards_saving_path=…") from None  # fmt: skip
            time.sleep(_MOMENT)
            continue
        except OSError as error:
            raise explain(error, folder) from error
        written = 0
        try:
            while not _try_lock(file.fileno(), exclusive=True):
                if should_stop():
                    raise StoreError(f"stopped while waiting for another process that converts into {folder}")
                detail = f"another process converts into {folder}"
                with suppress(OSError):
                    written, _ = contents(folder)
                progress(Progress("wait", written, total, detail=detail))
                time.sleep(POLL_SECONDS)
            # While this one waited the folder may have been removed, the locked file with it.
            if last or _is_at(file.fileno(), folder / LOCK):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        time.sleep(_MOMENT)
    raise AssertionError("the last try ends")


def _share(folder: Path) -> int | None:
    for last in (*[False] * _MOMENTS, True):
        try:
            descriptor = _open(folder)
        except FileNotFoundError:
            raise StoreError(f"{folder} was removed by another process; load the model again") from None
        if descriptor is None and folder.is_dir():
            return None
        if descriptor is None:
            raise StoreError(f"{folder} is no folder; load the model again")
        try:
            if _try_lock(descriptor, exclusive=False) and (last or _is_at(descriptor, folder)):
                with suppress(OSError):
                    os.utime(folder / LOCK)  # says when it was last used, also where reading leaves no trace
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_MOMENT)
    raise StoreError(f"{folder} is being removed by another process; load the model again")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still is what was opened. A network may number files anew: whoever asks gives in at last."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), status(path))
    return False


def _drop_if_empty(folder: Path) -> None:
    """Whoever waits for the lock sees that its file has gone, and makes the folder again."""
    with suppress(OSError):
        if [path.name for path in entries(folder)] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _open(folder: Path) -> int | None:
    """``None`` where folders cannot be opened, and hence not be locked."""
    if fcntl is None:
        return None
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise
    except OSError:
        return None


def _try_lock(descriptor: int, exclusive: bool, tries: int = 1) -> bool:
    if fcntl is None:
        return True
    for again in range(tries):
        time.sleep(_MOMENT if again else 0)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
        except OSError as error:  # some network file systems have no locks
            _warn(str(error))
            return True
    return False


@functools.cache
def _warn(reason: str) -> None:
    log.warning("stores cannot be locked here (%s); do not convert or remove the same one twice at once", reason)
