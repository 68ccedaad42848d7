"""What ``%load_ext airllm_nb`` and ``%unload_ext airllm_nb`` do."""

from __future__ import annotations

import functools
import sys
from typing import Any

from . import options
from .completion import FlagCompletion
from .magics import AirLLM


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
