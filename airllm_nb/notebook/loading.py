"""Opens a model under a name, in a thread of its own, so that the cell can show progress and be interrupted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from ..config import LoadOptions
from ..errors import AirLLMError, BudgetError, OptionError
from ..progress import Meter, Progress, ProgressCallback
from .progress_line import ProgressLine, progress_text
from .registry import Entry, Registry

T = TypeVar("T")


class Loading(Generic[T]):
    """Work that reports progress: the worker only leaves its latest report, the cell's thread draws it.

    Parameters
    ----------
    work
        Called in the thread with a progress callback; what it returns is closed if nobody waits for it any more.
    """

    def __init__(self, work: Callable[[ProgressCallback], T]):
        self._work = work
        self._latest: Progress | None = None
        self._lock, self._left = threading.Lock(), False
        # Not the thread's own join: an interrupt in it makes Python take the thread for ended (3.9 to 3.12).
        self._ended = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="airllm-load", daemon=True)

    def result(self, line: ProgressLine) -> T:
        """Run it, showing progress; what it raises is raised here.

        A ``KeyboardInterrupt`` ends the work at its next report, and a second one leaves it to end by itself.
        """
        meter = Meter()
        try:
            self._thread.start()
            while not self._ended.wait(0.1):
                line.show(progress_text(meter, self._latest))
        except KeyboardInterrupt:
            self._leave()
            with contextlib.suppress(KeyboardInterrupt):
                line.show("stopping …")
                while self._thread.is_alive() and not self._ended.wait(0.1):
                    pass
            raise
        finally:
            line.clear()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._value  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._try()
        finally:
            self._ended.set()

    def _try(self) -> None:
        try:
            with _no_bars_of_the_hub():
                value = self._work(self._report)
        except BaseException as error:
            self._error = error
            return
        with self._lock:
            if not self._left:
                self._value = value
                return
        _close(value)

    def _report(self, progress: Progress) -> None:
        self._latest = progress
        if self._left:
            # Not an Exception: nothing on the way may take it for a failed download and try again.
            raise KeyboardInterrupt

    def _leave(self) -> None:
        with self._lock:
            self._left = True
            value, self._value = self._value, None
        _close(value)


def _close(value: Any) -> None:
    if hasattr(value, "close"):
        value.close()


@contextlib.contextmanager
def _no_bars_of_the_hub() -> Iterator[None]:
    """The Hub's bars would be a second progress display; in a kernel, widgets made by a background thread."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# ---- a model under a name


def open_into(models: Registry, name: str, model: str, wanted: LoadOptions, dashboard: str, bar: ProgressLine) -> Entry:
    """Load ``model`` as ``name``, in the place of what has that name.

    The new one is looked at first, so that a wrong path leaves the old one in place; then the old one is closed and its
    memory freed, then the new one is loaded.

    Raises
    ------
    OptionError
        If it was interrupted.
    """
    closed = name in models
    try:
        if closed:
            _check(model, wanted, bar)
            models.remove(name)
        opened = Loading(lambda report: _open(model, wanted, report)).result(bar)
    except KeyboardInterrupt:
        raise OptionError("interrupted; " + (f"{name!r} is as it was" if name in models else
                          "nothing is loaded, and what was downloaded or converted is kept")) from None  # fmt: skip
    except AirLLMError as error:
        if closed and name not in models:
            error.note = f"the model that was {name!r} is closed already"
        raise
    entry = Entry(name, opened, dashboard)
    models.add(entry)
    return entry


def plan(model: str, wanted: LoadOptions, report: Any) -> Any:
    """What would go where."""
    from ..engine.facade import plan_model

    return plan_model(model, wanted, progress=report)


def _open(model: str, wanted: LoadOptions, report: Any) -> Any:
    from ..engine.facade import open_model

    return open_model(model, wanted, progress=report)


def _check(model: str, wanted: LoadOptions, bar: ProgressLine) -> None:
    """Refuse what cannot be loaded while the old model is still there."""
    try:
        Loading(lambda report: plan(model, wanted, report)).result(bar)
    except BudgetError as error:
        # A budget that was not given is what the old model leaves free: the new one will have more.
        if error.option and getattr(wanted, error.option) is not None:
            raise
