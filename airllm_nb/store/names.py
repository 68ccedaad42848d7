"""How stores, and the files in them and beside them, are called: the one place where such a name is made or read."""

from __future__ import annotations

import os
import re
import secrets
import threading
from dataclasses import dataclass

# In a store's folder, beside its shards.
MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", ".lock"
# There too, while weight files are downloaded one by one; it goes when only the manifest is left to write.
DOWNLOAD = "download"
# In a model's folder whose weights were deleted once a store was made of them; says where the stores are.
POINTER = "airllm_nb_store.json"
# Folders beside the stores: copies of adapters, and random checkpoints of known shapes with what marks one.
ADAPTERS = "adapters"
SYNTHETIC, SYNTHETIC_MARKER = "synthetic", "synthetic.json"

# In the place of a codec: only what was written beside a checkpoint that is read in place; and a copy of an adapter.
BESIDE, ADAPTER = "normalised", "adapter"

_STORE = re.compile(r"(?P<model>.+)--(?P<codec>[a-z0-9]+)--(?P<dtype>b?float\d+)--(?P<key>[0-9a-f]{8})")
_COPY = re.compile(r"(?P<model>.+)--(?P<key>[0-9a-f]{16})\.safetensors")
_EXPERT = re.compile(r"(?P<expert>(?P<module>[^\[\]]*)\[(?P<number>\d{1,9})\])\.(?P<rest>.+)")
_SHARD = re.compile(r"(layer|rest|carried)(-\d{5,})*\.safetensors")
# What transformers calls a config, a tokenizer's file, a template or an index.
_COMPANION = re.compile(r"([\w.-]*(config|token|vocab|merges|template|processor|spiece|sentencepiece|\.index))[\w.-]*"
                        r"\.(json|jinja|txt|model|tiktoken)")  # fmt: skip
_TEMPORARY = re.compile(r"(.+)\.\d+-\d+\.tmp")
_REMOVED = re.compile(r"(.+)\.[0-9a-f]{8}\.removing")
_PARTIAL = re.compile(r"\..+\.partial")


@dataclass(frozen=True)
class StoreName:
    """The name of a store's folder, or of the file that is a copy of an adapter.

    Attributes
    ----------
    model
        For people: letters, digits, ``_``, ``.`` and ``-``.
    codec, dtype
        What the weights are encoded with, or :data:`BESIDE` or :data:`ADAPTER`; what they were cast to before.
    key
        The beginning of the fingerprint of what it was made from.
    """

    model: str
    codec: str
    dtype: str
    key: str

    def __str__(self) -> str:
        if self.codec == ADAPTER:
            return f"{self.model}--{self.key}.safetensors"
        return f"{self.model}--{self.codec}--{self.dtype}--{self.key}"

    @classmethod
    def parse(cls, name: str) -> StoreName | None:
        """The name of a store's folder, or ``None``."""
        found = _STORE.fullmatch(name)
        return cls(**found.groupdict()) if found else None

    @classmethod
    def parse_copy(cls, name: str) -> StoreName | None:
        """The name of a copy of an adapter, or ``None``."""
        found = _COPY.fullmatch(name)
        return cls(found["model"], ADAPTER, "", found["key"]) if found else None


# --- parameters


def expert_name(module: str, number: int, rest: str) -> str:
    """What a store calls a weight, or a part of one, of one expert; the model has those of all in one parameter."""
    return f"{module}[{number}].{rest}"


def expert_of(name: str) -> str:
    """The beginning that all names of the same expert have; empty where the weight is no single expert's."""
    found = _EXPERT.fullmatch(name)
    return found["expert"] if found else ""


def parse_expert(name: str) -> tuple[str, int, str] | None:
    """What :func:`expert_name` made a name of; ``None`` of any other name."""
    found = _EXPERT.fullmatch(name)
    return (found["module"], int(found["number"]), found["rest"]) if found else None


# --- files


def shard_name(parameter: str) -> str:
    """``"model.layers.3.mlp.up_proj.weight"`` → ``"layer-00003"``; without a number ``"rest"``."""
    number = next((word for word in parameter.split(".") if word.isdecimal()), None)
    return "rest" if number is None else f"layer-{int(number):05d}"


def carried_name(first: int, last: int) -> str:
    """A shard of what weight file ``first`` (from 0) holds of parameters that end in file ``last``."""
    return f"carried-{first + 1:05d}-{last + 1:05d}"


def part_name(shard: str, file: int) -> str:
    """The part of a layer's shard that is written while weight file ``file`` (from 0) is here."""
    return f"{shard}-{file + 1:05d}"


def is_shard(name: str) -> bool:
    """Whether a file of a store is called so."""
    return _SHARD.fullmatch(name) is not None


def is_small(name: str) -> bool:
    """Whether a file beside the weights in a store is called so."""
    return name in (MANIFEST, JOURNAL) or _COMPANION.fullmatch(name) is not None


def temporary(name: str) -> str:
    """What a small file is called while this thread writes it."""
    return f"{name}.{os.getpid()}-{threading.get_ident()}.tmp"


def final(name: str) -> str | None:
    """What a small file with such a temporary name is called at the end; ``None`` of what is called otherwise."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else None


def unfinished(shard: str) -> str:
    """What a shard is called while it is written, under the lock of its store."""
    return f"{shard}.tmp"


def is_unfinished(name: str) -> bool:
    """Whether a shard is called so while it is written."""
    return name.endswith(".tmp") and is_shard(name.removesuffix(".tmp"))


# --- folders that are no stores yet, or no more


def removing(name: str) -> str:
    """What a folder is renamed to first, so that what a removal cut short leaves is never taken for a store."""
    return f"{name}.{secrets.token_hex(4)}.removing"


def removed(name: str) -> str | None:
    """What a folder that is being removed was called; ``None`` of any other."""
    found = _REMOVED.fullmatch(name)
    return found[1] if found else None


def partial(name: str) -> str:
    """Where a synthetic checkpoint is made; what a bench that was killed left of it."""
    return f".{name}.partial"


def is_partial(name: str) -> bool:
    return _PARTIAL.fullmatch(name) is not None
