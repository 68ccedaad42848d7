"""How a model runs as its native class: ``forward`` and ``generate`` with room made and a sweep recorded, in one thread
at a time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..decode.ids import check_call
from ..decode.loop import Request, make_tokens
from ..decode.prefill import by_name, of_forward
from ..decode.prompt import check_length
from ..errors import OptionError
from ..intake import planning
from ..model.absent import NO_TRAINING
from ..model.device import Budgets, budgets_of
from ..model.hooks import Guard, Turn
from ..model.native import FixedWeights, fix_parts
from .residence import Residence

log = logging.getLogger("airllm_nb.engine.facade")


class Running(FixedWeights):
    """Before a native class in the bases of what runs; made from a skeleton of that class, which it becomes."""

    if TYPE_CHECKING:  # the native class has them
        config: Any
        device: torch.device
        dtype: torch.dtype
        training: bool
        generation_config: Any
        _native: Any

    def __new__(cls, prepared: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(prepared, planning.Prepared):  # transformers' own way, from a config: a native model
            return cls._native(prepared, *args, **kwargs)
        model = prepared.skeleton
        if not isinstance(model, Running):
            model.__class__ = _running(cls, type(model))  # type: ignore[arg-type]
        return model

    def __init__(self, prepared: planning.Prepared, machine: Any, budgets: Budgets | None = None):
        self._prepared, self.options, self.name = prepared, prepared.options, prepared.source.name
        # Where clients look for the tokenizer.
        self.name_or_path = self.config._name_or_path = prepared.source.repo_id or str(prepared.folder)
        self._turn = Turn(self.name)
        self._turn.when_closed, self._turn.look = self._free, self._look
        self._refusals: list[Any] = []
        weights = [binding.weight for unit in prepared.units for binding in unit.bindings] + prepared.small
        self._weight_names = {(id(module), name): each.name for each in weights for module, name in each.owners}
        self._residence = Residence(prepared, machine, budgets or budgets_of(prepared.options), self._turn)
        self.generation_config = planning.generation_config(prepared)
        fix_parts(self)

    @property
    def native(self) -> Any:
        """The transformers model: this one."""
        return self

    # --- the class that runs has ``forward`` and ``generate`` with the native signatures

    def _generate(self, native: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """All of transformers' ``generate``; input tensors may be on any device.

        A prompt whose activations do not fit goes through the model in parts (``prefill_chunk_size``), as few as fit.

        Raises
        ------
        PromptError
            If the prompt is empty or longer than the context.
        BudgetError
            If there is no room for it, or other programs took the memory.
        BusyError
            If another thread runs the model.
        """
        return self.run(_by_name(native, self, args, kwargs), threading.Event())

    def run(self, kwargs: dict[str, Any], cancel: threading.Event) -> Any:
        """:meth:`generate` with an event that ends it within one unit, by a ``GenerationStopped``."""
        kwargs = {name: self._on_device(value) for name, value in kwargs.items()}
        ids = kwargs.get("inputs")
        check_length(kwargs.get("input_ids") if ids is None else ids, self._prepared.context)
        request, generate = Request(self, kwargs), functools.partial(self._native.generate, self)
        if self._turn.runs:  # called by what a generation calls: its forwards are admitted one by one
            return generate(**request.arguments(request.work.prompt))
        with torch.no_grad(), self._claimed(cancel):
            return make_tokens(generate, request, self._residence, cancel)

    def _forward(self, native: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One forward; returns what the native class returns (``.logits``).

        With gradients only where all weights are resident; else under ``torch.no_grad``.

        Raises
        ------
        BudgetError
            If there is no room for it; all positions get logits, unless ``logits_to_keep`` says otherwise.
        """
        runs = self._turn.runs
        if runs and (steps := self._residence.steps) is not None:
            as_ever = functools.partial(self._forward_within, native, args, kwargs)
            return steps.run(functools.partial(native, self), args, kwargs, as_ever, self._replaying)
        if runs:
            return self._forward_within(native, args, kwargs)
        with self._gradients((*args, *kwargs.values())):
            # Where the caller has them: to look at what is on a GPU is to wait for it.
            work, past = of_forward(self, args, kwargs), kwargs.get("past_key_values")
            args, kwargs = self._all_on_device(args, kwargs)
            fresh = past is None and len(args) <= 1  # a cache may come by position too
            cancel = threading.Event()
            with self._claimed(cancel):
                for attempt in self._residence.attempts(work, fresh):
                    with attempt, self._residence.session(work, cancel) as (executor, _), executor.sweep():
                        return native(self, *args, **kwargs)
            raise AssertionError("an attempt returns or raises")

    def _forward_within(self, native: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward that a generation calls."""
        with self._gradients((*args, *kwargs.values())):
            work, past = of_forward(self, args, kwargs, within=True), kwargs.get("past_key_values")
            args, kwargs = self._all_on_device(args, kwargs)
            self._residence.admit(work, has_cache=past is not None or kwargs.get("use_cache") is False)
            with self._executor.sweep():
                return native(self, *args, **kwargs)

    def _look(self, part: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A model within this one, called on its own: its tokens are looked at as those of the whole are."""
        check_call(self, by_name(part, args, kwargs))

    def _gradients(self, values: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
        if self._holds_all:
            return contextlib.nullcontext()
        wanted = self.training or any(isinstance(each, torch.Tensor) and each.requires_grad for each in values)
        if wanted and torch.is_grad_enabled():
            raise OptionError(NO_TRAINING)
        return torch.no_grad()

    # --- life

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._turn.closed

    @property
    def busy(self) -> bool:
        """Whether a generation runs."""
        return self._turn.busy

    def stop(self) -> None:
        """End a running generation within one unit, from any thread; it keeps what it has."""
        self._turn.cancel.set()

    def close(self) -> None:
        """Stop a running generation, free memory, threads and files. Safe to call twice.

        Called by what a generation or a forward calls, it ends that, and frees all when it is over.
        """
        self._turn.closed = True
        self.stop()
        if not self._turn.is_within:
            self._free()

    def _free(self, ending: Any = None) -> None:
        """``ending`` is a part whose forward ends by this: its hooks are being called, and stay as they are."""
        with self._turn.last():
            self._residence.close(hooks=ending is None)
            self._prepared.held.close()
            if not self._refusals:  # parts of a closed model say so too
                for unit in self._prepared.units:
                    if unit.module is not ending:
                        self._refusals += Guard(self._turn, unit.module, lambda: None).put_on()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _claimed(self, cancel: threading.Event) -> Iterator[None]:
        """One run at a time; ``cancel`` is what :meth:`stop` sets."""
        with self._turn.run(cancel):
            yield
        if self.options.profiling_mode:
            log.info("time per stage\n%s", self._residence.trace.table())

    @property
    def _executor(self) -> Any:
        return self._residence.executor

    @property
    def _holds_all(self) -> bool:  # type: ignore[override]
        return self._executor is not None and self._executor.holds_all

    def _on_device(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def _all_on_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(self._on_device, args)), {name: self._on_device(value) for name, value in kwargs.items()}

    def _replaying(self) -> contextlib.AbstractContextManager[None]:
        return self._executor.sweep(is_replayed=True)  # type: ignore[no-any-return]

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def _running(running: type, native: type) -> type:
    """``native``, with weights that stream: signatures and name stay, as transformers and its clients look at them."""

    @functools.wraps(native.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(native.forward, *args, **kwargs)  # type: ignore[attr-defined]

    @functools.wraps(native.generate)  # type: ignore[attr-defined]
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._generate(native.generate, *args, **kwargs)  # type: ignore[attr-defined]

    members = {"_native": native, "forward": forward, "generate": generate,
               "__module__": native.__module__, "__doc__": native.__doc__}  # fmt: skip
    return type(native.__name__, (running, native), members)


def _by_name(function: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """The arguments of a call of ``function``, by their names; without the first, which is the model."""
    from transformers import GenerationMixin

    model, args, kwargs = given
    signature = inspect.signature(function)
    if any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in signature.parameters.values()):
        signature = inspect.signature(GenerationMixin.generate)  # it passes on what it is given
    bound = dict(signature.bind(model, *args, **kwargs).arguments)
    bound.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound
