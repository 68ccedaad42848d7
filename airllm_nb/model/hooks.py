"""Whose turn it is to run a model, and the hooks on a module's forward: they take the turn, and ask the unit's feed.

One thread at a time has the turn, and within its turn whatever that thread calls runs too.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import BusyError, ClosedError, OptionError
from .absent import NO_COPY, NO_TRAINING
from .feeds import Call, Feed
from .units import ModelUnit

if TYPE_CHECKING:
    from .executor import Executor


class Turn:
    """The right to run one model.

    A *run* (a generation, a forward of the whole model) takes it from beginning to end. A forward of a part of the
    model takes it for itself, where its thread does not have it.

    Parameters
    ----------
    name
        Of the model, for messages.

    Attributes
    ----------
    cancel
        Ends whoever has the turn, before the next unit.
    closed
        Nobody gets the turn any more.
    when_closed
        Called at the end of a turn during which it was closed, with the module whose forward ends, if it was for one.
    look
        Called before a model within the model runs on its own, with that part and its arguments.
    """

    def __init__(self, name: str):
        self._name = name
        self._held, self._taking_over = threading.Lock(), threading.Lock()
        self._thread: int | None = None
        self._module: nn.Module | None = None
        self._frame: FrameType | None = None
        self.cancel, self.closed = threading.Event(), False
        self.when_closed: Callable[[nn.Module | None], None] = lambda module: None
        self.look: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None] = lambda part, args, kwargs: None

    @property
    def busy(self) -> bool:
        """Whether somebody has the turn, and goes on."""
        return self._held.locked() and not self._is_left_over()

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return self._thread == threading.get_ident()

    @property
    def is_within(self) -> bool:
        """Whether it is called by what has the turn."""
        return self.mine and not self._is_left_over()

    @property
    def runs(self) -> bool:
        """Whether this thread has it for a run."""
        return self.mine and self._module is None

    @contextlib.contextmanager
    def run(self, cancel: threading.Event) -> Iterator[None]:
        """Have the turn; ``cancel`` is what ends it from outside.

        Raises
        ------
        BusyError
            If another thread has it, or a forward of this one that is under way.
        ClosedError
            If the model was closed.
        """
        self._take(None, cancel)
        try:
            yield
        finally:
            self._end()

    def enter(self, module: nn.Module) -> bool:
        """A forward of ``module`` begins; whether it took the turn for itself. Raises as :meth:`run` does."""
        if self.is_within:
            return False
        self._take(module, threading.Event())
        return True

    def leave(self, module: nn.Module) -> None:
        """The forward of ``module`` is over, by an error perhaps."""
        if self.mine and self._module is module:
            self._end()

    @contextlib.contextmanager
    def last(self) -> Iterator[None]:
        """Wait until nobody has the turn, and keep everybody from it."""
        self._end_left_over()
        with self._held:
            yield

    def _take(self, module: nn.Module | None, cancel: threading.Event) -> None:
        if not self._held.acquire(blocking=False) and not (
            self._end_left_over() and self._held.acquire(blocking=False)
        ):
            if self.closed:
                raise self._closed_error()
            if self.mine:
                raise BusyError(f"{self._name} is called from within its own forward; call it before or after")
            raise BusyError(f"{self._name} is generating already; wait for it, or stop it first")
        # Before it looks whether it was closed: whoever closes meanwhile stops this one or is seen by it.
        self._frame = module and _frame_of(module)
        self._thread, self._module, self.cancel = threading.get_ident(), module, cancel
        if self.closed:
            self._give()
            raise self._closed_error()

    def _give(self) -> None:
        self._module, self._thread, self._frame = None, None, None
        self._held.release()

    def _end(self) -> None:
        module = self._module
        self._give()
        if self.closed:
            self.when_closed(module)

    def _end_left_over(self) -> bool:
        """End the turn of a module's forward that Ctrl-C ended: no hook runs then."""
        with self._taking_over:
            if is_left := self._is_left_over():
                self._give()
            return is_left

    def _is_left_over(self) -> bool:
        if self._module is None or (thread := self._thread) is None:
            return False
        frame = sys._getframe() if self.mine else sys._current_frames().get(thread)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is None

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self._name} was closed; load it again")


def _frame_of(module: nn.Module) -> FrameType | None:
    """The call of ``module`` that is under way: not an earlier one, which Ctrl-C ended."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            return frame
        frame = frame.f_back
    return None


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
