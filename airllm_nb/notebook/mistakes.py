"""A user's mistake takes one line in the cell, not a traceback, and keeps no memory alive."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any, TypeVar

from IPython.core.error import UsageError

from ..disk import told
from ..errors import AirLLMError, in_flags

T = TypeVar("T")


def one_line(function: Callable[..., T]) -> Callable[..., T]:
    """Show errors that a user can act on as one line: IPython prints a ``UsageError`` without a traceback.

    The line is raised outside of the handler, as an error of its own: IPython keeps the last exception, whose chain of
    frames would otherwise keep a model's tensors alive.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        full = False
        try:
            with told():
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


def _out_of_memory(error: BaseException) -> bool:
    # By name, so that a mistake in a flag does not import torch.
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
