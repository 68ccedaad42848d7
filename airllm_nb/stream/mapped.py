"""Checkpoint files mapped into memory: views of their bytes without reading or copying them.

Mappings are private, so nothing here can change a file, and read-only folders work. Pages are the page cache's: they
cost no anonymous memory and the system may drop and re-read them.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from ..disk import UNMAPPABLE, open_descriptor, open_file, status, told
from ..errors import CheckpointError, FileError
from ..tensors import libc
from ..tensors.files import read_exactly
from ..tensors.index import Extent, TensorInfo
from ..tensors.pages import map_pages
from .ring import CACHE_LINE, align


class MappedFiles:
    """Maps each file once; views stay valid while anything refers to them."""

    def __init__(self) -> None:
        self._maps: dict[Path, torch.Tensor] = {}

    def view(self, extent: Extent) -> torch.Tensor:
        """The extent's bytes, uint8 ``[nbytes]``; a copy where the file system cannot map files.

        Raises
        ------
        CheckpointError
            If the file is gone or has become shorter.
        """
        try:
            if extent.path not in self._maps:
                self._maps[extent.path] = _map(extent.path)
        except FileError as error:
            if error.errno not in UNMAPPABLE:  # some file systems can be read, but not mapped
                raise
            return _read(extent)
        whole = self._maps[extent.path]
        if extent.offset + extent.nbytes > whole.numel():
            raise CheckpointError(f"{extent.path} has become shorter since it was opened; load the model again")
        return whole[extent.offset : extent.offset + extent.nbytes]

    def tensor(self, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in its stored dtype; a view where its bytes are one aligned run, else a copy."""
        parts = [self.view(extent) for extent in info.extents]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        if whole.storage_offset() % dtype.itemsize:
            whole = whole.clone()
        return whole.view(dtype).view(info.shape)

    def copy(self, info: TensorInfo, stored: torch.dtype, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in memory of its own; on a CPU, without a cast, as far into a cache line as in its file."""
        view = self.tensor(info, stored)
        lead = view.data_ptr() % CACHE_LINE
        if device.type != "cpu" or dtype != stored or not lead:
            return view.to(device, dtype, copy=True)
        room = torch.empty(lead + view.nbytes, dtype=torch.uint8)
        return room[lead:].view(dtype).view(view.shape).copy_(view)

    def close(self) -> None:
        """Forget the mappings; each is unmapped when the last view of it is gone."""
        self._maps.clear()


def _map(path: Path) -> torch.Tensor:
    nbytes = status(path).st_size
    if libc.is_supported() and nbytes:
        return torch.frombuffer(map_pages(path, 0, align(nbytes), nbytes, private=True), dtype=torch.uint8)[:nbytes]
    with told(path, "mapped"), open_file(path) as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be mapped ({error}); download it again") from None
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _read(extent: Extent) -> torch.Tensor:
    data, descriptor = torch.empty(extent.nbytes, dtype=torch.uint8), open_descriptor(extent.path)
    try:
        read_exactly(descriptor, extent.path, extent.offset, memoryview(data.numpy()))
    finally:
        os.close(descriptor)
    return data
