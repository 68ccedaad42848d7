"""Tokens → text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Detokenizer:
    """Tokens → text as far as it is final: bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._shown, self._from = tokenizer, 0, 0
        self._ids: list[int] = []

    def add(self, ids: list[int]) -> str:
        """New text after ``ids``."""
        self._ids.extend(ids)
        # Decoding from a few tokens back keeps the blanks that depend on the neighbour.
        before = self._decode(self._ids[self._from : self._shown])
        after = self._decode(self._ids[self._from :])
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def rest(self) -> str:
        """What was held back, as it is."""
        before = self._decode(self._ids[self._from : self._shown])
        return self._decode(self._ids[self._from :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StopText:
    """Holds back text that may be the beginning of a stop string, and drops the stop string itself."""

    def __init__(self, text: Detokenizer, stops: Sequence[str]):
        self._detokenizer, self._stops, self._held = text, tuple(stops), ""

    def add(self, ids: list[int]) -> str:
        self._held += self._detokenizer.add(ids)
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        cut = min(found) if found else len(self._held) - self._overlap()
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def _overlap(self) -> int:
        """The longest end of the held text that a stop string begins with."""
        lengths = [size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])]
        return max(lengths, default=0)

    def rest(self) -> str:
        held = self._held + self._detokenizer.rest()
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        return held[: min(found)] if found else held
