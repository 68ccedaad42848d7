"""How far a sweep is, and what ends it or is refused within it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..errors import BusyError, GenerationStopped


class Sweep:
    """Where compute is.

    Attributes
    ----------
    cancel
        Ends the work before the next unit.
    reached
        The index of the unit that computes; -1 where units are not followed.
    """

    def __init__(self) -> None:
        self.cancel, self.reached = threading.Event(), -1
        self._is_under_way, self._inside = False, ""

    def start(self, cancel: threading.Event) -> None:
        """Somebody begins; what an interrupted one left is forgotten."""
        self.cancel, self.reached, self._is_under_way, self._inside = cancel, -1, False, ""

    def end(self) -> None:
        """Nothing runs any more. The event in force is the caller's: to set it would stop a repetition."""
        self.cancel = threading.Event()
        self.cancel.set()

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """A forward of the whole model; raises ``BusyError`` within another."""
        if self._is_under_way:
            raise BusyError("the model is called from within its own forward (by a hook?); call it before or after")
        # Where everything is resident on a GPU no unit has a hook: a sweep is short there, and this is the stop.
        if self.cancel.is_set():
            raise GenerationStopped("stopped before a sweep")
        self._is_under_way, self._inside = True, ""
        try:
            yield
        finally:
            self._is_under_way = False

    def reach(self, index: int, name: str) -> None:
        """Compute is before a unit."""
        self.reached = index
        if self.cancel.is_set():
            raise GenerationStopped(f"stopped before {name}")

    def enter(self, name: str) -> None:
        """Weights of ``name`` are wanted; raises ``BusyError`` while another unit computes: they would push its out."""
        if self._inside:
            raise BusyError(f"{name} is called from within {self._inside} (by a hook?), whose weights it would push "
                            "out; call it before or after")  # fmt: skip
        self._inside = name

    def leave(self, name: str) -> None:
        if self._inside == name:
            self._inside = ""
