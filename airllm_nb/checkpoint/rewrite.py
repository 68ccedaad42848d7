"""Lazy weights → a plain Hugging Face folder of safetensors: written once, one tensor in memory at a time.

For sources whose bytes cannot be streamed as they lie (pickles, GGUF). A shard appears under its name only when it is
whole and on the disk, so that an interrupted run goes on after the last one; the index is written last and means done.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..config import MiB, format_bytes
from ..errors import CheckpointError, StoreError
from ..trace import Progress, ProgressCallback, silent
from .index import INDEX_FILE, ITEMSIZE, read_header

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2048 * MiB
PAGE = 4096
_RESERVE = 64 * MiB


class Spec(NamedTuple):
    """What a tensor will be: the safetensors name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class LazyWeights(Protocol):
    """Tensors by name, each made when it is asked for; ``specs`` says beforehand what they will be."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...


def rewrite(
    folder: Path,
    weights: LazyWeights,
    *,
    companions: Callable[[Path], None],
    metadata: Mapping[str, str],
    progress: ProgressCallback = silent,
) -> Path:
    """Write ``weights`` into ``folder``, in the order of their specs; nothing happens when it is complete.

    Parameters
    ----------
    companions
        Writes config and tokenizer into the folder.
    metadata
        Text that says what the weights were made from; a folder made from something else is written anew.

    Raises
    ------
    StoreError
        If the disk is too small or cannot be written.
    """
    if is_complete(folder, metadata):
        return folder
    shards = _split(weights.specs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        heads = [_header(weights.specs, shard, metadata) for shard in shards]
        todo = [number for number, name in enumerate(names) if not _is_whole(folder / name, heads[number])]
        sizes = [sum(weights.specs[name].nbytes for name in shard) for shard in shards]
        _check_disk(folder, sum(sizes[number] for number in todo))
        done, total = sum(sizes) - sum(sizes[number] for number in todo), sum(sizes)
        companions(folder)
        for number in todo:
            report = _reporter(progress, done, total, names[number])
            _write_shard(folder / names[number], heads[number], weights, shards[number], report)
            done += sizes[number]
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
        _write(folder / INDEX_FILE, [json.dumps(index, indent=2).encode()])
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder} cannot be written ({error.strerror or error}); name another folder with "
                         "layer_shards_saving_path") from error  # fmt: skip
    progress(Progress("convert", total, total, detail=folder.name))
    return folder


def is_complete(folder: Path, metadata: Mapping[str, str]) -> bool:
    """Whether :func:`rewrite` finished here, from the same source, and every shard still has its header."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        if any(index["metadata"].get(key) != value for key, value in metadata.items()):
            return False
        for file in set(index["weight_map"].values()):
            read_header(folder / file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError):
        return False
    return True


def _split(specs: Mapping[str, Spec]) -> list[list[str]]:
    """Neighbours share a shard of at most :data:`SHARD_BYTES`; a larger tensor has its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _header(specs: Mapping[str, Spec], shard: list[str], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file, padded so that the data begin on a page."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name in shard:
        spec = specs[name]
        entries[name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes],
        }  # fmt: skip
        offset += spec.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _is_whole(path: Path, head: bytes) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(head)) == head
    return False


def _write_shard(
    path: Path, head: bytes, weights: LazyWeights, shard: list[str], report: Callable[[int], None]
) -> None:
    import torch

    def chunks() -> Any:
        yield head
        for name in shard:
            tensor, spec = weights[name], weights.specs[name]
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            if data.nbytes != spec.nbytes or tuple(tensor.shape) != spec.shape:
                raise CheckpointError(f"tensor {name!r} came as {tuple(tensor.shape)}, {spec.shape} was announced")
            yield memoryview(data)
            report(data.nbytes)

    _write(path, chunks())


def _write(path: Path, chunks: Any) -> None:
    """Write under a temporary name, flush to the disk, rename: the name exists only when the file is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _reporter(progress: ProgressCallback, done: int, total: int, detail: str) -> Callable[[int], None]:
    reached = done

    def report(nbytes: int) -> None:
        nonlocal reached
        reached += nbytes
        progress(Progress("convert", reached, total, detail=detail))

    return report


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need + _RESERVE > free:
        raise StoreError(f"{folder} needs {format_bytes(need)} but its disk has {format_bytes(free)} free; free some, or "
                         "name a folder on a larger disk with layer_shards_saving_path")  # fmt: skip
