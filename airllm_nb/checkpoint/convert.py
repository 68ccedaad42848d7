"""Source weights → the jobs that write a store: read in chunks of rows, cast, encode. Memory stays bounded."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..errors import CheckpointError
from .codec import TORCH_DTYPES, Codec
from .index import ITEMSIZE, TensorInfo
from .shard import Chunk, Item, ShardJob
from .store import Store

log = logging.getLogger(__name__)

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
CASTABLE = ("F64", "F32", "F16", "BF16")

# Values encoded at once; on a CPU bitsandbytes makes about five float32 copies of them in each thread.
HOST_VALUES, DEVICE_VALUES = 1 << 19, 1 << 24
MOST_THREADS = 8
SAMPLES, SAMPLE_BYTES = 16, 4096


def encode_jobs(
    index: Mapping[str, TensorInfo],
    codec: Codec,
    compressed: Collection[str],
    dtype: torch.dtype,
    *,
    keep: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> list[ShardJob]:
    """The shards of a store of ``index``: one a layer, and one of the rest.

    Parameters
    ----------
    index
        Parameter name → bytes, under the names that the model uses.
    compressed
        Names of the parameters that ``codec`` encodes; the others are stored as they are.
    dtype
        What matrices of floating point are cast to, before they are encoded too. Vectors keep their dtype: they are
        few bytes, and some must not be rounded.
    keep
        Names of further parameters that keep their dtype.
    device
        Where to encode.
    """
    device = torch.device(device)
    missing = [name for name in compressed if name not in index]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {missing[0]} ({len(missing)} of the weights to compress)")
    shards: dict[str, list[Item]] = {}
    for name, info in index.items():
        target = _target(info, dtype) if name not in keep else info.dtype
        encoder = codec if name in compressed else Codec()
        shards.setdefault(shard_name(name), []).append(_item(info, name, encoder, target, device))
    return [ShardJob(name, tuple(items)) for name, items in sorted(shards.items())]


def shard_name(parameter: str) -> str:
    """``"model.layers.3.mlp.up_proj.weight"`` → ``"layer-00003"``; without a number ``"rest"``."""
    number = next((word for word in parameter.split(".") if word.isdecimal()), None)
    return "rest" if number is None else f"layer-{int(number):05d}"


def fingerprint(files: Iterable[Path]) -> str:
    """What tells source files from others: names, sizes, and samples of their content; cheap at any size."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek((size - min(size, SAMPLE_BYTES)) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def delete_original(store: Store, files: Iterable[Path], cache_root: Path | None = None) -> list[Path]:
    """Delete the source's weight files once every byte of the store is verified; returns what was deleted.

    A file of the Hub's cache is a link into ``blobs`` of the same repository's folder: both are deleted. A link to
    anywhere else is left alone, as is what it points to, and logged.

    Parameters
    ----------
    files
        The weight files, and nothing else.
    cache_root
        When given, links are only followed in folders below it.

    Raises
    ------
    StoreError
        If the store is damaged; then nothing is deleted.
    """
    store.verify()
    deleted: list[Path] = []
    own = {path.resolve() for path in store.files}
    for path in files:
        if path.is_symlink():
            blob = _blob_of(path, cache_root)
            if blob is None:
                log.warning("%s is a link to %s, outside of its repository's cache: not deleted", path, path.resolve())
                continue
            path.unlink()
            blob.unlink()
            deleted += [path, blob]
        elif path.is_file() and path.resolve() not in own:
            path.unlink()
            deleted.append(path)
    return deleted


def _blob_of(link: Path, cache_root: Path | None) -> Path | None:
    """What a link in ``<repository>/snapshots/…`` points to, if that is a file in ``<repository>/blobs``."""
    snapshots = next((parent for parent in link.absolute().parents if parent.name == "snapshots"), None)
    if snapshots is None:
        return None
    repository, blob = snapshots.parent.resolve(), link.resolve()
    if cache_root is not None and cache_root.resolve() not in repository.parents:
        return None
    return blob if blob.parent == repository / "blobs" and blob.is_file() else None


def _target(info: TensorInfo, dtype: torch.dtype) -> str:
    return DTYPE_NAMES[dtype] if info.dtype in CASTABLE and len(info.shape) > 1 else info.dtype


def _item(info: TensorInfo, name: str, codec: Codec, target: str, device: torch.device) -> Item:
    parts = codec.parts(info.shape, target)
    if codec.name == "none":
        return Item(name, target, info.shape, parts, lambda: _cast(info, target))
    return Item(name, target, info.shape, parts, lambda: _encode(info, codec, TORCH_DTYPES[target], device))


def _cast(info: TensorInfo, target: str) -> Iterator[Chunk]:
    for rows in _rows(info, 1, DEVICE_VALUES):
        yield rows.to(TORCH_DTYPES[target])


def _encode(info: TensorInfo, codec: Codec, dtype: torch.dtype, device: torch.device) -> Iterator[Chunk]:
    """The first part goes out chunk by chunk; the others, a few percent of it, wait until it is complete."""
    # In one piece each: many small tensors between large temporaries would fragment the heap.
    waiting = [
        torch.empty(math.prod(part.shape), dtype=TORCH_DTYPES[part.dtype])
        for part in codec.parts(info.shape, DTYPE_NAMES[dtype])[1:]
    ]
    filled = [0] * len(waiting)
    for first, *others in _encoded_chunks(info, codec, dtype, device):
        yield first
        for number, part in enumerate(others):
            waiting[number][filled[number] : filled[number] + part.numel()] = part.reshape(-1)
            filled[number] += part.numel()
    yield from waiting


def _encoded_chunks(
    info: TensorInfo, codec: Codec, dtype: torch.dtype, device: torch.device
) -> Iterator[list[torch.Tensor]]:
    """Chunks in order, encoded a few at a time: reading and writing go on meanwhile.

    Each thread computes alone. Short operations that all cores share spend their time waiting for one another.
    """
    on_host = device.type == "cpu"
    threads = min(os.cpu_count() or 1, MOST_THREADS) if on_host else 2
    running: deque[Future[list[torch.Tensor]]] = deque()

    def encode(rows: torch.Tensor) -> list[torch.Tensor]:
        return [part.cpu() for part in codec.encode(rows.to(device).to(dtype)).values()]

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "encode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for rows in _rows(info, codec.row_step(info.shape), HOST_VALUES if on_host else DEVICE_VALUES):
                running.append(pool.submit(encode, rows))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
    finally:
        # The number is not of a thread alone: threads that are made later would compute with one.
        torch.set_num_threads(before)


def _rows(info: TensorInfo, step: int, values: int) -> Iterator[torch.Tensor]:
    """Chunks ``[rows, columns]`` of about ``values`` values and a multiple of ``step`` rows."""
    rows, columns = (info.shape[0] if info.shape else 1), math.prod(info.shape[1:])
    if not rows or not columns:
        return
    count = max(values // columns // step, 1) * step
    width = columns * ITEMSIZE[info.dtype]
    dtype = TORCH_DTYPES[info.dtype]
    with _Bytes(info) as source:
        for first in range(0, rows, count):
            taken = min(count, rows - first)
            yield source.read(first * width, taken * width).view(dtype).view(taken, columns)


class _Bytes:
    """Positional reads over a tensor's extents; unlike a mapping, a truncated file is an error and no signal."""

    def __init__(self, info: TensorInfo):
        self._info = info
        self._files: dict[Path, int] = {}

    def __enter__(self) -> _Bytes:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, start: int, nbytes: int) -> torch.Tensor:
        """A run of the tensor's bytes, as if its extents were one."""
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        target, filled, passed = memoryview(buffer.numpy()), 0, 0
        for extent in self._info.extents:
            skip = start + filled - passed
            passed += extent.nbytes
            take = min(extent.nbytes - skip, nbytes - filled)
            if take > 0:
                self._fill(extent.path, extent.offset + skip, target[filled : filled + take])
                filled += take
        if filled < nbytes:
            raise CheckpointError(f"{self._info.name}: its {self._info.nbytes:,} bytes are fewer than its shape "
                                  f"{list(self._info.shape)} asks for; download the checkpoint again")  # fmt: skip
        return buffer

    def _fill(self, path: Path, offset: int, target: memoryview) -> None:
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            while target:
                got = os.preadv(self._files[path], [target], offset)
                if not got:
                    raise CheckpointError(f"{path} ends before {self._info.name} does; download the file again")
                target, offset = target[got:], offset + got
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}; check the disk or download it again") from error
