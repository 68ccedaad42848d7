"""The hooks on a module's forward: whose turn it is, what happens before and after, and after an error too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import BusyError, OptionError
from .turn import Turn

NO_COPY = ("a streamed model cannot be copied or pickled: its weights are in its checkpoint; open it again with "
           "AutoModel.from_pretrained, or pass the same object on")  # fmt: skip
NO_TRAINING = ("weights that stream cannot be trained through; load the model with budgets that hold all of it "
               "(model.plan says what streams), without compression, or compute under torch.no_grad()")  # fmt: skip


class Guard:
    """A forward of ``module`` takes the model's turn, if its thread does not have it, and gives it back.

    Parameters
    ----------
    begin
        Called when it took the turn.
    """

    def __init__(self, turn: Turn, module: nn.Module, begin: Callable[[], None]):
        self._turn, self._module, self._begin = turn, module, begin

    def put_on(self) -> list[Any]:
        """Returns the hooks, to be removed."""
        return [
            self._module.register_forward_pre_hook(self.enter),
            self._module.register_forward_hook(self.end, always_call=True),
        ]

    def enter(self, *_: Any) -> None:
        if self._turn.enter(self._module):
            self._begin()

    def end(self, *_: Any) -> None:
        self._turn.leave(self._module)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Whoever copies or pickles a module comes by here."""
        raise OptionError(NO_COPY)


def guard_parts(turn: Turn, model: nn.Module, begin: Callable[[], None]) -> list[Any]:
    """Guards on models within the model: the decoder, called without its head, has one turn, not one a unit."""
    from transformers import PreTrainedModel

    parts = [each for each in model.modules() if isinstance(each, PreTrainedModel) and each is not model]
    return [hook for part in parts for hook in Guard(turn, part, begin).put_on()]


class UnitHooks(Guard):
    """The same, and ``before`` and ``after`` its forward, or ``failed`` in the place of ``after``.

    Parameters
    ----------
    streams
        Whether its weights are gone afterwards: nothing may refer to them for a gradient.
    """

    def __init__(
        self, turn: Turn, module: nn.Module, begin: Callable[[], None], before: Callable[[], None],
        after: Callable[[], None], failed: Callable[[], None], streams: bool,
    ):  # fmt: skip
        super().__init__(turn, module, begin)
        self._before, self._after, self._failed, self._streams = before, after, failed, streams
        self._is_bound, self._is_refused = False, False

    def put_on(self) -> list[Any]:
        leave = self._module.register_forward_hook(self.leave)  # before the turn is given back
        return [leave, *super().put_on()]

    def enter(self, *_: Any) -> None:
        super().enter()
        was, self._is_bound = self._is_bound, True
        try:
            self._before()
        except BusyError:  # what is bound is somebody else's
            self._is_bound, self._is_refused = was, True
            raise

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._is_bound = False
        self._after()
        if self._streams and torch.is_grad_enabled():
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            if any(tensor.requires_grad for tensor in tensors):
                raise OptionError(NO_TRAINING)

    def end(self, *_: Any) -> None:
        if self._is_refused:
            self._is_refused = False
        elif self._is_bound and self._turn.mine:
            self._is_bound = False
            self._failed()
        super().end()
