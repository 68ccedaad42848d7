"""What fills slots with experts: the files, or host memory over a link."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from ..errors import GenerationStopped
from ..tensors.index import Extent
from .bank import Bank, Run, Slots
from .copier import Copied, Copier, Mark
from .host import HostMemory
from .lru import LRU
from .page_cache import CachedPieces
from .reader import Reader
from .ring import align
from .unit import Piece

# Holes in a file up to this are mapped with what is around them: a mapping costs more than its pages.
_HOLE = 1 << 20
Wanted = Sequence[tuple[int, int]]  # experts, and the slot that each is to go to


class Source(Protocol):
    """What fills slots with experts of one bank."""

    def load(self, wanted: Wanted, into: Slots, after: Mark) -> Copied | None:
        """Have each expert in its slot, once ``after`` has passed; ``None`` where that is so when it returns.

        Raises
        ------
        CheckpointError
            If a file cannot be read.
        GenerationStopped
            If it is cancelled meanwhile.
        """

    def addresses(self) -> list[list[int]] | None:
        """Of each expert those of its runs, where a device can read all of them itself; ``None`` where it cannot.

        Raises as :meth:`load` does.
        """

    def close(self) -> None: ...


class FromFiles:
    """Compute runs on host memory: experts are read to where they are computed with.

    Parameters
    ----------
    read
        Told of each reading: its bytes.
    """

    def __init__(self, bank: Bank, reading: Reading):
        self._bank, self._reading = bank, reading

    def load(self, wanted: Wanted, into: Slots, after: Mark) -> None:
        pieces = [Piece(run.extent, into.at(run, slot)) for expert, slot in wanted for run in self._bank.runs[expert]]
        self._reading.read(self._bank.name, pieces, into.memory)

    def addresses(self) -> None:
        """There is no other device."""

    def close(self) -> None:
        """Nothing is held."""


class FromHost:
    """Experts are copied over a link from host memory, which keeps as many as have a slot there.

    Parameters
    ----------
    slots, memory
        How many it keeps, and where. With 0 slots an expert at a time passes through the memory, which other banks use
        too.
    is_locked
        Whether the memory is.
    """

    def __init__(
        self, bank: Bank, reading: Reading, copier: Copier, slots: int, memory: torch.Tensor, is_locked: bool = False
    ):
        self._is_locked = is_locked
        self._bank, self._reading, self._copier = bank, reading, copier
        self._kept, self._memory = LRU(bank.experts, max(slots, 1)), memory
        self._room, self._count, self._keeps = align(bank.expert_bytes), max(slots, 1), slots > 0
        self._last: Copied | None = None

    def load(self, wanted: Wanted, into: Slots, after: Mark) -> Copied | None:
        first: Copied | None = None
        for start in range(0, len(wanted), self._count):
            copied = self._copy(wanted[start : start + self._count], into, after)
            first, self._last = first or copied, copied
        return Copied(first.start, self._last.end) if first and self._last else None

    def _copy(self, wanted: Wanted, into: Slots, after: Mark) -> Copied:
        places = self._places([expert for expert, _ in wanted])
        sources, targets = [], []
        for (expert, slot), place in zip(wanted, places, strict=True):
            for run, start in self._starts(expert, place):
                sources.append(self._memory[start : start + run.extent.nbytes])
                targets.append(into.target(run, slot))
        return self._copier.copy(sources, targets, after)

    def _places(self, experts: Sequence[int]) -> Sequence[int]:
        """Where they are in host memory, once those that were missing are read."""
        if not self._keeps:
            self._copier.synchronize()  # what is overwritten may be on its way
            self._kept.reset()
        places, missing = self._kept.ensure(experts)
        if missing:
            if self._last is not None:
                self._copier.host_wait(self._last.end)  # likewise
            pieces = [
                Piece(run.extent, start)
                for expert, place in missing.items()
                for run, start in self._starts(expert, place)
            ]
            try:
                self._reading.read(self._bank.name, pieces, self._memory)
            except BaseException:
                self._kept.forget(missing)
                raise
        return places

    def addresses(self) -> list[list[int]] | None:
        if not self._is_locked or self._count < self._bank.experts:
            return None
        places, base = self._places(range(self._bank.experts)), self._memory.data_ptr()
        return [[base + start for _, start in self._starts(expert, place)] for expert, place in enumerate(places)]

    def _starts(self, expert: int, place: int) -> Iterable[tuple[Run, int]]:
        at = place * self._room
        for run in self._bank.runs[expert]:
            yield run, at
            at += run.extent.nbytes

    def close(self) -> None:
        """The memory is its owner's."""


class FromPageCache:
    """Experts are copied from the page cache: the spans of files that a bank lies in, mapped and locked once each."""

    def __init__(self, bank: Bank, reading: Reading, copier: Copier, device: torch.device):
        self._bank, self._reading, self._copier, self._device = bank, reading, copier, device
        spans = _spans(run.extent for runs in bank.runs for run in runs)
        self._pages, self._spans, self._is_there = CachedPieces([Piece(span, 0) for span in spans]), spans, False
        self._order, self._is_locked = [_where(span) for span in spans], False

    def load(self, wanted: Wanted, into: Slots, after: Mark) -> Copied:
        self.fetch()
        runs = [(run, slot) for expert, slot in wanted for run in self._bank.runs[expert]]
        return self._copier.copy(
            [self.view(run.extent) for run, _ in runs], [into.target(run, slot) for run, slot in runs], after
        )

    def fetch(self) -> None:
        """Have all pages in memory, and locked: once."""
        if not self._is_there:
            self._reading.run(self._bank.name, self._pages, sum(span.nbytes for span in self._spans))
            self._is_locked = self._device.type == "cuda" and self._pages.lock(self._device)
            self._is_there = True

    def addresses(self) -> list[list[int]] | None:
        self.fetch()
        if not self._is_locked:
            return None
        return [[self.view(run.extent).data_ptr() for run in runs] for runs in self._bank.runs]

    def view(self, extent: Extent) -> torch.Tensor:
        """Its bytes in the page cache."""
        number = bisect.bisect_right(self._order, _where(extent)) - 1
        at = extent.offset - self._spans[number].offset
        return self._pages.views[number][at : at + extent.nbytes]

    def close(self) -> None:
        self._pages.close()


def _spans(extents: Iterable[Extent]) -> list[Extent]:
    """Runs of their files that hold all ``extents``, with holes of up to :data:`_HOLE`."""
    spans: list[Extent] = []
    for extent in sorted(extents, key=_where):
        last = spans[-1] if spans else None
        if last is not None and last.path == extent.path and extent.offset <= last.offset + last.nbytes + _HOLE:
            end = max(last.offset + last.nbytes, extent.offset + extent.nbytes)
            spans[-1] = Extent(last.path, last.offset, end - last.offset)
        else:
            spans.append(extent)
    return spans


def _where(extent: Extent) -> tuple[str, int]:
    return str(extent.path), extent.offset


class Reading:
    """Reads by the threads of a reader, and waits for them.

    Parameters
    ----------
    cancelled
        Asked when a reading is over: ``True`` ends the work.
    told
        Called with the name of the bank, bytes and start of each reading that is over.
    """

    def __init__(
        self, reader: Reader, cancelled: Callable[[], bool], clock: Callable[[], float],
        told: Callable[[str, int, float], None],
    ):  # fmt: skip
        self._reader, self._cancelled, self._clock, self._told = reader, cancelled, clock, told

    def read(self, name: str, pieces: Sequence[Piece], into: torch.Tensor) -> None:
        """Fill ``into`` (uint8) with ``pieces``."""
        memory, nbytes = memoryview(into.numpy()), sum(each.extent.nbytes for each in pieces)
        self._wait(name, nbytes, lambda done: self._reader.submit(pieces, memory, done))

    def run(self, name: str, pages: CachedPieces, nbytes: int) -> None:
        """Have ``pages`` in memory."""
        self._wait(name, nbytes, lambda done: self._reader.submit((), pages, done))

    def _wait(self, name: str, nbytes: int, submit: Callable[[Callable[[BaseException | None], None]], None]) -> None:
        # A lock, and no event: an interrupt within that, which is Python code, could leave it unable to be set.
        errors, over, start = list[BaseException](), threading.Lock(), self._clock()
        over.acquire()

        def done(error: BaseException | None) -> None:
            if error is not None:
                errors.append(error)
            over.release()

        submit(done)
        try:
            over.acquire()
        except BaseException:  # Ctrl-C: what is being filled is somebody else's afterwards
            over.acquire()
            raise
        if errors:
            raise errors[0]
        self._told(name, nbytes, start)
        if self._cancelled():
            raise GenerationStopped("stopped while experts were read")


class HostSlots:
    """Host memory of which sources take their slots; given back on :meth:`close`. ``is_locked``: for a device."""

    def __init__(self, nbytes: int, device: torch.device, locked: bool):
        self._memory, self._cursor, self.is_locked = HostMemory(nbytes), 0, False
        if device.type == "cuda" and locked:
            self._memory.view(0, nbytes).zero_()  # pages that are there already are locked faster
            self.is_locked = self._memory.lock(device)

    def take(self, nbytes: int) -> torch.Tensor:
        """The next ``nbytes``, from a page on."""
        start, self._cursor = self._cursor, self._cursor + align(nbytes)
        return self._memory.view(start, align(nbytes))

    def close(self) -> None:
        self._memory.close()
