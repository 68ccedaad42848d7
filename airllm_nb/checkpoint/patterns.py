"""Regular expressions that come with a model: any of them may need longer than anybody waits, so each has an end."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from ..errors import CheckpointError

# For all matches of one file; what people write takes milliseconds.
SECONDS = 4.0
LONGEST, MOST = 2_000, 10_000
# Without repetition a match takes no longer than its text is.
_PLAIN = re.compile(r"(?:[\w.^$-]|\\[.\w])*")
# Python's own library takes these literally, the one that can be interrupted does not.
_NOT_SHARED = re.compile(r"\{[^}]*[a-z]|\[:")


class Patterns:
    """Patterns of a file, tried in order against the end of a module's name, as PEFT does it (``get_pattern_key``).

    Parameters
    ----------
    given
        Pattern → value.
    where
        The file and the entry, for messages.
    whole
        Tried against the whole name instead.

    Raises
    ------
    CheckpointError
        If they are none.
    """

    def __init__(self, given: Any, where: tuple[Path, str], *, whole: bool = False):
        self._where, self._end, self._before = where, 0.0, "" if whole else r"(.*\.)?"
        if not isinstance(given, Mapping):
            raise self._damaged(f"is {str(given)[:80]!r}, no table")
        if len(given) > MOST:
            raise self._damaged(f"has {len(given):,} patterns")
        self._values = [(self._compiled(pattern), pattern, value) for pattern, value in given.items()]

    def first(self, name: str, otherwise: Any) -> Any:
        """The value of the first pattern that fits the end of ``name``.

        Raises
        ------
        CheckpointError
            If that takes too long.
        """
        self._end = self._end or time.monotonic() + SECONDS
        for pattern, text, value in self._values:
            if self._matches(pattern, text, name):
                return value
        return otherwise

    def _matches(self, pattern: Any, text: str, name: str) -> bool:
        left = self._end - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            if isinstance(pattern, re.Pattern):
                return pattern.match(name) is not None
            return pattern.match(name, timeout=left) is not None
        except TimeoutError:
            raise self._damaged(f"has a pattern that does not end within {SECONDS:g} s ({_short(text)})") from None

    def _compiled(self, text: Any) -> Any:
        whole = rf"{self._before}({text})$"
        if not isinstance(text, str) or len(text) > LONGEST:
            raise self._damaged(f"has a pattern of more than {LONGEST:,} characters ({_short(str(text))})")
        try:
            plain = re.compile(whole)  # what may stand in it is what PEFT's library takes
            if _PLAIN.fullmatch(text):
                return plain
            if _NOT_SHARED.search(text):
                raise ValueError("it cannot be bounded in time")
            return regex.compile(whole)
        except (ValueError, re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise self._damaged(f"has a pattern that is none: {_short(text)} ({error})") from None

    def _damaged(self, what: str) -> CheckpointError:
        file, entry = self._where
        return CheckpointError(f"{file} is damaged: {entry} {what}; download it again")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
