"""What can go wrong, in words a user can act on: every message names the thing, its value and the remedy."""

from __future__ import annotations

import re

__all__ = [
    "AirLLMError",
    "BudgetError",
    "BusyError",
    "CheckpointError",
    "ClosedError",
    "FileError",
    "GenerationStopped",
    "MissingFileError",
    "OptionError",
    "PromptError",
    "SourceError",
    "StoreError",
    "UnsupportedModelError",
    "out_of_memory",
]


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class AirLLMError(Exception):
    """Base of every error that this package raises on purpose; its text is one line with the remedy in it.

    Names that a file gives are a part of it: line breaks and control characters in them are escaped.

    Attributes
    ----------
    note
        What whoever passes it on has to add, in parentheses behind the text.
    """

    note = ""

    def __str__(self) -> str:
        text = _CONTROL.sub(lambda found: repr(found[0])[1:-1], super().__str__())
        return f"{text} ({self.note})" if self.note else text


class OptionError(AirLLMError, ValueError):
    """An option is unknown or its value cannot be used."""


class SourceError(AirLLMError, FileNotFoundError):
    """The model cannot be found, reached or downloaded."""


class CheckpointError(AirLLMError, ValueError):
    """A checkpoint file is missing, truncated or says something that cannot be true."""


class FileError(CheckpointError, OSError):
    """The system refuses to open, read or list a file; ``errno`` says why."""


class MissingFileError(FileError, FileNotFoundError):
    """A file is not there."""


class UnsupportedModelError(AirLLMError, ValueError):
    """The architecture or the format is not one that runs here."""


class StoreError(AirLLMError, OSError):
    """A converted store cannot be written, read or trusted."""


class BudgetError(AirLLMError, MemoryError):
    """A memory budget is too small; the message says the smallest one that works.

    Attributes
    ----------
    option
        ``"vram_budget"`` or ``"ram_budget"``; ``None`` where no budget is to blame.
    """

    def __init__(self, message: str, option: str | None = None):
        super().__init__(message)
        self.option = option


class PromptError(AirLLMError, ValueError):
    """The prompt is empty or longer than the model's context."""


class BusyError(AirLLMError, RuntimeError):
    """The model is already generating."""


class ClosedError(AirLLMError, RuntimeError):
    """The model was closed."""


class GenerationStopped(AirLLMError):
    """Raised inside a forward when the caller asked to stop; never reaches the user."""


def out_of_memory(error: BaseException) -> str | None:
    """What torch says of a GPU that is full; ``None`` of other errors. By name, so that nobody imports torch for it."""
    full = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return (str(error).splitlines() or [""])[0] if full else None
