"""The schedule ahead of compute: ``take(unit)`` … ``release(unit)``, visit by visit, round and round.

A unit goes *source → (read) → host memory → (copy) → device memory → compute*. Where the device is the CPU itself
there is no copy and compute runs on host memory. Whatever became possible is started by :meth:`Prefetcher._advance`,
which every change calls: a release on the computing thread, a finished read on its reading thread. So there is no
thread that moves things, and a test can run all of it with a fake reader and a fake copier.

Steps count for ever; step ``s`` visits unit ``schedule.unit(s)``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from ..errors import ClosedError, GenerationStopped
from .copier import Copied, Copier, Mark
from .reader import Pages
from .schedule import Moved, Schedule, Stop
from .unit import Piece

__all__ = ["Moved", "Prefetcher", "Stop"]

# Reads that may be under way at once, in units: enough to keep every thread busy, few enough to stop quickly.
READS_AT_ONCE = 4


class ReaderLike(Protocol):
    """What the prefetcher needs of :class:`~airllm_nb.stream.reader.Reader`."""

    def submit(
        self,
        pieces: Sequence[Piece],
        into: memoryview | Pages,
        done: Callable[[BaseException | None], None],
        before: Callable[[], None] | None = None,
    ) -> None: ...


class Prefetcher:
    """Keeps units moving ahead of the one that computes.

    Parameters
    ----------
    stops
        Where each unit is on its way to compute.
    reader
        Fills host memory.
    copier
        Fills device memory and orders it with compute.
    depth
        Units that may be under way ahead of the one wanted; ``None`` for as many as there is room for.
    clock
        Monotonic seconds.
    cancelled
        Looked at while waiting; ``True`` ends the wait with :class:`~airllm_nb.errors.GenerationStopped`.
    schedule
        In which order units are visited; ``None``: as they stand in ``stops``.
    """

    def __init__(
        self,
        stops: Sequence[Stop],
        reader: ReaderLike,
        copier: Copier,
        depth: int | None,
        clock: Callable[[], float],
        cancelled: Callable[[], bool] = lambda: False,
        schedule: Schedule | None = None,
    ):
        self._stops, self._reader, self._copier = list(stops), reader, copier
        self._schedule = schedule or Schedule.of(range(len(self._stops)))
        # How far back the visit is whose bytes a visit overwrites, in host memory and in device memory.
        self._host_distances = self._schedule.distances([stop.host_place for stop in self._stops])
        self._device_distances = self._schedule.distances([stop.device_place for stop in self._stops])
        count = len(self._schedule)
        self._depth = count if depth is None else min(depth, count)
        self._clock, self._cancelled = clock, cancelled
        # The lock itself is taken, never by way of the condition: that is Python code, and an interrupt within it would
        # leave the lock held for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._error: BaseException | None = None
        self._closed, self._epoch, self._reading, self._last_read_end = False, 0, 0, 0.0
        self._held: int | None = None
        self._broken = False
        self.moved: deque[Moved] = deque(maxlen=4 * count + 64)
        self.resets = 0
        self._begin(0)

    # --- what the executor calls

    def take(self, unit: int) -> tuple[torch.Tensor, float]:
        """Wait until ``unit`` is ready for compute on its next visit; returns its memory and the seconds waited.

        Raises
        ------
        CheckpointError
            What a reading thread met.
        GenerationStopped
            If it was cancelled while waiting.
        """
        with self._lock, self._sound():
            self._check()
            if self._broken or self._held is not None or self._schedule.unit(self._done) != unit:
                self._restart(unit)
            self._held = step = self._wanted = self._done
            self._advance()
            waited = 0.0 if self._ready(step) else self._wait(step)
            stop = self._stops[unit]
            if stop.device is None:
                assert stop.host is not None, "compute runs on host memory"
                return stop.host, waited
            self._copier.wait(self._copied[self._visit(step)].end)
            return stop.device, waited

    def release(self, unit: int, mark: Mark | None = None) -> None:
        """Compute on ``unit`` is queued, up to ``mark`` (now); its memory may be used again after that."""
        with self._lock, self._sound():
            if self._held is None or self._schedule.unit(self._held) != unit:
                return
            step, self._held = self._held, None
            self._computed[self._visit(step)] = self._copier.mark() if mark is None else mark
            self._read.discard(step)
            self._done = step + 1
            self._advance()

    @property
    def bytes_ahead(self) -> int:
        """Device memory that holds or receives units now; looked at without the lock, so it may be a unit off."""
        return sum(self._stop(step).unit.nbytes for step in range(self._done, self._next_copy))

    def close(self) -> None:
        """Refuse further use and wake whoever waits; the reader and the memory have their own owners."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            self._drain()
        self._copier.synchronize()

    # --- the state machine; the lock is held in everything below

    def _visit(self, step: int) -> int:
        return step % len(self._schedule)

    def _stop(self, step: int) -> Stop:
        return self._stops[self._schedule.unit(step)]

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        """After an error, steps ahead may be lost: the next take starts the schedule again."""
        try:
            yield
        except BaseException:
            self._broken = True
            raise

    def _begin(self, step: int) -> None:
        self._epoch += 1
        self._first = self._done = self._wanted = self._next_read = self._next_copy = step
        self._held, self._broken = None, False
        self._loading: set[int] = set()  # units that are read once
        self._read: set[int] = set()  # steps
        # The latest copy of, and compute on, each visit; a copy may still be under way when its step is released.
        self._copied: dict[int, Copied] = {}
        self._computed: dict[int, Mark] = {}

    def _restart(self, unit: int) -> None:
        """Compute left the schedule (a stopped forward, another order): start again at the next visit of ``unit``."""
        step = self._schedule.next_visit(unit, self._done)
        if not (self._held is None and self._done == self._first):
            self.resets += 1
        barrier = self._copier.mark()
        self._epoch += 1  # reads under way report to nobody
        self._drain()
        self._copier.synchronize()
        self._begin(step)
        # What was computed before may still read the device's memory.
        self._computed = dict.fromkeys(range(len(self._schedule)), barrier)

    def _drain(self) -> None:
        while self._reading:
            self._changed.wait(0.1)

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the model was closed; load it again")
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _ready(self, step: int) -> bool:
        stop = self._stop(step)
        if stop.device is not None:
            return step < self._next_copy
        return stop.loaded or step in self._read

    def _wait(self, step: int) -> float:
        start = self._clock()
        while not self._ready(step):
            self._changed.wait(0.1)
            self._check()
            if self._cancelled():
                raise GenerationStopped("stopped while waiting for weights")
        return self._clock() - start

    def _advance(self) -> None:
        while not self._closed and (self._start_read() or self._start_copy()):
            pass

    def _start_read(self) -> bool:
        step = self._next_read
        if step > self._wanted + self._depth:
            return False
        stop, before = self._stop(step), None
        if stop.loaded or self._schedule.unit(step) in self._loading:
            self._next_read += 1
            return True
        if self._reading >= READS_AT_ONCE:
            return False
        distance = self._host_distances[self._visit(step)]
        if distance is not None and (owner := step - distance) >= self._first:
            if owner >= (self._done if stop.device is None else self._next_copy):
                return False
            if copied := self._copied.get(self._visit(owner)):
                before = functools.partial(self._copier.host_wait, copied.end)
        self._next_read += 1
        self._submit(step, stop, before)
        return True

    def _submit(self, step: int, stop: Stop, before: Callable[[], None] | None) -> None:
        epoch, started = self._epoch, self._clock()

        def begin() -> None:
            nonlocal started
            assert before is not None
            before()
            started = self._clock()  # waiting for room is not reading

        def done(error: BaseException | None) -> None:
            if error is None and stop.lock is not None:
                try:
                    stop.lock()  # which takes milliseconds: without the lock of the schedule
                except BaseException as caught:  # this is a reading thread; the caller must hear of it
                    error = caught
            with self._lock:
                self._reading -= 1
                self._finish_read(step, stop, epoch, started, error)
                self._changed.notify_all()

        self._reading += 1
        if stop.keep:
            self._loading.add(self._schedule.unit(step))
        try:
            self._reader.submit(stop.unit.pieces, stop.into, done, begin if before else None)
        except BaseException:
            self._reading -= 1
            raise

    def _finish_read(self, step: int, stop: Stop, epoch: int, started: float, error: BaseException | None) -> None:
        end = self._clock()
        # Reads are served in order: each counts from the end of the one before, so that they add up to time.
        self.moved.append(Moved("read", stop.unit, max(started, self._last_read_end), end))
        self._last_read_end = end
        if error is None and stop.keep:
            stop.loaded = True
        if epoch != self._epoch:
            return
        self._loading.discard(self._schedule.unit(step))
        if error is None:
            self._read.add(step)
            try:
                self._advance()
            except BaseException as caught:  # likewise
                error = caught
        self._error = self._error or error

    def _start_copy(self) -> bool:
        step = self._next_copy
        stop, distance = self._stop(step), self._device_distances[self._visit(step)]
        if stop.device is None or distance is None or step > self._wanted + self._depth:
            return False
        owner = step - distance
        if not (stop.loaded or step in self._read) or owner >= max(self._done, self._first):
            return False
        # Nothing ahead means nothing beside: without prefetching a copy waits for all compute before it.
        after = self._computed.get(self._visit(owner)) if self._depth else self._copier.mark()
        copied = self._copied[self._visit(step)] = self._copier.copy(stop.sources, stop.targets, after)
        self.moved.append(Moved("copy", stop.unit, copied.start, copied.end))
        self._next_copy += 1
        return True
