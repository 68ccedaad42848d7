"""The façade: open a model, plan, generate, trace, close. Returns values, never prints."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import LoadOptions
from ..decode.generate import Generation, GenerationResult
from ..decode.prompt import Prompt, check_length, encode
from ..decode.settings import for_answer
from ..decode.tokenizer import load_tokenizer
from ..disk import told
from ..intake import planning, prepare
from ..model.device import Budgets, budgets_of
from ..plan.residency import ResidencyPlan
from ..progress import ProgressCallback, silent
from ..trace import Trace
from .fit import FittedPlan
from .machine import measure
from .preview import Preview
from .running import Running

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
    options = options or LoadOptions()
    with told():
        free = budgets_of(options)
        prepared = prepare.prepare(model, options, free, progress=progress)
    try:
        with told():
            return StreamedModel(prepared, measure(prepared), free)
    except BaseException:
        prepared.held.close()  # at once: whoever keeps the exception keeps what it refers to
        raise


def plan_model(
    model: str | Path, options: LoadOptions | None = None, *, progress: ProgressCallback = silent
) -> FittedPlan:
    """What would go where, how fast, and whether it fits, without downloading or converting a weight, from the headers.

    Only of weights that the config ties though a checkpoint on this machine has both, some rows are compared.
    """
    with told():
        return Preview(model, options or LoadOptions(), progress=progress).plan()


def convert_model(model: str | Path, options: LoadOptions, *, progress: ProgressCallback = silent) -> Path:
    """Write the store that ``options`` need (compression, or a format that is not safetensors); returns its folder."""
    with told():
        return prepare.prepare(model, options, progress=progress).folder


class StreamedModel(Running):
    """A language model whose weights stream. Made by :func:`open_model`; close it, or use it in ``with``.

    It is the transformers model that runs, of a subclass of its native class, with its large weights on ``meta``
    between forwards. All that the native class does works, or says in one line why it does not.
    """

    def __init__(self, prepared: planning.Prepared, machine: Any, budgets: Budgets | None = None):
        super().__init__(prepared, machine, budgets)
        self.folder = prepared.folder

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
        text, inputs = encode(self.tokenizer, prompt, self._prepared.context)
        check_length(inputs["input_ids"], self._prepared.context)
        kwargs, stops = for_answer(self.native, self.tokenizer, kwargs, max_new_tokens, stop)
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
                "unpacked_bytes": self._prepared.kept_bytes, "left_on_disk": _left_on_disk(self._prepared.config),
                "last": self.trace.summary()}  # fmt: skip

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.plan.sweep_seconds:.3g} s a token predicted"
        return f"StreamedModel({self.name!r}, {self.device}, {str(self.dtype).removeprefix('torch.')}, {state})"


def _left_on_disk(config: Any) -> str:
    parts = [name for name in ("vision", "audio") if getattr(config, f"{name}_config", None) is not None]
    return f"the {' and '.join(parts)} part: text is all that goes in here" if parts else ""
