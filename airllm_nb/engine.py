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

from . import load, planning
from .config import LoadOptions
from .decode.generate import Generation, GenerationResult
from .decode.prefill import of_forward
from .decode.prompt import Prompt, check_length, encode
from .decode.replay import Replay
from .decode.tokenizer import load_tokenizer
from .disk import told
from .errors import BusyError, ClosedError, OptionError
from .fit import FittedPlan
from .machine import measure
from .model.plan import ResidencyPlan
from .preview import Preview
from .residence import Residence
from .trace import ProgressCallback, Trace, silent

log = logging.getLogger(__name__)


def open_model(
    model: str | Path, options: LoadOptions | None = None, *, progress: ProgressCallback = silent
) -> StreamedModel:
    """Open a model for generation; weights move at the first forward.

    Parameters
    ----------
    model
        Hub id (``ORG/REPO:FILE.gguf`` names one file), local folder, or a ``.gguf`` file.
    options
        See :class:`~airllm_nb.config.LoadOptions`.
    progress
        Called during downloads, conversion and set-up.
    """
    with told():
        prepared = load.prepare(model, options or LoadOptions(), progress=progress)
    try:
        with told():
            return StreamedModel(prepared, measure(prepared))
    except BaseException:
        prepared.held.close()  # at once: whoever keeps the exception keeps what it refers to
        raise


def plan_model(
    model: str | Path, options: LoadOptions | None = None, *, progress: ProgressCallback = silent
) -> FittedPlan:
    """What would go where, how fast, and whether it fits, without downloading, converting or reading any weight."""
    with told():
        return Preview(model, options or LoadOptions(), progress=progress).plan()


def convert_model(model: str | Path, options: LoadOptions, *, progress: ProgressCallback = silent) -> Path:
    """Write the store that ``options`` need (compression, or a format that is not safetensors); returns its folder."""
    with told():
        return load.prepare(model, options, progress=progress).folder


class StreamedModel:
    """A language model whose weights stream. Made by :func:`open_model`; close it, or use it in ``with``.

    ``native`` is the transformers model that runs, its large weights on ``meta`` between forwards; ``config``,
    ``device`` and ``dtype`` are as in transformers.
    """

    def __init__(self, prepared: planning.Prepared, machine: Any):
        self._prepared = prepared
        self.native, self.config = prepared.skeleton, prepared.config
        self.device, self.dtype, self.options = prepared.device, prepared.dtype, prepared.options
        self.name, self.folder = prepared.source.name, prepared.folder
        self._lock, self._cancel, self._closed = threading.Lock(), threading.Event(), False
        self._residence = Residence(prepared, machine)
        self.native.generation_config = planning.generation_config(prepared)

    @property
    def plan(self) -> ResidencyPlan:
        """Where everything is, and the predicted seconds a sweep."""
        return self._residence.plan

    @property
    def trace(self) -> Trace:
        """What the last generation did."""
        return self._residence.trace

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded on first use."""
        return load_tokenizer(self.folder)

    # --- transformers' face

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """All of transformers' ``generate``; input tensors may be on any device.

        A prompt whose activations do not fit goes through the model in parts (``prefill_chunk_size``), as few as fit.

        Raises
        ------
        PromptError
            If the prompt is empty or longer than the context.
        BudgetError
            If there is no room for it, or other programs took the memory.
        BusyError
            If a generation runs already.
        """
        return self.run({"inputs": inputs, **kwargs}, threading.Event())

    def run(self, kwargs: dict[str, Any], cancel: threading.Event) -> Any:
        """:meth:`generate` with an event that ends it within one unit, by a ``GenerationStopped``."""
        kwargs = {name: self._on_device(value) for name, value in kwargs.items()}
        ids = kwargs.get("inputs")
        check_length(kwargs.get("input_ids") if ids is None else ids, self._prepared.context)
        replay = Replay(self.native, kwargs, self.device)
        with self._claimed(cancel):
            return self._residence.run(replay.work, replay, cancel, replay.repeatable)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward; returns what the native class returns (``.logits``).

        Raises
        ------
        BudgetError
            If there is no room for it; all positions get logits, unless ``logits_to_keep`` says otherwise.
        """
        args, kwargs = tuple(map(self._on_device, args)), {k: self._on_device(v) for k, v in kwargs.items()}
        work, cancel = of_forward(self.native, args, kwargs), threading.Event()
        fresh = kwargs.get("past_key_values") is None and len(args) <= 1  # a cache may come by position too
        with self._claimed(cancel):
            return self._residence.run(work, lambda _: self.native(*args, **kwargs), cancel, repeatable=fresh)

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
        return Generation(self, text, kwargs, stops, is_cut=max_new_tokens > room)

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
        return executor.position if (executor := self._executor) else (0, 0)

    def status(self) -> dict[str, Any]:
        """Name, device, plan and last speed as plain values.

        ``compression`` is how the weights are encoded, in a store of ours or in the checkpoint itself; ``chosen`` says
        which of several files they are of, and why; ``unpacked_bytes`` is RAM for packed matrices that are kept as they
        were unpacked; ``left_on_disk`` names parts that text does not need.
        ``shrunk_from`` is the VRAM budget before other programs took of it, else ``None``.
        """
        return {"name": self.name, "device": str(self.device), "dtype": str(self.dtype).removeprefix("torch."),
                "compression": self._prepared.encoding, "busy": self.busy, "closed": self.closed,
                "plan": self.plan.as_dict(), "shrunk_from": self._residence.shrunk_from,
                "chosen": self._prepared.source.why,
                "adapter": str(self._prepared.adapter) if self._prepared.adapter else None,
                "unpacked_bytes": self._prepared.kept_bytes, "left_on_disk": _left_on_disk(self.config),
                "last": self.trace.summary()}  # fmt: skip

    def close(self) -> None:
        """Stop a running generation, free memory, threads and files. Safe to call twice."""
        self._closed = True
        self.stop()
        with self._lock:
            self._residence.close()
            self._prepared.held.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- how it runs

    @contextlib.contextmanager
    def _claimed(self, cancel: threading.Event) -> Iterator[None]:
        """One run at a time; ``cancel`` is what :meth:`stop` sets."""
        if not self._lock.acquire(blocking=False):
            if self._closed:
                raise ClosedError(f"{self.name} was closed; load it again")
            raise BusyError(f"{self.name} is generating already; wait for it, or stop it first")
        try:
            # Before it looks whether it was closed: whoever closes meanwhile stops this one or is seen by it.
            self._cancel = cancel
            if self._closed:
                raise ClosedError(f"{self.name} was closed; load it again")
            yield
        finally:
            self._lock.release()
        if self.options.profiling_mode:
            log.info("time per stage\n%s", self.trace.table())

    @property
    def _executor(self) -> Any:
        return self._residence.executor

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


def _left_on_disk(config: Any) -> str:
    parts = [name for name in ("vision", "audio") if getattr(config, f"{name}_config", None) is not None]
    return f"the {' and '.join(parts)} part: text is all that goes in here" if parts else ""
