"""A disk, a device and a clock for the scheduler's tests: nothing happens until the test, or chance, says so.

The device is as asynchronous as a GPU: copies and computes are queued and move bytes only when they are run, in the
order of their stream and after the marks they wait for. A read scribbles over its target as soon as it may. So a
missing wait shows as wrong bytes, whatever order a test takes.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from airllm_nb.stream import prefetcher as prefetcher_module
from airllm_nb.stream.copier import Copied
from airllm_nb.stream.prefetcher import Prefetcher, Stop
from airllm_nb.stream.ring import align, place
from airllm_nb.stream.schedule import Schedule
from airllm_nb.stream.unit import Piece, Unit
from airllm_nb.tensors.index import Extent

DISK = Path("/fake/disk")
POISON = 0xDB


class Deadlock(AssertionError):
    """Somebody waits for what can never happen."""


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


# ---- units -----------------------------------------------------------------------------------------------------------


def make_unit(index: int, nbytes: int, pieces: int = 1) -> Unit:
    """A unit whose bytes are all its own; its file offsets say which unit it is."""
    cuts = sorted({0, nbytes, *(nbytes * part // pieces for part in range(pieces))})
    extents = [Piece(Extent(DISK, (index << 32) + at, end - at), at) for at, end in itertools.pairwise(cuts)]
    return Unit(f"unit-{index}", nbytes, tuple(extents))


def content(unit: Unit) -> torch.Tensor:
    """What the disk holds for ``unit``."""
    filled = torch.zeros(unit.nbytes, dtype=torch.uint8)
    for piece in unit.pieces:
        filled[piece.offset : piece.offset + piece.extent.nbytes] = disk_bytes(piece.extent)
    return filled


def disk_bytes(extent: Extent) -> torch.Tensor:
    index, offset = divmod(extent.offset, 1 << 32)
    return ((torch.arange(offset, offset + extent.nbytes) * 31 + index * 37 + 11) % 211).to(torch.uint8)


def make_stops(
    sizes: Sequence[int], keep: Sequence[bool] | None = None, ring: int | None = None, arena: int | None = None
) -> list[Stop]:
    """Units as the executor lays them out; ``arena=None`` computes in place, ``ring=None`` makes a ring for all."""
    keep = list(keep or [False] * len(sizes))
    in_ring = [index for index, kept in enumerate(keep) if not kept]
    ring_bytes = sum(map(align, sizes)) if ring is None else ring
    host_places = dict(zip(in_ring, place([sizes[index] for index in in_ring], ring_bytes), strict=True))
    ring_memory = torch.full((ring_bytes,), POISON, dtype=torch.uint8)
    arena_memory = torch.full((arena or 0,), POISON, dtype=torch.uint8)
    device_places = [None] * len(sizes) if arena is None else place(sizes, arena)
    stops = []
    for index, (size, where) in enumerate(zip(sizes, device_places, strict=True)):
        host_place = host_places.get(index)
        host = (
            torch.full((size,), POISON, dtype=torch.uint8)
            if host_place is None
            else ring_memory[host_place.offset : host_place.offset + size]
        )
        device = None if where is None else arena_memory[where.offset : where.offset + size]
        stops.append(Stop(make_unit(index, size, 1 + index % 3), host, device, host_place, where, keep=keep[index]))
    return stops


# ---- disk ------------------------------------------------------------------------------------------------------------


class Read:
    """One submitted read, not yet over."""

    def __init__(self, pieces: Sequence[Piece], into: memoryview, done: Any, before: Any):
        self.pieces, self.into, self.done, self.before = pieces, into, done, before
        self.name = f"unit-{pieces[0].extent.offset >> 32}" if pieces else ""
        if before is None:
            self._scribble()

    def _scribble(self) -> None:
        self.into[:] = bytes([POISON]) * len(self.into)

    def finish(self, error: BaseException | None = None) -> None:
        if self.before is not None:
            self.before()
            self._scribble()
        if error is None:
            for piece in self.pieces:
                self.into[piece.offset : piece.offset + piece.extent.nbytes] = disk_bytes(piece.extent).numpy().data
        self.done(error)


class FakeReader:
    """Reads wait in ``pending`` until the test finishes them; ``submitted`` has all their names.

    Parameters
    ----------
    at_once
        Finish each read inside :meth:`submit`, on the submitting thread.
    """

    def __init__(self, at_once: bool = False):
        self.pending: list[Read] = []
        self.submitted: list[str] = []
        self.refuse: BaseException | None = None
        self.fail: dict[str, BaseException] = {}
        self._at_once = at_once

    def submit(self, pieces: Sequence[Piece], into: memoryview, done: Any, before: Any = None) -> None:
        if self.refuse is not None:
            raise self.refuse
        read = Read(pieces, into, done, before)
        self.submitted.append(read.name)
        if self._at_once:
            read.finish(self.fail.pop(read.name, None))
        else:
            self.pending.append(read)

    def finish(self, which: int = 0, error: BaseException | None = None) -> None:
        read = self.pending.pop(which)
        read.finish(error or self.fail.pop(read.name, None))

    def finish_all(self) -> None:
        while self.pending:
            self.finish()


class ThreadedReader(FakeReader):
    """Finishes reads on threads of its own, in random order, after up to ``delay`` seconds."""

    def __init__(self, threads: int = 4, delay: float = 0.0005, seed: int = 0):
        super().__init__()
        self._random, self._delay = random.Random(seed), delay
        self._work, self._ended = threading.Condition(), False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, pieces: Sequence[Piece], into: memoryview, done: Any, before: Any = None) -> None:
        with self._work:
            super().submit(pieces, into, done, before)
            self._work.notify()

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self.pending or self._ended)
                if not self.pending:
                    return
                read = self.pending.pop(self._random.randrange(len(self.pending)))
                error, seconds = self.fail.pop(read.name, None), self._random.random() * self._delay
            threading.Event().wait(seconds)
            read.finish(error)

    def close(self) -> None:
        with self._work:
            self._ended = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join(120)


# ---- device ----------------------------------------------------------------------------------------------------------


class FakeMark:
    def __init__(self) -> None:
        self.passed_at: float | None = None


class FakeDevice:
    """A copier with two queues. :meth:`run_copy` and :meth:`run_compute` run the next thing in each, if it may run.

    ``wrong`` collects the names of computes that met other bytes than their unit's.
    """

    def __init__(self) -> None:
        self._copies: deque[tuple[FakeMark | None, Callable[[], None], FakeMark, FakeMark]] = deque()
        self._computes: deque[tuple[FakeMark | None, Callable[[], None], FakeMark]] = deque()
        self._lock, self.time = threading.RLock(), 0.0
        self.wrong: list[str] = []
        self.copied: list[int] = []
        self.host_waits = 0

    # what the prefetcher calls

    def copy(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], after: Any) -> Copied:
        def move() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        with self._lock:
            start, end = FakeMark(), FakeMark()
            self._copies.append((after, move, start, end))
            self.copied.append(sum(target.numel() for target in targets))
            return Copied(start, end)

    def mark(self) -> FakeMark:
        return self._compute(None, lambda: None)

    def wait(self, mark: FakeMark) -> None:
        self._compute(mark, lambda: None)

    def host_wait(self, mark: FakeMark) -> None:
        self.host_waits += 1
        with self._lock:
            while mark.passed_at is None:
                if not (self.run_copy() or self.run_compute()):
                    raise Deadlock("the host waits for a mark that cannot pass")

    def seconds_between(self, start: FakeMark, end: FakeMark) -> float | None:
        if start.passed_at is None or end.passed_at is None:
            return None
        return end.passed_at - start.passed_at

    def synchronize(self) -> None:
        with self._lock:
            while self._copies:
                if not (self.run_copy() or self.run_compute()):
                    raise Deadlock("a copy waits for a mark that cannot pass")

    # what the test calls

    def compute(self, unit: Unit, memory: torch.Tensor) -> None:
        """Queue work that reads ``memory`` when it is run."""

        def check() -> None:
            if not torch.equal(memory, content(unit)):
                self.wrong.append(unit.name)

        self._compute(None, check)

    def run_copy(self) -> bool:
        with self._lock:
            if not self._copies or not self._passed(self._copies[0][0]):
                return False
            _, move, start, end = self._copies.popleft()
            start.passed_at = self._tick()
            move()
            end.passed_at = self._tick()
            return True

    def run_compute(self) -> bool:
        with self._lock:
            if not self._computes or not self._passed(self._computes[0][0]):
                return False
            _, work, mark = self._computes.popleft()
            work()
            mark.passed_at = self._tick()
            return True

    def drain(self) -> None:
        while self.run_copy() or self.run_compute():
            pass
        assert not self._copies and not self._computes, "the device is stuck"

    def _compute(self, after: FakeMark | None, work: Callable[[], None]) -> FakeMark:
        with self._lock:
            mark = FakeMark()
            self._computes.append((after, work, mark))
            return mark

    def _passed(self, mark: FakeMark | None) -> bool:
        return mark is None or mark.passed_at is not None

    def _tick(self) -> float:
        self.time += 1.0
        return self.time


# ---- all of it on one thread -----------------------------------------------------------------------------------------


class Simulation:
    """A prefetcher on one thread: where it would wait, something random happens instead; nothing left is a deadlock."""

    def __init__(
        self, stops: Sequence[Stop], depth: int | None = None, seed: int = 0, schedule: Schedule | None = None
    ):
        self.stops, self.random = list(stops), random.Random(seed)
        self.visits = list(range(len(self.stops))) if schedule is None else list(schedule.visits)
        self.reader, self.device, self.clock = FakeReader(), FakeDevice(), FakeClock()
        self.cancelled, self.cancel_next = False, False
        self.in_place = self.stops[0].device is None
        with pytest.MonkeyPatch.context() as patch:
            now = _Now(self)
            patch.setattr(
                prefetcher_module, "threading", SimpleNamespace(RLock=lambda: now, Condition=lambda lock: lock)
            )
            self.prefetcher = Prefetcher(
                self.stops, self.reader, self.device, depth, self.clock, lambda: self.cancelled, schedule
            )

    def happen(self, times: int = 1) -> bool:
        """Let up to ``times`` random things happen; ``False`` if nothing could."""
        happened = False
        for _ in range(times):
            events = [self.device.run_copy, self.device.run_compute, self._finish_one]
            self.random.shuffle(events)
            happened = any(event() for event in events) or happened
        return happened

    def _finish_one(self) -> bool:
        if not self.reader.pending:
            return False
        self.clock.advance(1.0)
        self.reader.finish(self.random.randrange(len(self.reader.pending)))
        return True

    def compute(self, index: int) -> None:
        """Take, compute and release one stop; bytes that are not its unit's end up in ``device.wrong``."""
        unit = self.stops[index].unit
        memory, _ = self.prefetcher.take(index)
        assert memory.numel() == unit.nbytes
        self.work(unit, memory)
        self.prefetcher.release(index)

    def work(self, unit: Unit, memory: torch.Tensor) -> None:
        self.device.compute(unit, memory)
        self.happen(self.random.randrange(4))
        if self.in_place:
            while self.device.run_compute():
                pass

    def sweep(self, times: int = 1) -> None:
        for _ in range(times):
            for index in self.visits:
                self.compute(index)
                self.happen(self.random.randrange(4))

    def check(self) -> None:
        self.device.drain()
        assert self.device.wrong == []


class _Now:
    """Stands in for a condition and its lock: one thread holds every lock, and to wait is to let something happen."""

    def __init__(self, simulation: Simulation):
        self._simulation = simulation

    def __enter__(self) -> _Now:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        if self._simulation.cancel_next:
            self._simulation.cancelled, self._simulation.cancel_next = True, False
        elif not self._simulation.happen():
            raise Deadlock("the prefetcher waits, and nothing is under way")
        return True


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run ``work`` on a thread; its result or error, or a failure if it takes longer."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise Deadlock(f"not over after {seconds} s")
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    return value
