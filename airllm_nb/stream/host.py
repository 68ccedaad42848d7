"""Locking host memory for a GPU, and anonymous memory, in one piece, that can be locked.

Registered pages are copied at the speed of the link, others at a fraction of it.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

from ..errors import ClosedError
from .ring import PAGE, align

# cudaHostRegisterReadOnly: the only flag under which pages of a read-only shared mapping can be registered.
READ_ONLY = 8


class HostMemory:
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
        is_locked = register(part, device)
        if is_locked:
            self._locked.append((part, device))
        return is_locked

    def close(self) -> None:
        """Unlock and drop the memory; it is unmapped when the last view of it is gone."""
        while self._locked:
            unregister(*self._locked.pop())
        self._tensor = self._map = None


def register(memory: torch.Tensor, device: torch.device, flags: int = 0) -> bool:
    """Lock the whole pages that ``memory`` (uint8, page-aligned) lies on; ``False`` where the system refuses.

    Registering is faster than CUDA's own allocation, and rounds nothing up. A copy must lie inside one registration.
    """
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), flags)) == 0:
            return True
        # A refusal stays this thread's last error, and the next kernel launch would report it as its own.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device).add_(1)
    return False


def unregister(memory: torch.Tensor, device: torch.device) -> None:
    """Undo :func:`register`; no copy from ``memory`` may be under way."""
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
