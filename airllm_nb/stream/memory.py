"""The host and device memory that streamed units live in and pass through.

A RAM unit lies in host memory in one of three ways, best first:

``"page cache"``
    The pages of its file, locked where they are: no copy in RAM, nothing to load again after a restart.
``"locked"``
    Locked memory of this process, read once.
``"pageable"``
    Memory that cannot be locked; every sweep copies it into the locked ring.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..errors import CheckpointError
from .host import HostMemory
from .page_cache import CachedPieces
from .reader import CHUNK, Done, Pages, Reader, chunks
from .ring import CACHE_LINE, LOCKED, PAGE, PAGE_CACHE, PAGEABLE, Place, align, host_room, place
from .schedule import Stop
from .unit import Piece, Unit

log = logging.getLogger(__name__)


class StreamMemory:
    """Owns the memory and the reader of one model's streamed units.

    Parameters
    ----------
    units, in_ram
        In the order of use, and which of them stay in RAM between sweeps.
    device
        Where compute runs.
    arena_bytes
        Device memory that units are copied into; 0 where compute runs on host memory.
    ring_bytes
        Host memory that the other units pass through.
    ram
        How RAM units lie in host memory.
    direct
        Read past the page cache.

    Attributes
    ----------
    stops
        Where each unit is, in the order of ``units``.
    reader
        Fills the stops.
    """

    def __init__(
        self, units: Sequence[Unit], in_ram: Sequence[bool], *, device: torch.device, arena_bytes: int,
        ring_bytes: int, ram: str = LOCKED, direct: bool = False,
    ):  # fmt: skip
        self._device, self._is_copied = device, arena_bytes > 0
        self._ram = ram if self._is_copied else LOCKED
        self._files = Reader(direct=direct)
        self.reader: Reader | PageableUnits = self._files
        self._arenas: list[HostMemory] = []
        self._cached: list[CachedPieces] = []
        self.stops: list[Stop] = []
        try:
            self._lay_out(list(units), list(in_ram), arena_bytes, ring_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the reading threads and give the memory back. Safe to call twice; nothing may use it any more."""
        self._files.close()
        self.stops.clear()
        while self._cached:
            self._cached.pop().close()
        while self._arenas:
            self._arenas.pop().close()

    # --- laying out

    def _lay_out(self, units: list[Unit], in_ram: list[bool], arena_bytes: int, ring_bytes: int) -> None:
        hosts = self._hosts(units, in_ram, ring_bytes)
        arena, places = None, list[Place | None]([None] * len(units))
        if arena_bytes:
            leads = [unit.lead for unit in units]
            # A little more on a CPU, for units that do not begin where the one before ends.
            arena_bytes += min(CACHE_LINE * len(units), PAGE // 2) if any(leads) else 0
            arena = torch.empty(arena_bytes, dtype=torch.uint8, device=self._device)
            places = [*place([unit.nbytes for unit in units], arena_bytes, leads)]
        for unit, where in zip(units, places, strict=True):
            host = hosts[unit.name]
            target = None if arena is None or where is None else arena[where.offset : where.offset + where.nbytes]
            self.stops.append(
                Stop(unit, host.memory, target, host.place, where, host.place is None, pages=host.pages, lock=host.lock)
            )

    def _hosts(self, units: list[Unit], in_ram: list[bool], ring_bytes: int) -> dict[str, _Host]:
        kept = [unit for unit, stays in zip(units, in_ram, strict=True) if stays]
        passing = [unit for unit, stays in zip(units, in_ram, strict=True) if not stays]
        if kept and self._ram == PAGEABLE:
            own = self._own(kept)
            self.reader = PageableUnits(self._files, {unit.pieces: own[unit.name].memory for unit in kept})
            return self._passing(units, ring_bytes)
        keep = self._in_page_cache if self._ram == PAGE_CACHE else self._own
        return keep(kept) | self._passing(passing, ring_bytes)

    def _in_page_cache(self, units: Sequence[Unit]) -> dict[str, _Host]:
        try:
            for unit in units:
                self._cached.append(CachedPieces(unit.pieces))
        except CheckpointError as error:  # some file systems can be read, but not mapped
            log.warning("%s; weights are read into memory instead", error)
            self._ram = LOCKED
            return self._own(units)
        hosts = {}
        for unit, pages in zip(units, self._cached, strict=True):
            lock = functools.partial(pages.lock, self._device) if self._is_cuda else None
            hosts[unit.name] = _Host(None, None, pages, lock)
        return hosts

    def _own(self, units: Sequence[Unit]) -> dict[str, _Host]:
        if not units:
            return {}
        arena = self._arena(sum(align(unit.nbytes) for unit in units))
        hosts, cursor = {}, 0
        for unit in units:
            lock = None
            if self._is_cuda and self._ram == LOCKED:
                lock = functools.partial(self._lock, arena, cursor, unit.nbytes)
            hosts[unit.name] = _Host(arena.view(cursor, unit.nbytes), None, None, lock)
            cursor += align(unit.nbytes)
        return hosts

    def _passing(self, units: Sequence[Unit], ring_bytes: int) -> dict[str, _Host]:
        if not units:
            return {}
        ring = self._arena(ring_bytes)
        if self._is_cuda:
            # Pages that are there already are locked faster.
            ring.view(0, ring.nbytes).zero_()
            self._lock(ring, 0, ring.nbytes)
        hosts = {}
        for unit, room in zip(units, place([host_room(unit.nbytes) for unit in units], ring_bytes), strict=True):
            # In a page as in its file, so that direct reads go straight to where the bytes belong. Compute in this
            # memory needs tensors to begin where the unit says, too.
            shift = unit.pieces[0].extent.offset % PAGE if unit.pieces else 0
            if shift % CACHE_LINE != unit.lead and not self._is_copied:
                shift = unit.lead
            hosts[unit.name] = _Host(ring.view(room.offset + shift, unit.nbytes), room, None, None)
        return hosts

    def _arena(self, nbytes: int) -> HostMemory:
        arena = HostMemory(nbytes)
        self._arenas.append(arena)
        return arena

    def _lock(self, arena: HostMemory, offset: int, nbytes: int) -> None:
        if not arena.lock(self._device, offset, nbytes):
            log.warning("%d bytes of RAM could not be locked; they are copied to the GPU slowly", nbytes)

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"


class _Host(NamedTuple):
    """Where a unit is in host memory; see :class:`Stop`."""

    memory: torch.Tensor | None
    place: Place | None
    pages: CachedPieces | None
    lock: Callable[[], object] | None


class PageableUnits:
    """A reader that keeps some units in ordinary memory, where RAM cannot be locked (WSL2, containers with a limit).

    To the schedule such a unit looks like one on disk; only its reads come from memory after the first sweep.

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
