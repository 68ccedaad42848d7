"""Lazy weights → a folder that is both a store and a plain Hugging Face checkpoint: written once, tensor by tensor.

For sources whose bytes cannot be streamed as they lie (pickles, GGUF).
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import StoreError
from ..progress import ProgressCallback
from ..store.locks import locked
from ..store.manifest import StoreMeta, open_store
from ..store.names import shard_name
from ..store.shard import Chunk, Entry, Item, ShardJob, plain
from ..store.writer import write_store
from ..tensors.files import Unchanged
from ..tensors.index import INDEX_FILE
from .companions import copy_small

if TYPE_CHECKING:
    import torch


class LazyWeights(Protocol):
    """Tensors by name, each made when it is asked for; ``specs`` says beforehand what they will be."""

    @property
    def specs(self) -> Mapping[str, Entry]: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...


def rewrite(
    folder: Path, weights: LazyWeights, meta: StoreMeta, companions: Callable[[Path], None],
    progress: ProgressCallback, origin: str = "", sources: Iterable[Path] = (),
) -> Path:  # fmt: skip
    """Write ``weights`` into ``folder``, or what an earlier start left to write.

    Parameters
    ----------
    companions
        Writes config and tokenizer into the folder that it is given.
    sources
        The files that the weights come from: if one changes meanwhile, what was made of it is not kept.

    Raises
    ------
    StoreError
        If the disk is too small or cannot be written.
    """
    shards: dict[str, list[Item]] = {}
    for name, spec in weights.specs.items():
        shards.setdefault(shard_name(name), []).append(_item(weights, spec))
    unchanged = Unchanged(sources)
    jobs = [ShardJob(name, tuple(items)) for name, items in sorted(shards.items())]
    with tempfile.TemporaryDirectory(prefix="airllm-nb-") as made:
        # Before the weights: a tokenizer that cannot be read should not cost a conversion first.
        companions(Path(made))
        weight_map = {item.name: job.file for job in jobs for item in job.items}
        index = {"metadata": {"total_size": sum(job.nbytes for job in jobs)}, "weight_map": weight_map}
        (Path(made) / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
        beside = functools.partial(_adopt, Path(made))
        with locked(folder, progress):
            write_store(folder, jobs, meta, progress=progress, beside=beside, origin=origin,
                        unchanged=unchanged)  # fmt: skip
            if not (folder / INDEX_FILE).is_file():  # a store that was finished before all of these came first
                beside(folder)
    return folder


def is_complete(folder: Path, meta: StoreMeta) -> bool:
    """Whether :func:`rewrite` finished here with the same ``meta``."""
    with suppress(StoreError):
        store = open_store(folder)
        return store is not None and store.meta == meta and (folder / INDEX_FILE).is_file()
    return False


def _item(weights: LazyWeights, spec: Entry) -> Item:
    def produce() -> Iterator[Chunk]:
        yield weights[spec.name]

    return plain(spec.name, spec.dtype, spec.shape, produce)


def _adopt(made: Path, folder: Path) -> None:
    try:
        for path in sorted(made.rglob("*")):
            target = folder / path.relative_to(made)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                copy_small(path, target)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error}); free some space or name another folder with "
                         "layer_shards_saving_path=…") from error  # fmt: skip
