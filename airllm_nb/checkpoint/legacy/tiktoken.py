"""A ``.tiktoken`` vocabulary (a token in base64 and its rank a line) → byte-level byte-pair encoding."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...disk import read_bytes
from ...errors import CheckpointError
from .tokens import merges


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token → rank.

    Raises
    ------
    CheckpointError
        If the file is damaged, or ranks are missing.
    """
    try:
        lines = [line.split() for line in read_bytes(file).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{file} is no tiktoken vocabulary ({error}); download it again") from None
    lacks_bytes = any(bytes([byte]) not in ranks for byte in range(256))
    if lacks_bytes or sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{file} is truncated or damaged: ranks are missing; download it again")
    return ranks


def backend(ranks: Mapping[bytes, int], words: str, *, extra: Mapping[str, int]) -> Any:
    """The tokenizer of a vocabulary.

    Parameters
    ----------
    words
        The regular expression that cuts a text into words.
    extra
        Further tokens and their numbers.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = _letters()
    ids = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    # Of two neighbours that make a token those merge first that make the one of the lowest rank.
    pairs = list(merges(sorted(ids, key=ids.__getitem__), ids))
    tokens = Tokenizer(models.BPE(vocab={**ids, **extra}, merges=pairs))
    tokens.normalizer = normalizers.NFC()
    tokens.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokens.decoder = decoders.ByteLevel()
    return tokens


def _letters() -> list[str]:
    """The letter that stands for each byte: itself where it prints, else one from 256 on."""
    prints = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in prints]
    return [chr(byte) if byte in prints else chr(256 + hidden.index(byte)) for byte in range(256)]
