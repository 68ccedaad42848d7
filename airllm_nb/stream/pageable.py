"""RAM that cannot be locked (WSL2, containers with a limit): kept in ordinary memory, copied through the locked ring.

To the schedule such a unit looks like one on disk; only its reads come from memory after the first sweep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from .reader import CHUNK, Done, Pages, Reader, chunks
from .unit import Piece


class PageableUnits:
    """A reader that keeps some units in memory.

    Parameters
    ----------
    reader
        Reads the files, and lends its threads for copying.
    kept
        Memory by the pieces of the unit that it is for, uint8 ``[unit.nbytes]``.
    """

    def __init__(self, reader: Reader, kept: Mapping[tuple[Piece, ...], torch.Tensor]):
        self._reader, self._full = reader, set[tuple[Piece, ...]]()
        self._kept = {pieces: memory.numpy() for pieces, memory in kept.items()}

    def submit(
        self, pieces: Sequence[Piece], into: memoryview | Pages, done: Done, before: Callable[[], None] | None = None
    ) -> None:
        """As :meth:`Reader.submit`; a unit that is kept is read from its file once."""
        key = tuple(pieces)
        kept = self._kept.get(key)
        if kept is None or not isinstance(into, memoryview):
            self._reader.submit(pieces, into, done, before)
            return
        target = np.frombuffer(into, dtype=np.uint8)
        if key in self._full:
            jobs = [
                functools.partial(np.copyto, target[at : at + size], kept[at : at + size])
                for at, size in chunks(0, kept.size, CHUNK)
            ]
            self._reader.run(jobs, done, before)
            return

        def keep(error: BaseException | None) -> None:
            if error is None:
                np.copyto(kept, target)
                self._full.add(key)
            done(error)

        self._reader.submit(pieces, into, keep, before)
