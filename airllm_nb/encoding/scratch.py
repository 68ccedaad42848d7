"""Memory that matrices are dequantised into, one after the other."""

from __future__ import annotations

import math

import torch


class Scratch:
    """One buffer that matrices are dequantised into, one after the other; it grows to the largest and stays.

    One compute stream may use it: the next matrix overwrites the last.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel()

    def reserve(self, nbytes: int, device: torch.device) -> None:
        """Have room for ``nbytes``; the former content is lost."""
        if self._buffer is None or self._buffer.numel() < nbytes or self._buffer.device != device:
            self._buffer = None  # give back before taking more
            # A tensor born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def view(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The beginning of the buffer as a tensor of undefined content."""
        nbytes = math.prod(shape) * dtype.itemsize
        self.reserve(nbytes, device)
        assert self._buffer is not None
        return self._buffer[:nbytes].view(dtype).view(shape)

    def close(self) -> None:
        """Free the buffer; a later :meth:`view` makes a new one."""
        self._buffer = None
