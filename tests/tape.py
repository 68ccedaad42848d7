"""Records a step on a CPU as a CUDA graph does on a GPU: the operations, on the addresses that they had.

A replay runs no Python of the model. Numbers that it has read are as they were, and so are branches that it took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from airllm_nb.decode.recording import Recorded


class Tape(TorchDispatchMode):
    """Keeps every operation that runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self._calls:
                after = func(*args, **kwargs)
                for new, old in zip(_tensors(after), _tensors(before), strict=True):
                    if new.data_ptr() != old.data_ptr():  # neither a view nor written in place
                        old.copy_(new)


def _tensors(output: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(output) if isinstance(each, torch.Tensor)]


def on_tape(run: Callable[[], Any]) -> Recorded:
    """What :func:`airllm_nb.decode.recording.recorder` gives for a GPU, for a CPU."""
    tape = Tape()
    with tape:
        output = run()
    return Recorded(output, tape.replay, 0)
