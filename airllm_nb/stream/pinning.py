"""Locking host memory for a GPU: registered pages are copied at the speed of the link, others at a fraction of it."""

from __future__ import annotations

import contextlib

import torch

# cudaHostRegisterReadOnly: the only flag under which pages of a read-only shared mapping can be registered.
READ_ONLY = 8


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
