"""How often something is drawn: no more often than a front end can take, and never at a noticeable cost."""

from __future__ import annotations

import time
from collections.abc import Callable


class Throttle:
    """Says when the next drawing is due.

    Parameters
    ----------
    every
        Seconds between two at least.
    share
        Part of the time that drawing may take: drawing holds the interpreter, which compute needs too.
    first
        Seconds until the first.
    clock
        Monotonic seconds.
    """

    def __init__(
        self, every: float, share: float = 1.0, first: float = 0.0, clock: Callable[[], float] = time.monotonic
    ):
        self._every, self._share, self._clock = every, share, clock
        self._next = clock() + first

    def run(self, draw: Callable[[], object]) -> bool:
        """Call ``draw`` if it is due; whether it was."""
        start = self._clock()
        if start < self._next:
            return False
        draw()
        end = self._clock()
        self._next = max(start + self._every, end + (end - start) * (1 / self._share - 1))
        return True
