"""Whose turn it is to run a model: one thread's at a time, and within its turn whatever that thread calls runs too."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import nn

from ..errors import BusyError, ClosedError


class Turn:
    """The right to run one model.

    A *run* (a generation, a forward of the whole model) takes it from beginning to end. A forward of a part of the
    model takes it for itself, where its thread does not have it.

    Parameters
    ----------
    name
        Of the model, for messages.

    Attributes
    ----------
    cancel
        Ends whoever has the turn, before the next unit.
    closed
        Nobody gets the turn any more.
    when_closed
        Called at the end of a turn during which it was closed, with the module whose forward ends, if it was for one.
    look
        Called before a model within the model runs on its own, with that part and its arguments.
    """

    def __init__(self, name: str):
        self._name = name
        self._held, self._taking_over = threading.Lock(), threading.Lock()
        self._thread: int | None = None
        self._module: nn.Module | None = None
        self._frame: FrameType | None = None
        self.cancel, self.closed = threading.Event(), False
        self.when_closed: Callable[[nn.Module | None], None] = lambda module: None
        self.look: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None] = lambda part, args, kwargs: None

    @property
    def busy(self) -> bool:
        """Whether somebody has the turn, and goes on."""
        return self._held.locked() and not self._is_left_over()

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return self._thread == threading.get_ident()

    @property
    def is_within(self) -> bool:
        """Whether it is called by what has the turn."""
        return self.mine and not self._is_left_over()

    @property
    def runs(self) -> bool:
        """Whether this thread has it for a run."""
        return self.mine and self._module is None

    @contextlib.contextmanager
    def run(self, cancel: threading.Event) -> Iterator[None]:
        """Have the turn; ``cancel`` is what ends it from outside.

        Raises
        ------
        BusyError
            If another thread has it, or a forward of this one that is under way.
        ClosedError
            If the model was closed.
        """
        self._take(None, cancel)
        try:
            yield
        finally:
            self._end()

    def enter(self, module: nn.Module) -> bool:
        """A forward of ``module`` begins; whether it took the turn for itself. Raises as :meth:`run` does."""
        if self.is_within:
            return False
        self._take(module, threading.Event())
        return True

    def leave(self, module: nn.Module) -> None:
        """The forward of ``module`` is over, by an error perhaps."""
        if self.mine and self._module is module:
            self._end()

    @contextlib.contextmanager
    def last(self) -> Iterator[None]:
        """Wait until nobody has the turn, and keep everybody from it."""
        self._end_left_over()
        with self._held:
            yield

    def _take(self, module: nn.Module | None, cancel: threading.Event) -> None:
        if not self._held.acquire(blocking=False) and not (
            self._end_left_over() and self._held.acquire(blocking=False)
        ):
            if self.closed:
                raise self._closed_error()
            if self.mine:
                raise BusyError(f"{self._name} is called from within its own forward; call it before or after")
            raise BusyError(f"{self._name} is generating already; wait for it, or stop it first")
        # Before it looks whether it was closed: whoever closes meanwhile stops this one or is seen by it.
        self._frame = module and _frame_of(module)
        self._thread, self._module, self.cancel = threading.get_ident(), module, cancel
        if self.closed:
            self._give()
            raise self._closed_error()

    def _give(self) -> None:
        self._module, self._thread, self._frame = None, None, None
        self._held.release()

    def _end(self) -> None:
        module = self._module
        self._give()
        if self.closed:
            self.when_closed(module)

    def _end_left_over(self) -> bool:
        """End the turn of a module's forward that Ctrl-C ended: no hook runs then."""
        with self._taking_over:
            if is_left := self._is_left_over():
                self._give()
            return is_left

    def _is_left_over(self) -> bool:
        if self._module is None or (thread := self._thread) is None:
            return False
        frame = sys._getframe() if self.mine else sys._current_frames().get(thread)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is None

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self._name} was closed; load it again")


def _frame_of(module: nn.Module) -> FrameType | None:
    """The call of ``module`` that is under way: not an earlier one, which Ctrl-C ended."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            return frame
        frame = frame.f_back
    return None
