"""The façade: open a model, plan, generate, trace, close. Returns values, never prints."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import load
from .config import LoadOptions
from .decode.generate import Generation, GenerationResult
from .decode.prompt import Prompt, check_length, encode, sequences, total_length
from .errors import BusyError, ClosedError, OptionError
from .machine import measure
from .model.executor import Executor
from .model.plan import ResidencyPlan
from .trace import ProgressCallback, Trace, silent

log = logging.getLogger(__name__)


def open_model(
    model: str | Path, options: LoadOptions | None = None, *, progress: ProgressCallback = silent
) -> StreamedModel:
    """Open a model for generation; weights move at the first forward.

    Parameters
    ----------
    model
        Hub id, local folder, or a ``.gguf`` file.
    options
        See :class:`~airllm_nb.config.LoadOptions`.
    progress
        Called during downloads, conversion and set-up.
    """
    prepared = load.prepare(model, options or LoadOptions(), progress=progress)
    return StreamedModel(prepared, measure(prepared))


def plan_model(
    model: str | Path, options: LoadOptions | None = None, *, progress: ProgressCallback = silent
) -> ResidencyPlan:
    """What would go where, and how fast, without downloading, converting or reading any weight."""
    prepared = load.prepare(model, options or LoadOptions(), progress=progress, weights=False)
    return load.plan(prepared, measure(prepared), prepared.planned_length, prepared.options.batch_size)


def convert_model(model: str | Path, options: LoadOptions, *, progress: ProgressCallback = silent) -> Path:
    """Write the store that ``options`` need (compression, or a format that is not safetensors); returns its folder."""
    return load.prepare(model, options, progress=progress).folder


class StreamedModel:
    """A language model whose weights stream. Made by :func:`open_model`; close it, or use it in ``with``.

    Attributes
    ----------
    native
        The transformers model that runs; its large weights are on ``meta`` between forwards.
    config, device, dtype
        As in transformers.
    plan
        Where everything is, and the predicted seconds a sweep.
    trace
        What the last generation did.
    """

    def __init__(self, prepared: load.Prepared, machine: Any):
        self._prepared, self._machine = prepared, machine
        self.native, self.config = prepared.skeleton, prepared.config
        self.device, self.dtype, self.options = prepared.device, prepared.dtype, prepared.options
        self.name, self.folder = prepared.source.name, prepared.folder
        self.trace = Trace()
        self._lock, self._cancel, self._closed = threading.Lock(), threading.Event(), False
        self._executor: Executor | None = None
        self._room = (prepared.planned_length, prepared.options.batch_size)
        self.plan = load.plan(prepared, machine, *self._room)
        self._start_executor()
        self.native.generation_config = load.generation_config(prepared)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded on first use."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)

    # --- transformers' face

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """All of transformers' ``generate``; input tensors may be on any device.

        Raises
        ------
        PromptError
            If the prompt is empty or longer than the context.
        BusyError
            If a generation runs already.
        """
        return self.run({"inputs": inputs, **kwargs}, threading.Event())

    def run(self, kwargs: dict[str, Any], cancel: threading.Event) -> Any:
        """:meth:`generate` with an event that ends it within one unit, by a ``GenerationStopped``."""
        kwargs = {name: self._on_device(value) for name, value in kwargs.items()}
        # Compiled code would keep the addresses of parameters that are bound anew in every sweep.
        kwargs.setdefault("disable_compile", True)
        ids, config = kwargs.get("inputs"), kwargs.get("generation_config") or self.native.generation_config
        ids = kwargs.get("input_ids") if ids is None else ids
        check_length(ids, self._prepared.context)
        with self._running(total_length(ids, config, kwargs), sequences(ids, config, kwargs), cancel):
            return self.native.generate(**kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward; returns what the native class returns (``.logits``)."""
        args, kwargs = tuple(map(self._on_device, args)), {k: self._on_device(v) for k, v in kwargs.items()}
        ids, past = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
        if isinstance(ids, torch.Tensor):
            length, batch = ids.shape[-1] + (past.get_seq_length() if past is not None else 0), ids.shape[0]
        else:
            length, batch = 1, 1
        with self._running(length, batch, threading.Event()):
            return self.native(*args, **kwargs)

    # --- text in, text out

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 256, stop: str | Sequence[str] | None = None,
               **kwargs: Any) -> Generation:  # fmt: skip
        """Generate from a prompt or a list of chat messages, piece by piece.

        Parameters
        ----------
        prompt
            Text as it is, or ``[{"role": "user", "content": "…"}]`` through the model's chat template.
        stop
            Text that ends the answer.
        **kwargs
            Whatever transformers' ``generate`` takes.

        Returns
        -------
        Generation
            Iterate it for :class:`~airllm_nb.decode.generate.GenerationChunk`; afterwards it has ``.result``.
        """
        text, inputs = encode(self.tokenizer, prompt)
        check_length(inputs["input_ids"], self._prepared.context)
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if (kwargs.get("num_beams") or 1) > 1:
            raise OptionError("beams do not stream: they change their mind; use model.generate for num_beams > 1")
        if stops:
            kwargs.update(stop_strings=stops, tokenizer=self.tokenizer)
        room = (self._prepared.context or sys.maxsize) - inputs["input_ids"].shape[-1]
        kwargs.update(inputs, max_new_tokens=min(max_new_tokens, room))
        return Generation(self, text, kwargs, stops)

    def answer(self, prompt: Prompt, **kwargs: Any) -> GenerationResult:
        """:meth:`stream` to its end; returns the result."""
        with self.stream(prompt, **kwargs) as generation:
            for _ in generation:
                pass
        assert generation.result is not None, "a closed generation has a result"
        return generation.result

    def stop(self) -> None:
        """End a running generation within one unit, from any thread; it keeps what it has."""
        self._cancel.set()

    # --- life

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def busy(self) -> bool:
        """Whether a generation runs."""
        return self._lock.locked()

    @property
    def position(self) -> tuple[int, int]:
        """Within the sweep: the unit that computes, counted from 1, and how many there are."""
        return (0, 0) if self._executor is None else self._executor.position

    def status(self) -> dict[str, Any]:
        """Name, device, plan and last speed as plain values."""
        return {"name": self.name, "device": str(self.device), "dtype": str(self.dtype).removeprefix("torch."),
                "compression": self.options.compression, "busy": self.busy, "closed": self.closed,
                "plan": self.plan.as_dict(), "last": self.trace.summary()}  # fmt: skip

    def close(self) -> None:
        """Stop a running generation, free memory, threads and files. Safe to call twice."""
        self._closed = True
        self.stop()
        with self._lock:
            if self._executor is not None:
                self._executor.close()
                self._executor = None
                self._prepared.scratch.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- how it runs

    @contextlib.contextmanager
    def _running(self, length: int, batch: int, cancel: threading.Event) -> Iterator[None]:
        """One generation at a time, with room for it, recorded, and left usable whatever happens."""
        if not self._lock.acquire(blocking=False):
            raise BusyError(f"{self.name} is generating already; wait for it, or stop it first")
        try:
            # Before it looks whether it was closed: whoever closes meanwhile stops this one or is seen by it.
            self._cancel = cancel
            if self._closed:
                raise ClosedError(f"{self.name} was closed; load it again")
            executor = self._make_room(length, batch)
            self.trace = trace = Trace()
            executor.start(trace, cancel)
            try:
                with torch.inference_mode(), executor.on_device():
                    yield
            finally:
                executor.finish()
        finally:
            self._lock.release()
        if self.options.profiling_mode:
            log.info("time per stage\n%s", trace.table())

    def _make_room(self, length: int, batch: int) -> Executor:
        """The executor, planned again when a generation needs a larger cache than was planned for."""
        room = (max(length, self._room[0]), max(batch, self._room[1]))
        if self._executor is not None and (room == self._room or not self.plan.machine.has_device):
            return self._executor
        log.info("planning again for %d tokens x %d sequences", *room)
        before = self.plan, self._room
        self.plan, self._room = load.plan(self._prepared, self._machine, *room), room
        try:
            return self._start_executor()
        except BaseException:  # whatever a device runs into, or Ctrl-C: the next generation starts as before
            self.plan, self._room = before
            raise

    def _start_executor(self) -> Executor:
        if self._executor is not None:
            self._executor.close()
            self._executor = None
        prepared = self._prepared
        self._executor = Executor(
            prepared.skeleton, prepared.units, prepared.small, self.plan, self.device, self.options.depth,
            profile=self.options.profiling_mode,
        )  # fmt: skip
        return self._executor

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, StreamedModel):
            return value.native
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.plan.sweep_seconds:.3g} s a token predicted"
        return f"StreamedModel({self.name!r}, {self.device}, {str(self.dtype).removeprefix('torch.')}, {state})"
