"""Language models that do not fit, in a notebook: weights stream from disk through a fixed VRAM budget.

Public names load on first use, so that ``import airllm_nb`` needs neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.hub.sample import sample_model
    from .config import LoadOptions
    from .engine.auto_model import AutoModel
    from .engine.facade import StreamedModel, convert_model, open_model, plan_model

__version__ = "0.1.0"

__all__ = [
    "AutoModel",
    "LoadOptions",
    "StreamedModel",
    "__version__",
    "convert_model",
    "open_model",
    "plan_model",
    "sample_model",
]

_HOMES = {
    "AutoModel": "engine.auto_model",
    "LoadOptions": "config",
    "StreamedModel": "engine.facade",
    "convert_model": "engine.facade",
    "open_model": "engine.facade",
    "plan_model": "engine.facade",
    "sample_model": "checkpoint.hub.sample",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext airllm_nb``: register the magics."""
    from .notebook.extension import load

    load(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext airllm_nb``: remove the magics, stop workers, close models."""
    from .notebook.extension import unload

    unload(ipython)
