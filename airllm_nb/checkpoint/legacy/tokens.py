"""The parts that tokenizers are built of, on the ``tokenizers`` library alone: merges, special tokens, a wrapper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...disk import read_json, read_text


def merges(pieces: Iterable[str], ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The merges of a byte-pair encoding that is known by its pieces alone.

    Parameters
    ----------
    pieces
        Those that merges make, the first to be made first.
    ids
        The pieces that may be parts, and their numbers.
    """
    for piece in pieces:
        pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        yield from sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def add_special(tokens: Any, names: Iterable[str]) -> None:
    """Have these, whose numbers the vocabulary holds, parsed as special tokens."""
    from tokenizers import AddedToken

    tokens.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])


def prefix(tokens: Any, ids: Mapping[str, int]) -> None:
    """Begin every text with these tokens, unless special tokens are not wanted."""
    from tokenizers import processors

    before = "".join(f"{name} " for name in ids)
    tokens.post_processor = processors.TemplateProcessing(
        single=f"{before}$A", pair=f"{before}$A $B", special_tokens=list(ids.items())
    )


def added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that ``tokenizer_config.json`` lays over the vocabulary, and their numbers."""
    entries = _settings(folder).get("added_tokens_decoder") or {}
    return {entry["content"]: int(number) for number, entry in entries.items()}


def wrap(
    tokens: Any, folder: Path, *, kind: type | None = None, chat_template: str | None = None,
    chat_stops: Sequence[str] = (), **settings: Any,
) -> Any:  # fmt: skip
    """A transformers tokenizer of ``tokens``; batches are padded on the left.

    Parameters
    ----------
    kind
        The class; ``None`` is the plain one.
    chat_template
        Of the family; one in the folder goes before.
    chat_stops
        Tokens that end an answer in a chat. Their numbers are the tokenizer's ``chat_stop_ids``.
    """
    from transformers import PreTrainedTokenizerFast

    own, file = _settings(folder), folder / "chat_template.jinja"
    template = read_text(file) if file.is_file() else own.get("chat_template") or chat_template
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}
    if length := own.get("model_max_length"):
        settings["model_max_length"] = length
    tokenizer = (kind or PreTrainedTokenizerFast)(
        tokenizer_object=tokens, padding_side="left", clean_up_tokenization_spaces=False, chat_template=template,
        **settings,
    )  # fmt: skip
    numbers = [tokens.token_to_id(name) for name in chat_stops]
    tokenizer.chat_stop_ids = [number for number in numbers if number is not None]
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "tokenizer_config.json", optional=True) or {}
