"""What ``%load_ext airllm_nb`` and ``%unload_ext airllm_nb`` do: the magics, and Tab for their flags."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import options
from .magics import AirLLM

HOOK = "complete_command"


def load(shell: Any) -> None:
    """Register the magics in this IPython; a second time is harmless and says so."""
    if AirLLM.__name__ in shell.magics_manager.registry:
        sys.stdout.write("airllm_nb is loaded already; %reload_ext airllm_nb loads it anew\n")
        return
    magics = AirLLM(shell)
    shell.register_magics(magics)
    FlagCompletion(shell).add({name: functools.partial(options.flags, magic) for name, magic in _named(magics).items()})


def unload(shell: Any) -> None:
    """Close the models and take everything out that :func:`load` put in."""
    magics = shell.magics_manager.registry.pop(AirLLM.__name__, None)
    if magics is None:
        return
    magics.models.close()
    FlagCompletion(shell).remove(_named(magics))
    for kind, names in magics.magics.items():
        for name, function in names.items():
            if shell.magics_manager.magics[kind].get(name) == function:
                del shell.magics_manager.magics[kind][name]
    if magics in shell.configurables:
        shell.configurables.remove(magics)


def _named(magics: AirLLM) -> dict[str, Any]:
    """``{"%airllm_load": method, "%%airllm_generate": method, …}``"""
    marks = {"line": "%", "cell": "%%"}
    return {marks[kind] + name: function for kind, names in magics.magics.items() for name, function in names.items()}


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
