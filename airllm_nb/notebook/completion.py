"""Tab completion of the magics' flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

HOOK = "complete_command"


class FlagCompletion:
    """IPython's ``complete_command`` hook, and its removal, which IPython has no call for."""

    def __init__(self, shell: Any):
        self._shell = shell

    def add(self, flags: Mapping[str, Callable[[], list[str]]]) -> None:
        """``flags`` is from a magic as typed (``"%airllm_load"``) to the list of its flags."""
        for name, known in flags.items():
            self._shell.set_hook(HOOK, _completer(known), str_key=name)

    def remove(self, names: Iterable[str]) -> None:
        """Forget these magics."""
        hooks = self._shell.strdispatchers.get(HOOK)
        for name in names:
            getattr(hooks, "strs", {}).pop(name, None)


def _completer(known: Callable[[], list[str]]) -> Callable[[Any, Any], list[str]]:
    # IPython makes a method of it: the shell comes first.
    def complete(_: Any, event: Any) -> list[str]:
        # Paths and values are the other completers' business.
        return [flag for flag in known() if flag.startswith(event.symbol)] if event.symbol.startswith("-") else []

    return complete
