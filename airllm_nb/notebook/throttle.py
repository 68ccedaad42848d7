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
        Part of the time that drawing may take: it holds the interpreter, which compute needs too.
    first
        Seconds until the first.
    clock
        Monotonic seconds.
    cost
        Seconds that this thread has computed; waiting for others costs nobody anything.
    """

    def __init__(
        self, every: float, share: float = 1.0, first: float = 0.0, clock: Callable[[], float] = time.monotonic,
        cost: Callable[[], float] = time.thread_time,
    ):  # fmt: skip
        self._every, self._share, self._clock, self._cost = every, share, clock, cost
        self._next = clock() + first

    def run(self, draw: Callable[[], object]) -> bool:
        """Call ``draw`` if it is due; whether it was."""
        start = self._clock()
        if start < self._next:
            return False
        before = self._cost()
        draw()
        self._next = start + max(self._every, (self._cost() - before) / self._share)
        return True
