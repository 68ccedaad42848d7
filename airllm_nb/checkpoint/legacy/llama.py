"""Llama's tokenizer from ``tokenizer.model`` alone, as checkpoints of 2023 have it.

transformers 5 reads such a folder without the blank that begins every text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...disk import read_json
from ...errors import CheckpointError, UnsupportedModelError
from .sentencepiece import backend, read_model
from .tokens import add_special, added_tokens, prefix, wrap


def llama_tokenizer(folder: Path) -> Any | None:
    """The tokenizer; ``None`` where there is a newer file, or it is of another class or kind."""
    file, settings = folder / "tokenizer.model", folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() or not file.is_file() or not settings.is_file():
        return None
    own = read_json(settings, optional=True) or {}
    if own.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return None
    try:
        model = read_model(file)
    except (CheckpointError, UnsupportedModelError):  # Llama 3 has a tiktoken vocabulary under this name
        return None
    named: dict[str, Any] = {role: _text(own.get(role)) or default for role, default in _ROLES.items()}
    extra = {name: number for name, number in added_tokens(folder).items() if number >= len(model.pieces)}
    tokens = backend(model, extra)
    add_special(tokens, [name for name in (*named.values(), *added_tokens(folder)) if name not in extra])
    begin = named["bos_token"]
    prefix(tokens, {begin: tokens.token_to_id(begin)} if own.get("add_bos_token", True) else {})
    if pad := _text(own.get("pad_token")):
        named["pad_token"] = pad
    return wrap(tokens, folder, **named)


_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _text(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token
