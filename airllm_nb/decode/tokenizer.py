"""The tokenizer of a folder: transformers' own, or one converted from the files of a family whose code is not run."""

from __future__ import annotations

import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.legacy.families import family_of
from ..checkpoint.legacy.llama import llama_tokenizer
from ..disk import entries, read_json, refusal, told
from ..errors import AirLLMError, CheckpointError, UnsupportedModelError

log = logging.getLogger(__name__)

# A tokenizer's vocabulary; what is said of it alone is none.
_FILES = re.compile(r"^tokenizer\.|^vocab|^merges|\.model$|tiktoken|^tekken|^spiece|sentencepiece")


@told()
def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the checkpoint in ``folder``; nothing is downloaded and no code of it is run.

    Raises
    ------
    CheckpointError
        If the files that it is made of are missing or damaged.
    UnsupportedModelError
        If it is code of its own.
    """
    from transformers import AutoTokenizer

    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    _refuse_growth(folder / "tokenizer.json")
    try:
        if family := family_of(config):
            return family.tokenizer(folder, config)
        converted = llama_tokenizer(folder)
        if converted is not None:
            return converted
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except AirLLMError:
        raise
    except Exception as error:  # whatever a file makes a tokenizer of any family run into
        if (refused := refusal(error, folder)) is not None:
            raise refused from None
        found = _without_damaged(folder)
        if found is not None:
            return found
        ids = "or give token ids to model.generate"
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(f"{folder.name}: its tokenizer is code of its own, which is never run here; "
                                        f"save a tokenizer.json of it into the folder, {ids}") from None  # fmt: skip
        if not any(_FILES.search(path.name) for path in entries(folder)):
            raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model or the like); copy "
                                  f"its files from the original model, {ids}") from None  # fmt: skip
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: "
                              f"{str(error).strip().partition(chr(10))[0][:160]}); download its files again, "
                              f"{ids}") from error  # fmt: skip


# How many times as long as it was a text may become by replacing, and how many tokens a template may add.
_GROWTH, _ADDED = 1_000, 10_000


def _refuse_growth(file: Path) -> None:
    """Refuse a tokenizer that makes gigabytes of a word; no other code has a say once it runs."""
    try:
        said = read_json(file)
    except AirLLMError:  # the library says what is wrong with it
        return
    if not isinstance(said, Mapping):
        return
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        grown = math.prod(_growth(said.get(part)))
        if grown > _GROWTH:
            raise CheckpointError(f"{file} is damaged, or meant to do harm: its {part} makes a text {grown:.3g} times "
                                  "as long; download it again, from somebody you trust")  # fmt: skip
    added = str(said.get("post_processor")).count(",")
    if added > _ADDED:
        raise CheckpointError(f"{file} is damaged, or meant to do harm: its post_processor adds {added:,} tokens to "
                              "each text; download it again, from somebody you trust")  # fmt: skip


def _growth(step: Any) -> Iterator[float]:
    """By how much each step, and each within it, can lengthen a text."""
    if not isinstance(step, Mapping):
        return
    pattern = step.get("pattern")
    found = len(pattern["String"]) if isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str) else 1
    yield max(1.0, len(str(step.get("content", ""))) / max(found, 1), float(len(str(step.get("prepend", "")))))
    for inner in step.values():
        for each in inner if isinstance(inner, list) else ():
            yield from _growth(each)


# What a tokenizer.json can do without: names and templates, which are then missing.
_OPTIONAL = ("chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")


def _without_damaged(folder: Path) -> Any | None:
    """The tokenizer without the file beside ``tokenizer.json`` that is damaged; ``None`` if none of them is."""
    from transformers import AutoTokenizer

    there = [
        path for path in entries(folder) if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt")
    ]
    optional = [path.name for path in there if path.name in _OPTIONAL]
    if not any(path.name == "tokenizer.json" for path in there):
        return None
    for left in [*([name] for name in optional), optional]:
        with tempfile.TemporaryDirectory(prefix="airllm-nb-tokenizer-") as made:
            for path in there:
                if path.name not in left and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, Path(made, path.name))
            try:
                tokenizer = AutoTokenizer.from_pretrained(made, trust_remote_code=False, local_files_only=True)
            except Exception as error:  # so it is another file
                if (refused := refusal(error, folder)) is not None:
                    raise refused from None
                log.debug("not without %s either: %s", left, error)
                continue
        log.warning("%s: %s cannot be read; going on without it, and without the special tokens or the chat template "
                    "that it names", folder, ", ".join(left))  # fmt: skip
        tokenizer.name_or_path = str(folder)
        return tokenizer
    return None
