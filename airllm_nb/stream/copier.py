"""Host memory → device memory, and the order between copies and compute.

A *mark* is a point in the work of a device: a CUDA event, or a moment on a CPU. Copies run on a stream of their own and
wait for the marks they are given; the host never waits for the device here, except in :meth:`synchronize`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

Mark = Any


class Copied(NamedTuple):
    """The marks around one copy."""

    start: Mark
    end: Mark


class Copier(Protocol):
    """What the prefetcher needs of a device."""

    def begin(self) -> None:
        """Compute goes on in the order of this thread's work from now on."""

    def copy(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], after: Mark | None) -> Copied:
        """Copy each source to its target once ``after`` has passed; returns at once where the device can."""

    def mark(self) -> Mark:
        """Now, in the order of the compute work."""

    def wait(self, mark: Mark) -> None:
        """Let compute work that is queued from now on wait for ``mark``."""

    def host_wait(self, mark: Mark) -> None:
        """Block this thread until ``mark`` has passed."""

    def seconds_between(self, start: Mark, end: Mark) -> float | None:
        """Seconds from one mark to the other, ``None`` while they have not both passed."""

    def synchronize(self) -> None:
        """Block until every copy is over."""


class MemoryCopier:
    """Copies between two host memories, at once: the device is this CPU."""

    def begin(self) -> None:
        """There is one order only."""

    def copy(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], after: Mark | None) -> Copied:
        start = time.perf_counter()
        # Also right for targets made while the caller was in inference mode, which is not the mode of this thread.
        with torch.inference_mode():
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)
        return Copied(start, time.perf_counter())

    def mark(self) -> Mark:
        return time.perf_counter()

    def wait(self, mark: Mark) -> None:
        """Nothing to wait for: copies are over when they return."""

    def host_wait(self, mark: Mark) -> None:
        """Nothing to wait for: copies are over when they return."""

    def seconds_between(self, start: Mark, end: Mark) -> float | None:
        return float(end - start)

    def synchronize(self) -> None:
        """Nothing to wait for: copies are over when they return."""


class CudaCopier:
    """Copies on a CUDA stream of their own.

    Parameters
    ----------
    device
        The GPU that the targets are on.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._compute = torch.cuda.current_stream(device)

    def begin(self) -> None:
        # Asked for once: it takes longer than to record an event.
        self._compute = torch.cuda.current_stream(self._device)
        # What is copied into may have been other tensors' memory, which queued work still reads.
        self._stream.wait_stream(self._compute)

    def copy(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], after: Mark | None) -> Copied:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Called from reading threads too, where neither the device nor the stream is set. Not by ``with``: its
        # bookkeeping would take longer than the rest of this method.
        before = torch.cuda.current_stream(self._device)
        torch.cuda.set_stream(self._stream)
        try:
            if after is not None:
                self._stream.wait_event(after)
            start.record(self._stream)
            with torch.inference_mode():
                for source, target in zip(sources, targets, strict=True):
                    target.copy_(source, non_blocking=True)
            end.record(self._stream)
        finally:
            torch.cuda.set_stream(before)
        return Copied(start, end)

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._compute)
        return event

    def wait(self, mark: Mark) -> None:
        self._compute.wait_event(mark)

    def host_wait(self, mark: Mark) -> None:
        mark.synchronize()

    def seconds_between(self, start: Mark, end: Mark) -> float | None:
        if not (start.query() and end.query()):
            return None
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        self._stream.synchronize()
