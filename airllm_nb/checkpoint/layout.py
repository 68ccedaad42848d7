"""Which files of a checkpoint matter: pure functions over file names, the same for a folder and for a Hub listing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ..errors import CheckpointError
from .index import INDEX_FILE, SINGLE_FILE

Format = Literal["safetensors", "bin", "gguf"]

BIN_INDEX_FILE = "pytorch_model.bin.index.json"
BIN_FILE = "pytorch_model.bin"

_LAYOUTS: tuple[tuple[Format, str, str, str], ...] = (
    ("safetensors", INDEX_FILE, SINGLE_FILE, ".safetensors"),
    ("bin", BIN_INDEX_FILE, BIN_FILE, ".bin"),
)

# Besides the weights: config, tokenizer, templates. Never code, and no weights of another framework.
_COMPANIONS = re.compile(r"[^/]+\.(json|jinja|txt|model|tiktoken)|additional_chat_templates/[^/]+\.jinja")
_NOT_THE_MODEL = re.compile(r"(adapter|consolidated|optimizer|training_args|scheduler|rng_state|mmproj).*")
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Choice:
    """What to read: ``weights`` by name, or ``index``, the JSON file that names them."""

    format: Format
    index: str | None
    weights: tuple[str, ...]


def choose(names: Iterable[str], where: str, gguf: str | None = None) -> Choice:
    """Choose the weight files among ``names``, relative to the checkpoint: safetensors before bin before GGUF.

    Parameters
    ----------
    where
        The folder or the Hub id, for messages.
    gguf
        The GGUF file that the user named, if any.

    Raises
    ------
    CheckpointError
        If there is nothing that can be loaded; the message says what is there instead.
    """
    top = sorted(name for name in names if "/" not in name)
    if gguf is not None:
        if gguf not in names:
            found = [name for name in names if name.endswith(".gguf")]
            raise CheckpointError(f"{where} holds no {gguf}; GGUF files there: {_listed(found) or 'none'}")
        return Choice("gguf", None, (whole_gguf(gguf),))
    if "config.json" in top:
        for kind, index, single, suffix in _LAYOUTS:
            if index in top:
                return Choice(kind, index, ())
            if single in top:
                return Choice(kind, None, (single,))
            found = [name for name in top if name.endswith(suffix) and not _NOT_THE_MODEL.match(name)]
            if found and (kind == "safetensors" or all(name.startswith("pytorch_model") for name in found)):
                return Choice(kind, None, tuple(found))
    ggufs = [name for name in top if name.endswith(".gguf") and not _NOT_THE_MODEL.match(name)]
    if len(ggufs) == 1:
        return Choice("gguf", None, (whole_gguf(ggufs[0]),))
    if ggufs:
        raise CheckpointError(f"{where} holds {len(ggufs)} GGUF files; name one of them, as {where}/{ggufs[0]}: "
                              f"{_listed(ggufs)}")  # fmt: skip
    raise CheckpointError(f"{where} {_why_not(top)}")


def shard_names(index_file: Path) -> tuple[str, ...]:
    """The shards that an index JSON names, each once, in order.

    Raises
    ------
    CheckpointError
        If the file is damaged or names a file outside its own folder.
    """
    try:
        names = sorted(set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if PurePosixPath(name).name != name or "\\" in name]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{index_file} is damaged ({error!r}); download it again") from None
    if outside or not names:
        raise CheckpointError(f"{index_file} is damaged (it names {outside[:1] or 'no shard'}); download it again")
    return tuple(names)


def companions(names: Iterable[str], choice: Choice) -> tuple[str, ...]:
    """The small files beside the weights: config, tokenizer, templates and the index of the chosen format."""
    unwanted = {INDEX_FILE, BIN_INDEX_FILE} - {choice.index}
    return tuple(sorted(name for name in names if _COMPANIONS.fullmatch(name) and name not in unwanted))


def whole_gguf(name: str) -> str:
    """``name``, unless it is one part of several."""
    if _GGUF_PART.search(name):
        raise CheckpointError(f"{name} is one part of a split GGUF; join the parts first: "
                              "llama-gguf-split --merge FIRST_PART JOINED.gguf")  # fmt: skip
    return name


def _why_not(top: list[str]) -> str:
    """What a checkpoint without loadable weights is, and the way out."""
    config = "config.json" in top
    if "adapter_config.json" in top:
        return ("holds a LoRA adapter (adapter_config.json), not a model; merge it into its base model first "
                "(peft: merge_and_unload, then save_pretrained)")  # fmt: skip
    if "model_index.json" in top:
        return "is a diffusers pipeline, not a causal language model"
    if any(name.endswith(".pth") or name.startswith("consolidated") for name in top):
        return ("holds only the original consolidated weights; use the transformers version of the model "
                "(with config.json and model.safetensors)")  # fmt: skip
    if any(name.endswith((".h5", ".msgpack", ".onnx")) for name in top):
        return "holds weights of TensorFlow, Flax or ONNX only; convert them to safetensors with transformers first"
    if not config:
        return "holds no config.json, so it is no checkpoint; name the folder or the id that has one"
    return "holds a config.json but no weights (model.safetensors, pytorch_model.bin or a .gguf file); add them"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
