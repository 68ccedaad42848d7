"""The models that this session has loaded, by name. Owns them: what leaves the registry is closed."""

from __future__ import annotations

import contextlib
import difflib
import gc
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import format_bytes
from ..errors import OptionError
from ..trace import Trace

if TYPE_CHECKING:
    from ..engine.facade import StreamedModel

DEFAULT_NAME = "model"
NOTHING = "no model is loaded; load one with %airllm_load MODEL"


@dataclass
class Entry:
    """A loaded model.

    Attributes
    ----------
    unfinished
        A generation that a second interrupt left to end by itself.
    """

    name: str
    model: StreamedModel
    dashboard: str = "full"
    unfinished: Any = None

    def settle(self) -> None:
        """Wait for a generation that was left behind: it ends within one unit."""
        if self.unfinished is not None:
            with contextlib.suppress(Exception):
                self.unfinished.close()
            self.unfinished = None


class Run(NamedTuple):
    """A generation that is over, and what it ran on."""

    model: str
    title: str
    trace: Trace

    @classmethod
    def of(cls, entry: Entry, result: Any) -> Run:
        options = entry.model.options
        parts = [entry.model.name, options.compression or "not compressed"]
        parts += ["no prefetching"] if options.prefetching is False else []
        budgets = (("VRAM", options.vram_budget), ("RAM", options.ram_budget))
        parts += [f"{name} {format_bytes(size)}" for name, size in budgets if size]
        return cls(entry.name, " · ".join(parts), result.trace)


class Registry:
    """Named models; the last one loaded is the default.

    Attributes
    ----------
    runs
        The last generations, newest last; they outlive their models.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        # Few: a trace is some megabytes.
        self.runs: deque[Run] = deque(maxlen=4)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Any:
        return iter(list(self._entries.values()))

    @property
    def names(self) -> list[str]:
        """In the order of loading."""
        return list(self._entries)

    def add(self, entry: Entry) -> None:
        """Keep a model, the default from now on."""
        self.remove(entry.name)
        self._entries[entry.name] = entry

    def get(self, name: str | None = None) -> Entry:
        """One model: by name, or the last one loaded.

        Raises
        ------
        OptionError
            If there is none, or none of that name.
        """
        if not self._entries:
            raise OptionError(NOTHING)
        if name is None:
            return next(reversed(self._entries.values()))
        if name not in self._entries:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"loaded: {', '.join(self.names)}"
            raise OptionError(f"no model is loaded as {name!r}; {hint}")
        return self._entries[name]

    def remove(self, name: str) -> bool:
        """Close a model and free its memory; whether there was one."""
        if name not in self._entries:
            return False
        self._entries[name].model.close()
        del self._entries[name]
        # Modules and hooks refer to each other: without this the memory waits for the next collection.
        gc.collect()
        return True

    def close(self) -> None:
        """Close all models."""
        for name in self.names:
            self.remove(name)
