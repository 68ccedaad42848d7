"""Turns marks of the device into spans of the trace, cheaply: nothing here waits for the device while it runs."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..stream.copier import Copier, Mark
from ..stream.prefetcher import Moved, Prefetcher
from ..trace import MemorySample, Trace
from .device import memory_of_others, used_memory


class Recorder:
    """Collects what one generation did.

    Parameters
    ----------
    copier
        Gives and compares marks.
    device
        Whose memory is sampled.

    Attributes
    ----------
    prefetcher
        Whose movements are recorded, if anything streams.
    cached
        Of a layer of experts that are not all there, by its unit's name: says which are.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, copier: Copier, device: torch.device):
        self._copier, self._device, self._trace = copier, device, Trace()
        self._origin: Mark = None
        self._start: Mark = None
        self._sweep: Mark = None
        self._marks: deque[tuple[str, str, Mark, Mark]] = deque(maxlen=65_536)
        self._dequantised: list[tuple[Mark, Mark]] = []
        self._moved: deque[Moved] = deque(maxlen=65_536)
        self.prefetcher: Prefetcher | None = None
        self.cached: dict[str, Callable[[], Iterable[int]]] = {}
        self._before, self._kv_cache = 0, 0

    def begin(self, trace: Trace) -> None:
        """Record into ``trace`` from now on; work of an earlier trace that is not resolved yet is dropped."""
        self._trace = trace
        self._marks.clear()
        self._moved.clear()
        self._copier.begin()
        self._before, self._kv_cache = used_memory(self._device)[0], 0
        self._origin, self._origin_seconds, self._origin_clock = self._copier.mark(), trace.now(), self.clock()

    def moved(self, moved: Moved) -> None:
        """Record a movement that is no unit's of the schedule."""
        self._moved.append(moved)

    def routed(self, unit: str, experts: int, asked: Sequence[int], hits: int) -> None:
        """A layer of so many ``experts`` was asked for some, of which ``hits`` were there."""
        self._trace.add_routed(unit, experts, asked, hits)

    def counted(self, unit: str, asked: Sequence[int], hits: int, nbytes: int) -> None:
        """Kernels have served a layer's experts: how often each was ``asked`` for, and what was moved for that."""
        self._trace.add_counted(unit, asked, hits, nbytes)

    def begin_sweep(self) -> None:
        self._sweep = self._copier.mark()
        self._trace.begin_sweep()

    def begin_compute(self) -> None:
        self._start = self._copier.mark()

    def end_compute(self, unit: str) -> Mark:
        """Returns the mark of the end."""
        if self._dequantised:
            self._marks.extend(("dequantise", unit, start, end) for start, end in self._dequantised)
            self._dequantised.clear()
        end = self._copier.mark()
        self._marks.append(("compute", unit, self._start, end))
        return end

    @contextlib.contextmanager
    def dequantising(self) -> Iterator[None]:
        """Time what runs inside as the current unit's dequantisation."""
        start = self._copier.mark()
        yield
        self._dequantised.append((start, self._copier.mark()))

    def waited(self, unit: str, seconds: float) -> None:
        """Compute stood still for ``seconds`` until ``unit`` was there."""
        if seconds > 0:
            now = self._trace.now()
            self._trace.add("wait", unit, now - seconds, now)

    def look(self) -> None:
        """Between two units: bring the trace up to date if it is time to."""
        if self._trace.wants_memory:
            self._sample()
            self.resolve()

    def end_sweep(self, is_replayed: bool = False) -> None:
        """One forward is over (on the host)."""
        self._marks.append(("sweep", "", self._sweep, self._copier.mark()))
        self._trace.replayed += is_replayed
        if self._device.type == "cuda" and not is_replayed:  # to ask takes longer than all else here
            # Between two forwards no activations are left: what is more than at the beginning is the cache.
            self._kv_cache = max(used_memory(self._device)[0] - self._before, 0)
        if self._trace.wants_memory:
            self._sample()
        self.resolve()

    def finish(self) -> None:
        """The generation is over: wait for the device, and complete the trace."""
        if self._origin is not None:
            self.resolve(wait=True)
            self._sample()
            for unit, routed in self._trace.experts.items():
                if (cached := self.cached.get(unit)) is not None:
                    routed.cached = tuple(sorted(cached()))

    def _sample(self) -> None:
        allocated, reserved = used_memory(self._device)
        slots = self.prefetcher.bytes_ahead if self.prefetcher else 0
        now, others = self._trace.now(), memory_of_others(self._device)
        self._trace.add_memory(MemorySample(now, allocated, reserved, slots, self._kv_cache, others))

    def resolve(self, wait: bool = False) -> None:
        """Move what is finished into the trace; with ``wait``, all of it."""
        if self._origin is None:
            return
        if wait:
            self._copier.synchronize()
            self._copier.host_wait(self._copier.mark())
        while self.prefetcher is not None and self.prefetcher.moved:
            self._moved.append(self.prefetcher.moved.popleft())
        for _ in range(len(self._moved)):
            moved = self._moved.popleft()
            if not self._add_moved(moved):
                self._moved.append(moved)
        while self._marks and self._add_marks(*self._marks[0], 0):
            self._marks.popleft()

    def _add_moved(self, moved: Moved) -> bool:
        unit, nbytes = moved.unit, moved.nbytes
        if moved.stage != "read":
            return self._add_marks(moved.stage, unit.name, moved.start, moved.end, nbytes or unit.nbytes)
        shift = self._origin_seconds - self._origin_clock
        if moved.end + shift > 0:
            self._trace.add("read", unit.name, moved.start + shift, moved.end + shift, nbytes or unit.read_bytes)
        return True

    def _add_marks(self, stage: str, unit: str, start: Any, end: Any, nbytes: int) -> bool:
        begin = self._copier.seconds_between(self._origin, start)
        finish = self._copier.seconds_between(self._origin, end)
        if begin is None or finish is None:
            return False
        if stage == "sweep":
            self._trace.end_sweep(self._origin_seconds + begin, self._origin_seconds + finish)
        # What was already moving before the trace began belongs to no trace.
        elif finish > 0:
            self._trace.add(stage, unit, self._origin_seconds + begin, self._origin_seconds + finish, nbytes)
        return True
