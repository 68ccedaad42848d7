"""A user's mistake takes one line in the cell, not a traceback, and keeps no memory alive."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable
from typing import Any, TypeVar

from IPython.core.error import UsageError

from ..errors import AirLLMError

T = TypeVar("T")

# Messages name the options of Python; in a cell they have other names.
_FLAGS = {
    "vram_budget": "--vram",
    "ram_budget": "--ram",
    "max_seq_len": "--max-seq-len",
    "hf_token=...": "--token-env NAME",
    "layer_shards_saving_path": "--shards",
    "local_files_only=True": "--offline",
    "delete_original=True": "--delete-original",
}
_PYTHON_NAMES = re.compile("|".join(rf"\b{re.escape(name)}" for name in _FLAGS))


def one_line(function: Callable[..., T]) -> Callable[..., T]:
    """Show errors that a user can act on as one line: IPython prints a ``UsageError`` without a traceback.

    The line is raised outside of the handler, as an error of its own: IPython keeps the last exception, whose chain of
    frames would otherwise keep a model's tensors alive.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        full = False
        try:
            return function(*args, **kwargs)
        except AirLLMError as error:
            message = in_flags(str(error))
        except Exception as error:
            if not _out_of_memory(error):
                raise
            message = (f"the GPU ran out of memory ({str(error).splitlines()[0]}); load again with a smaller --vram or "
                       "--max-seq-len, or shorten the prompt")  # fmt: skip
            full = True
        if full:
            # Only now, with the handler left, are the failed frames and their tensors garbage.
            gc.collect()
        raise UsageError(" ".join(message.splitlines()))

    return call


def in_flags(message: str) -> str:
    """A message with the magics' names of the options in it."""
    return _PYTHON_NAMES.sub(lambda match: _FLAGS[match[0]], message)


def _out_of_memory(error: BaseException) -> bool:
    # By name, so that a mistake in a flag does not import torch.
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
