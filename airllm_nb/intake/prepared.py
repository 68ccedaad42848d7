"""What is known of a model, from its name to units of bytes; each step of :mod:`.prepare` adds what it learns."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.hub.headers import Headers
from ..checkpoint.lora.adapter import Adapter
from ..checkpoint.source import Source, store_folder
from ..config import LoadOptions
from ..encoding.base import Encoding
from ..encoding.scratch import Scratch
from ..model.skeleton import ModelUnit, Weight
from ..plan.needs import DEFAULT_LENGTH, context_length
from ..plan.residency import Needs, UnitSize
from ..plan.work import Work
from ..progress import ProgressCallback, silent
from ..store.locks import Hold
from ..store.manifest import StoreMeta
from ..tensors.index import TensorInfo
from .containers.container import Container, ToWrite, Weights, dtype_name
from .containers.table import container_of
from .find.picks import Room

if TYPE_CHECKING:
    import torch


@dataclass
class Prepared:
    """A model on its way from a name to units. It holds no memory, and knows no budget: what plans is given one.

    Attributes
    ----------
    weights
        Whether weights that are missing are downloaded and written; else sizes are all that is learned of them.
    room
        By what the machine has, one of several files is chosen.
    source, container, headers, codec
        What is found: which files, what reads them, where they are not here what the Hub says of them, and how weights
        are encoded when they are computed with.
    config, dtype, skeleton, scratch, packed_as, adapter
        What is understood: the native config and the native model without weights. ``packed_as`` says how the
        checkpoint's own weights are packed, for people; ``adapter`` is the LoRA adapter that is applied, if any.
    known
        What is known of weights before any of them is here.
    at_rest
        Where weights are read, of a model that can run.
    written_once
        Bytes beside the compressed store that are written before the model can run.
    piecewise
        Bytes that the disk must have room for where each weight file is downloaded, encoded and deleted before the
        next; ``None`` where the whole download comes first.
    folder, tensors
        Where config and tokenizer are; where parameters lie, by the names that the skeleton has for them.
    held
        Keeps the folders that are read from being removed, until it is closed.
    units, small, sizes, fixed_needs, kept_bytes
        What :func:`~airllm_nb.intake.planning.cut` makes of it: what is streamed and what always stays; the units as
        the plan knows them, of which a table that is also the head takes no bytes of its own; device memory that every
        run needs alike; RAM for matrices that lie packed and are kept as they were unpacked.
    """

    model: str | Path
    options: LoadOptions
    progress: ProgressCallback = silent
    weights: bool = True

    device: torch.device = field(init=False)
    room: Room = field(init=False)
    source: Source = field(init=False)
    headers: Headers = field(init=False)
    container: Container = field(init=False)
    codec: Encoding = field(init=False)

    config: Any = field(init=False)
    dtype: torch.dtype = field(init=False)
    skeleton: Any = field(init=False)
    scratch: Scratch = field(default_factory=Scratch)
    packed_as: str = ""
    adapter: Adapter | None = None

    known: Weights | None = None
    at_rest: Weights | None = None
    written_once: int = 0
    piecewise: int | None = None

    folder: Path = field(init=False)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    held: Hold = field(default_factory=Hold)
    units: list[ModelUnit] = field(default_factory=list)
    small: list[Weight] = field(default_factory=list)
    sizes: list[UnitSize] = field(default_factory=list)
    fixed_needs: Needs = field(default_factory=Needs)
    kept_bytes: int = 0
    slice_limit: int | None = None
    deltas: list[Weight] | None = None

    def take(self, source: Source, container: Container | None = None) -> None:
        """Learn which files it is of, or which of these are here now."""
        self.source = source
        self.container = container or container_of(source, self.headers)
        self.__dict__.pop("to_write", None)

    @property
    def is_compressed(self) -> bool:
        """Whether it computes on weights that we encoded."""
        return self.codec.compression != "none"

    @functools.cached_property
    def to_write(self) -> ToWrite:
        """What must be written before it can run: decided here, and nowhere else."""
        return self.container.to_write(self.dtype, self.is_compressed)

    def store(self, kind: str) -> Path:
        """The folder of a store: of a codec, or of what is written beside a checkpoint that is read in place."""
        return store_folder(self.source, kind, dtype_name(self.dtype), self.options)

    @property
    def meta(self) -> StoreMeta:
        """What its store is of."""
        return StoreMeta(self.codec.compression, dtype_name(self.dtype), self.source.fingerprint)

    @property
    def sizes_from(self) -> str:
        """``"files"`` that are here, ``"headers"`` on the Hub, or the ``"config"`` alone; see ``why_config``."""
        if self.at_rest is not None:
            return "files"
        return "config" if self.known is None or self.is_compressed else "files" if self.source.files else "headers"

    @property
    def why_config(self) -> str:
        """Why headers are no help; empty where they are."""
        return self.headers.why_not

    @property
    def encoding(self) -> str | None:
        """How the weights are encoded, for people; ``None`` where they are plain."""
        return (self.codec.compression if self.is_compressed else self.packed_as) or None

    @property
    def context(self) -> int | None:
        """The longest sequence, in tokens: what was asked for, which may be more than the model was made for."""
        return self.options.max_seq_len or context_length(self.config)

    @property
    def planned(self) -> Work:
        """What memory is kept for before anything is asked."""
        length = self.options.max_seq_len or min(self.context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        return Work(length, self.options.batch_size, length, masked=self.options.batch_size > 1)
