"""Checkpoints of a known shape with random weights: what speed depends on, without a download.

The files are what the real ones are, packed as they are published, config, index and tokenizer included; only the
values are made up. A matrix repeats one random block whose length is prime, so that no two rows are the same and the
disk sets the pace. All is written into a folder beside the final one, which is renamed at the end: what is there is
whole.
"""

from __future__ import annotations

import functools
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..disk import entries, read_json, status
from ..encoding.base import Part
from ..encoding.formats import get_encoding
from ..errors import StoreError
from ..intake.written import store_jobs
from ..progress import Progress, ProgressCallback, silent
from ..store.atomic import write_atomically
from ..store.listing import are_whole
from ..store.locks import locked
from ..store.manifest import StoreMeta
from ..store.names import SYNTHETIC_MARKER, partial
from ..store.shard import ShardJob, plain, write_shards
from ..store.space import OVERHEAD, check_space
from ..store.writer import write_store
from ..tensors.dtypes import TORCH_DTYPES
from ..tensors.index import INDEX_FILE, ITEMSIZE
from .shapes import SHAPES, native_tensors, shape_config, skeleton_of, tensors_by_file

__all__ = ["SHAPES", "is_finished", "remove", "shape_config", "write"]

# Values in a random block, a prime: 32 MiB of bfloat16.
BLOCK = 16_777_213
# By the end of a part's name, where its values begin, for weights of about ±0.04: 8-bit values count up from their
# minimum; MXFP4's scales are exponents.
_LEAST = {"absmax": 0.03, "spread": 0.07, "minimum": -0.05, "_scale_inv": 0.01, "_scales": 119}


def write(
    folder: Path, shape: str, layers: int, compression: str | None = None, *, progress: ProgressCallback = silent
) -> int:
    """Write a checkpoint of one file a layer and one for the rest, unless it is there; returns its bytes.

    Parameters
    ----------
    compression
        The finished store that this would make of the checkpoint is written instead.

    Raises
    ------
    StoreError
        If the disk has no room (both sizes are named), or something else lies in ``folder``.
    """
    config, recipe = shape_config(shape, layers), _recipe(shape, layers, compression)
    if compression is not None:
        config.pop("quantization_config", None)
    jobs = _jobs(config, compression)
    nbytes = sum(entry.nbytes for job in jobs for entry in job.entries())
    work = folder.with_name(partial(folder.name))
    try:
        work.mkdir(parents=True, exist_ok=True)
        try:
            # A second process waits here, and finds it done.
            with locked(work, progress):
                if is_finished(folder, shape, layers, compression):
                    return nbytes
                _make_way(folder, recipe)
                check_space(folder, nbytes + OVERHEAD, "the synthetic checkpoint", "",
                            "ask for fewer layers, or name a folder on a larger disk with AIRLLM_NB_CACHE")  # fmt: skip
                made = work / "made"
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir(parents=True)
                if compression is None:
                    _write_plain(made, jobs, progress)
                else:
                    meta = StoreMeta(compression, "bfloat16", "synthetic")
                    write_store(made, jobs, meta, progress=lambda done: progress(done._replace(stage="write")))
                _write_companions(made, config, recipe)
                made.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StoreError) and error.__cause__ is None:
            raise
        reason = error.strerror or error.__cause__ or error
        raise StoreError(f"the synthetic checkpoint cannot be written to {folder} ({reason}) and nothing of it is "
                         "left; free some space, or name another place with AIRLLM_NB_CACHE") from error  # fmt: skip
    return nbytes


def is_finished(folder: Path, shape: str, layers: int, compression: str | None = None) -> bool:
    """Whether ``folder`` holds this checkpoint, all files in their sizes."""
    found = _marker(folder)
    return found.get("recipe") == _recipe(shape, layers, compression) and are_whole(folder, found.get("files"))


def remove(folder: Path) -> None:
    """Delete a checkpoint; one that is deleted in part has another name already."""
    work = folder.with_name(partial(folder.name))
    if folder.is_dir():
        shutil.rmtree(work, ignore_errors=True)
        folder.rename(work)
    shutil.rmtree(work, ignore_errors=True)


def _make_way(folder: Path, recipe: dict[str, Any]) -> None:
    if not folder.exists():
        return
    if folder.is_dir() and (not any(entries(folder)) or _marker(folder).get("recipe") == recipe):
        shutil.rmtree(folder)
        return
    raise StoreError(f"{folder} is there already and holds something else; name another folder, or delete it")


def _recipe(shape: str, layers: int, compression: str | None) -> dict[str, Any]:
    return {"shape": shape, "layers": layers, "compression": compression}


def _marker(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_json(folder / SYNTHETIC_MARKER)
    return {}


def _write_companions(folder: Path, config: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Tokenizer and config, and last what says that all is there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A token a byte, as far down as the special ones allow, and words that only an answer has.
    special = {0: "<unk>", config.get("bos_token_id", 1): "<s>", config["eos_token_id"]: "</s>"}
    free = (number for number in range(config["vocab_size"]) if number not in special)
    letters = dict(zip(free, sorted(pre_tokenizers.ByteLevel.alphabet()), strict=False))
    names = special | letters
    words = {names.get(number, f" t{number}"): number for number in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())
    files = {path.name: status(path).st_size for path in sorted(entries(folder)) if path.is_file()}
    write_atomically(folder / SYNTHETIC_MARKER, json.dumps({"recipe": recipe, "files": files}, indent=1).encode())


# --- the weights


class _Noise:
    """Random bytes for tensors of any size, cut from one block a kind."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, str], memoryview] = {}

    def chunks(self, name: str, parts: Sequence[Part]) -> Iterator[memoryview]:
        """The bytes of all parts of a tensor, from a place in the block that its name gives."""
        for part in parts:
            kind = "norm" if "norm" in name else part.attribute
            if (kind, part.dtype) not in self._blocks:
                self._blocks[kind, part.dtype] = _block(kind, TORCH_DTYPES[part.dtype])
            block, size, left = self._blocks[kind, part.dtype], ITEMSIZE[part.dtype], part.nbytes
            start = zlib.crc32(name.encode()) * size % len(block)
            while left:
                chunk = block[start : start + left]
                yield chunk
                left, start = left - len(chunk), 0


def _block(kind: str, dtype: torch.dtype) -> memoryview:
    generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()))
    least = next((value for end, value in _LEAST.items() if kind.endswith(end)), None)
    if dtype == torch.uint8:  # but for exponents, any byte is a weight
        low, high = (0, 256) if least is None else (int(least), int(least) + 3)
        values = torch.randint(low, high, (BLOCK,), dtype=torch.uint8, generator=generator)
    elif kind == "norm":
        values = torch.ones(BLOCK, dtype=dtype)
    elif least is None:  # one byte has its scale beside it
        values = torch.randn(BLOCK, generator=generator).mul_(0.02 if dtype.itemsize > 1 else 1.0).to(dtype)
    else:
        values = torch.rand(BLOCK, generator=generator).mul_(0.02).add_(least).to(dtype)
    return memoryview(values.view(torch.uint8).numpy())


def _jobs(config: dict[str, Any], compression: str | None) -> list[ShardJob]:
    """One file a layer, and one for the rest: what is published, or what the conversion of it would write."""
    noise = _Noise()
    if compression is not None:
        skeleton = skeleton_of(config)
        jobs = store_jobs(native_tensors(skeleton), skeleton, get_encoding(compression), torch.bfloat16)
    else:
        files = tensors_by_file(config)
        jobs = [
            ShardJob(f"model-{number:05d}-of-{len(files):05d}",
                     tuple(plain(name, info.dtype, info.shape, tuple) for name, info in file.items()),
                     concurrent=True, is_padded=False)
            for number, file in enumerate(files, 1)
        ]  # fmt: skip
    return [
        replace(job, items=tuple(
            replace(item, produce=functools.partial(noise.chunks, item.name, item.parts)) for item in job.items
        )) for job in jobs
    ]  # fmt: skip


def _write_plain(folder: Path, jobs: list[ShardJob], progress: ProgressCallback) -> None:
    """Files as the reference library writes them, and their index."""
    done, total = 0, sum(job.nbytes for job in jobs)

    def wrote(file: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(Progress("write", done, total, detail=file))

    write_shards(folder, jobs, wrote, lambda job, sha256: None)
    weight_map = {item.name: job.file for job in jobs for item in job.items}
    nbytes = sum(entry.nbytes for job in jobs for entry in job.entries())
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    write_atomically(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True).encode())
