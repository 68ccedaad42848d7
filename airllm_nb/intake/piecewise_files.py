"""Weight files that are downloaded one by one: how large each is, and whether what came is what was planned with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.bin.in_place import tensors_in_place
from ..checkpoint.hub.headers import Headers
from ..checkpoint.source import Source
from ..disk import open_file, status
from ..errors import CheckpointError
from ..tensors.index import TensorInfo
from ..tensors.inside import inside


def weight_sizes(source: Source, headers: Headers) -> dict[Path, int]:
    """The weight files and their bytes."""
    paths = [inside(source.folder, name) for name in source.wanted] or source.files
    return {path: status(path).st_size if path.is_file() else headers.sizes.get(path, 0) for path in paths}


def check_arrived(path: Path, nbytes: int, said: Mapping[str, TensorInfo]) -> None:
    """Whether a file that was downloaded to ``path`` has the tensors of its header on the Hub.

    Raises
    ------
    CheckpointError
        If it has others, elsewhere, or another size.
    """
    if status(path).st_size != nbytes:
        raise CheckpointError(f"{path} has {status(path).st_size:,} bytes, its header asks for {nbytes:,}; load again "
                              "to download it once more")  # fmt: skip
    if path.suffix != ".bin":
        return
    with open_file(path) as opened:
        found = tensors_in_place(path, opened) or {}
    if any(name not in found or _lies(info) != _lies(found[name]) for name, info in said.items()):
        raise CheckpointError(f"{path} is not the file that its header on the Hub is of; delete it and load again")


def _lies(info: TensorInfo) -> tuple[object, ...]:
    return info.dtype, info.shape, [(extent.offset, extent.nbytes) for extent in info.extents]
