"""Anonymous host memory, in one piece, that can be locked for a GPU."""

from __future__ import annotations

import contextlib
import mmap

import torch

from ..errors import ClosedError
from . import pinning
from .ring import PAGE, align


class HostArena:
    """Page-aligned anonymous host memory in one mapping, given back on :meth:`close`.

    Parameters
    ----------
    nbytes
        Size; rounded up to a page.
    """

    def __init__(self, nbytes: int):
        self.nbytes = align(max(nbytes, PAGE))
        self._map: mmap.mmap | None = mmap.mmap(-1, self.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Fewer page faults: reading into fresh memory is faster with huge pages; a refusal changes nothing.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._tensor: torch.Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)
        self._locked: list[tuple[torch.Tensor, torch.device]] = []

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """A uint8 tensor over ``nbytes`` from ``offset``; valid until :meth:`close`."""
        if self._tensor is None:
            raise ClosedError("the host memory was given back")
        return self._tensor[offset : offset + nbytes]

    def lock(self, device: torch.device, offset: int = 0, nbytes: int | None = None) -> bool:
        """Lock a part, from a page on, so that copies to ``device`` run at the speed of the link.

        Pages that were written to already are locked faster. Where the system refuses, the part stays pageable:
        copies from it are right, but slow.
        """
        part = self.view(offset, align(self.nbytes - offset if nbytes is None else nbytes))
        is_locked = pinning.register(part, device)
        if is_locked:
            self._locked.append((part, device))
        return is_locked

    def close(self) -> None:
        """Unlock and drop the memory; it is unmapped when the last view of it is gone."""
        while self._locked:
            pinning.unregister(*self._locked.pop())
        self._tensor = self._map = None
