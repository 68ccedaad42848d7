"""The hooks on a module's forward: whose turn it is, and what its feed does before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import BusyError, OptionError
from .absent import NO_COPY, NO_TRAINING
from .feeds import Call, Feed
from .turn import Turn
from .units import ModelUnit

if TYPE_CHECKING:
    from .executor import Executor


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
            self._module.register_forward_pre_hook(self.enter, with_kwargs=True),
            self._module.register_forward_hook(self.end, always_call=True),
        ]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Call | None:
        if self._turn.enter(self._module):
            self._begin()
        return None

    def end(self, *_: Any) -> None:
        self._turn.leave(self._module)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Whoever copies or pickles a module comes by here."""
        raise OptionError(NO_COPY)


class PartGuard(Guard):
    """Guards a model within the model: the decoder, called without its head, has one turn, not one a unit."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().enter(module, args, kwargs)
        if not self._turn.runs:
            self._turn.look(module, args, kwargs)


class UnitHooks(Guard):
    """The same for a unit, which ``feed`` has weights for during its forward; ``executor`` is told how far compute is.

    ``index`` is that of the unit in the order of use.
    """

    def __init__(self, executor: Executor, index: int, unit: ModelUnit, feed: Feed):
        super().__init__(executor.turn, unit.module, executor.begin_part)
        self._executor, self._index, self._unit, self._feed = executor, index, unit, feed
        self._is_bound, self._is_refused = False, False

    def put_on(self) -> list[Any]:
        leave = self._module.register_forward_hook(self.leave)  # before the turn is given back
        return [leave, *super().put_on()]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Call | None:
        super().enter(module, args, kwargs)
        was, self._is_bound = self._is_bound, True
        try:
            if self._feed.is_followed:
                self._executor.reach(self._index, self._unit.name)
            call = self._feed.enter(self._unit, args, kwargs)
        except BusyError:  # what is bound is somebody else's
            self._is_bound, self._is_refused = was, True
            raise
        if self._feed.is_followed:
            self._executor.recorder.begin_compute()
        return call

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._is_bound = False
        if not self._feed.is_followed:
            self._feed.leave(self._unit, None)
            return
        recorder = self._executor.recorder
        self._feed.leave(self._unit, recorder.end_compute(self._unit.name))
        self._executor.sources.check_pages()
        recorder.look()
        if not self._feed.stays and torch.is_grad_enabled():  # nothing may refer to its weights for a gradient
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            if any(tensor.requires_grad for tensor in tensors):
                raise OptionError(NO_TRAINING)

    def end(self, *_: Any) -> None:
        if self._is_refused:
            self._is_refused = False
        elif self._is_bound and self._turn.mine:
            self._is_bound = False
            self._feed.drop(self._unit)
        super().end()
