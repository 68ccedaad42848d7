"""The header of a GGUF file on the Hub, by ranged requests: config, tokenizer and tensor table, without a weight."""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path

from ...errors import CheckpointError, UnsupportedModelError
from ...tensors.inside import inside
from ..gguf.cursor import Truncated, call, damaged, walk
from ..gguf.header import GGUFTensor, read_gguf, read_part
from ..gguf.rope import TENSORS as ROPE_TENSORS
from ..gguf.split import part_names
from .ranges import Ranges

log = logging.getLogger(__name__)

# Most of a header is the tokenizer's vocabulary: some megabytes.
FIRST, LONGEST = 2 << 20, 256 << 20


def gguf_header(repo_id: str, commit: str, name: str, token: str | None) -> Path:
    """A local file that is as long as the one on the Hub and holds its header; the rest is a hole that takes no disk.

    Of a split file all parts are made, beside one another. It is kept for this process: a plan and a load after it ask
    for the same.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        If the header is damaged, or not one that can be read.
    NoRanges
        If the server sends whole files only.
    """
    folder = inside(Path(_folder().name), f"{repo_id.replace('/', '--')}/{commit}")
    for part in part_names(name):
        path = inside(folder, part)
        if not path.is_file():
            call(path, f"{repo_id}:{part}")
            call(_unfinished(path), f"{repo_id}:{part}")
            _make(path, Ranges(repo_id, commit, token, part))
    return read_gguf(inside(folder, name)).path


def _make(path: Path, file: Ranges) -> None:
    data, size = _fetched(file, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _unfinished(path)
    with part.open("wb") as target:
        target.write(data)
        target.truncate(size)
        target.flush()
        # What RoPE is scaled by is a tensor, some hundred bytes, and belongs to the config.
        for tensor in _rope_tensors(data, part):
            target.seek(tensor.offset)
            target.write(file.read(tensor.offset, tensor.nbytes))
    part.replace(path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _rope_tensors(data: bytes, path: Path) -> list[GGUFTensor]:
    if not any(name.encode() in data for name in ROPE_TENSORS):
        return []
    tensors = read_part(path).tensors
    return [tensors[name] for name in ROPE_TENSORS if name in tensors and tensors[name].nbytes < FIRST]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="airllm-nb-headers-")


def _fetched(file: Ranges, path: Path) -> tuple[bytes, int]:
    data = file.read(0, FIRST)
    while not _is_whole(data, path) and len(data) < file.size:
        if len(data) >= LONGEST:
            raise damaged(path, f"its header is longer than {LONGEST:,} bytes")
        data += file.read(len(data), len(data))
    return data, file.size


def _is_whole(data: bytes, path: Path) -> bool:
    """Whether the header ends in ``data``; also of what is no GGUF header, which another reader refuses."""
    try:
        walk(data, path)
    except Truncated:
        return False
    except (CheckpointError, UnsupportedModelError):
        return True
    return True
