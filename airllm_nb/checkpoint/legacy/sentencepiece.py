"""A sentencepiece ``tokenizer.model`` of byte-pair encoding → a tokenizer, without the sentencepiece library.

The file is a protocol buffer (https://github.com/google/sentencepiece, sentencepiece_model.proto); the few fields that
matter are read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...disk import read_bytes
from ...errors import CheckpointError, UnsupportedModelError
from .tokens import merges

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_PAIRS = 2  # of the kinds of model: byte-pair encoding
BLANK = "▁"


@dataclass(frozen=True)
class Piece:
    """One token; its number is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class PieceModel:
    """What a model file says.

    Attributes
    ----------
    dummy_prefix
        Whether a text gets a blank in front.
    collapse
        Whether blanks are cut off at the ends and joined in between.
    charsmap
        How characters are normalised; empty for not at all.
    """

    pieces: tuple[Piece, ...]
    dummy_prefix: bool
    collapse: bool
    charsmap: bytes


def read_model(file: Path) -> PieceModel:
    """Read ``tokenizer.model``.

    Raises
    ------
    CheckpointError
        If it is missing or damaged.
    UnsupportedModelError
        If it is not of byte-pair encoding.
    """
    if not file.is_file():
        raise CheckpointError(f"{file.parent} holds no {file.name}, which its tokenizer is made of; download it again")
    try:
        fields = list(_fields(read_bytes(file)))
        pieces = tuple(_piece(value) for number, value in fields if number == 1)
        trainer = dict(_fields(_last(fields, 2)))
        rules = dict(_fields(_last(fields, 3)))
    except (ValueError, IndexError, struct.error, TypeError, AttributeError):
        raise CheckpointError(f"{file} is truncated or no sentencepiece model; download it again") from None
    if not pieces:
        raise CheckpointError(f"{file} holds no pieces; download it again")
    if trainer.get(3, 1) != _PAIRS:
        raise UnsupportedModelError(f"{file} is a sentencepiece model, but not of byte-pair encoding, and others are "
                                    "not converted here; add a tokenizer.json")  # fmt: skip
    return PieceModel(pieces, bool(rules.get(3, 1)), bool(rules.get(4, 1)), rules.get(2, b""))


def backend(model: PieceModel, extra: Mapping[str, int] | None = None) -> Any:
    """The tokenizer of a model.

    Pieces that the user defined are found in a text first. Control pieces are text unless they are added as special.

    Parameters
    ----------
    extra
        Further special tokens and their numbers. Where a number is a piece's, the piece is renamed, and its old
        spelling is read as the new one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    pieces, extra = model.pieces, dict(extra or {})
    renamed = {pieces[number].text: name for name, number in extra.items() if number < len(pieces)}
    ids = {renamed.get(piece.text, piece.text): number for number, piece in enumerate(pieces)}
    normal = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == NORMAL}
    made = sorted(normal, key=lambda text: -pieces[normal[text]].score)
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    tokens = Tokenizer(
        models.BPE(vocab={**ids, **extra}, merges=list(merges(made, normal)), unk_token=unknown, fuse_unk=True,
                   byte_fallback=any(piece.kind == BYTE for piece in pieces))
    )  # fmt: skip
    tokens.normalizer = _normalizer(model, renamed)
    strip = [decoders.Strip(content=" ", left=1)] if model.dummy_prefix else []
    tokens.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )  # fmt: skip
    # What blanks or a new spelling are in is found after the text is normalised.
    defined = [piece.text for piece in pieces if piece.kind == USER_DEFINED and piece.text not in renamed]
    tokens.add_tokens([AddedToken(text, normalized=BLANK in text, special=False) for text in defined])
    tokens.add_special_tokens([AddedToken(name, normalized=name in renamed.values(), special=True) for name in extra])
    return tokens


def _normalizer(model: PieceModel, renamed: Mapping[str, str]) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.collapse:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Replace(old, new) for old, new in renamed.items() if old != new]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL))


def _last(fields: list[tuple[int, Any]], number: int) -> bytes:
    return next((value for found, value in reversed(fields) if found == number), b"")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer message: an int, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire] if wire in (1, 5) else -1
        if size < 0 or at + size > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
