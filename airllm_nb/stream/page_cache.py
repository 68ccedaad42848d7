"""The page cache as the RAM tier: pieces of checkpoint files, mapped read-only and shared, locked where they are.

Nothing is copied into memory of our own, what one process has read serves the next, and a copy to a GPU runs as fast as
from pinned memory. Each piece has a mapping of its own, because neighbours may share a page and a page can be
registered once for each address only. For platforms that :mod:`~airllm_nb.tensors.libc` supports.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable, Sequence

import torch

from ..disk import open_file
from ..errors import CheckpointError
from ..tensors import libc
from ..tensors.files import read_exactly
from ..tensors.index import Extent
from ..tensors.pages import map_pages
from .host import READ_ONLY, register, unregister
from .ring import PAGE, align
from .unit import Piece

log = logging.getLogger(__name__)


class CachedPieces:
    """The pieces of one unit in the page cache.

    Attributes
    ----------
    views
        One uint8 tensor a piece: its bytes as the file has them. Never write to them.
    """

    def __init__(self, pieces: Sequence[Piece]):
        self._mappings = [_Mapping(piece.extent) for piece in pieces]
        self.views = [mapping.view for mapping in self._mappings]

    def jobs(self, chunk: int) -> list[Callable[[], None]]:
        """What to run, in any order and in parallel, to have every page in memory."""
        return [
            functools.partial(mapping.fetch, at, min(chunk, mapping.pages.numel() - at))
            for mapping in self._mappings
            for at in range(0, mapping.pages.numel(), chunk)
        ]

    def lock(self, device: torch.device) -> bool:
        """Keep the pages in memory and let ``device`` read them directly; whether the system allows it."""
        refused = [mapping.pages.numel() for mapping in self._mappings if not mapping.lock(device)]
        if refused:
            log.warning("%d bytes of the page cache could not be locked; they are copied slowly", sum(refused))
        return not refused

    def close(self) -> None:
        """Unlock; the mappings go with the last view."""
        for mapping in self._mappings:
            mapping.unlock()


class _Mapping:
    """The whole pages around one extent."""

    def __init__(self, extent: Extent):
        self._path, self._first = extent.path, extent.offset // PAGE * PAGE
        self._end, skip = extent.offset + extent.nbytes, extent.offset - self._first
        pages = map_pages(extent.path, self._first, align(skip + extent.nbytes), self._end)
        self.pages = torch.frombuffer(pages, dtype=torch.uint8)
        self.view = self.pages[skip : skip + extent.nbytes]
        self._locked_for: torch.device | None = None

    def fetch(self, at: int, nbytes: int) -> None:
        code = libc.populate(self.pages.data_ptr() + at, nbytes)
        if code == 0:
            return
        if code != errno.EINVAL:
            raise CheckpointError(f"{self._path} cannot be read near byte {self._first + at:,} ({os.strerror(code)}); "
                                  "was it changed while the model was open? Load the model again")  # fmt: skip
        # An older kernel: reading brings the pages in as well.
        first = self._first + at
        with open_file(self._path) as file:
            read_exactly(file.fileno(), self._path, first, memoryview(bytearray(min(nbytes, self._end - first))))

    def lock(self, device: torch.device) -> bool:
        # Pages that are not written back yet are registered slowly. A file system that cannot sync has none.
        with contextlib.suppress(OSError), open_file(self._path) as file:
            os.fsync(file.fileno())
        is_locked = register(self.pages, device, READ_ONLY)
        self._locked_for = device if is_locked else None
        return is_locked

    def unlock(self) -> None:
        device, self._locked_for = self._locked_for, None
        if device is not None:
            unregister(self.pages, device)
