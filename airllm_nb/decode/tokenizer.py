"""The tokenizer of a folder: transformers' own, or one converted from the files of a family whose code is not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoint.legacy.families import family_of
from ..checkpoint.legacy.llama import llama_tokenizer
from ..errors import UnsupportedModelError


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
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if family := family_of(config):
        return family.tokenizer(folder, config)
    converted = llama_tokenizer(folder)
    if converted is not None:
        return converted
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{folder.name}: its tokenizer is code of its own, which is never run here; save a tokenizer.json of it "
            "into the folder, or give token ids to model.generate"
        ) from None
