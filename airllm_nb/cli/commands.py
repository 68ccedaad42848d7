"""plan, convert, generate and bench."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

from ..config import format_bytes
from ..disk import status
from ..errors import OptionError
from ..flags import in_flags, sampling
from ..progress import Meter, Progress
from ..trace import result_parts
from .arguments import load_options, read_prompt

INTERRUPTED = 130


def plan(given: argparse.Namespace) -> int:
    """What would go where."""
    options = load_options(given)
    with ProgressLine() as line:
        from ..engine.facade import plan_model

        made = plan_model(given.model, options, progress=line.show)
    if given.json:
        placed = zip(made.units, made.tiers, strict=True)
        units = [{"name": unit.name, "bytes": unit.nbytes, "tier": tier} for unit, tier in placed]
        write_json({"model": given.model, **made.as_dict()} | ({"units": units} if given.units else {}))
    else:
        write(f"{in_flags(str(made))}\n" + (f"\n{made.table()}\n" if given.units else ""))
    return 0


def convert(given: argparse.Namespace) -> int:
    """The store, once."""
    if given.adapter:
        raise OptionError("--adapter: stores are of models without adapters; give it when the model is used")
    options = load_options(given)
    start = time.perf_counter()
    with ProgressLine() as line:
        from ..engine.facade import convert_model

        folder = convert_model(given.model, options, progress=line.show)
    if given.json:
        nbytes = sum(status(file).st_size for file in folder.rglob("*") if file.is_file())
        write_json({"model": given.model, "folder": str(folder), "compression": given.compression,
                    "bytes": nbytes, "seconds": time.perf_counter() - start})  # fmt: skip
    else:
        write(f"{folder}\n")
    return 0


def generate(given: argparse.Namespace) -> int:
    """An answer, token by token; the facts about it go to stderr."""
    options, how, prompt = load_options(given), sampling(given), read_prompt(given)
    with ProgressLine() as line:
        from ..engine.facade import open_model

        model = open_model(given.model, options, progress=line.show)
    with model:
        status = model.status()
        if not given.json:
            sys.stderr.write(_notes(status))
        if given.seed is not None:
            import torch

            torch.manual_seed(given.seed)
        generation = model.stream(prompt, **how)
        interrupted = _stream(generation, show=not given.json)
        result = generation.result
    if result is None:
        raise KeyboardInterrupt
    if given.json:
        write_json(_facts(given.model, status, result))
    else:
        sys.stderr.write(_summary(result) + "\n")
        if options.profiling_mode:
            sys.stderr.write(result.trace.table() + "\n")
    return INTERRUPTED if interrupted else 0


def bench(given: argparse.Namespace) -> int:
    """Measure a model, or random weights in a known shape."""
    options = load_options(given)
    try:
        with ProgressLine() as line:
            from .. import bench

            result = bench.bench(
                given.model, given.synthetic, options, layers=given.layers, keep=given.keep, sweeps=given.sweeps,
                batch=given.batch, cap=given.cap, routing=given.routing, progress=line.show,
            )  # fmt: skip
    except KeyboardInterrupt:
        if given.synthetic is None:
            raise
        left = "is kept if it was complete" if given.keep else "that this wrote is deleted"
        raise KeyboardInterrupt(f"interrupted; the synthetic checkpoint {left}") from None
    if given.json:
        write_json(result.as_dict())
    else:
        write(f"{result}\n")
    return 0


def _stream(generation: Any, show: bool) -> bool:
    """Write the text as it comes; whether Ctrl-C ended it."""
    shown, interrupted = "", False
    try:
        for chunk in generation:
            if show:
                shown += chunk.text
                write(chunk.text)
    except KeyboardInterrupt:
        interrupted = True
        with contextlib.suppress(StopIteration, KeyboardInterrupt):
            while True:
                # Asked again and again, because a stop before the first unit can be missed.
                generation.stop()
                generation.poll(0.1)
    if show:
        # Closing brings what was held back: the bytes of a character that Ctrl-C cut.
        text = shown if generation.result is None else generation.result.text
        write(text[len(shown) :] + "\n" * bool(text and not text.endswith("\n")))
    return interrupted


def _notes(status: dict[str, Any]) -> str:
    """What was chosen, put on and left out, a line each; empty where nothing was."""
    labels = {"chosen": "chosen", "adapter": "adapter", "left_on_disk": "left on disk"}
    return "".join(f"{label}: {status[name]}\n" for name, label in labels.items() if status.get(name))


def _facts(model: str, status: dict[str, Any], result: Any) -> dict[str, Any]:
    opened = {name: status[name] or None for name in ("chosen", "adapter", "compression")}
    names = "prompt text prompt_tokens stopped_by seconds tokens_per_second sweep_seconds peak_bytes"
    facts = {name: getattr(result, name) for name in names.split()}
    return {"model": model, **opened, **facts, "token_ids": list(result.token_ids), "trace": result.trace.summary()}


def _summary(result: Any) -> str:
    peak = [f"peak {format_bytes(result.peak_bytes)}"] if result.peak_bytes else []
    return " · ".join([*result_parts(result), *peak, result.ended])


# Between lines of progress in a log.
PLAIN_SECONDS = 30.0


class ProgressLine:
    """How far long work is, on stderr: where that is no terminal, a line now and then. Called from any thread."""

    def __init__(self) -> None:
        self._live, self._next = sys.stderr.isatty(), 0.0
        self._meter = Meter(time.monotonic)

    def show(self, progress: Progress) -> None:
        """Draw a report, at most four times a second."""
        now = time.monotonic()
        if self._meter.see(progress):
            self._next = now if self._live else self._next or now + PLAIN_SECONDS
        if now < self._next:
            return
        self._next = now + (0.25 if self._live else PLAIN_SECONDS)
        text = self._text(progress)
        sys.stderr.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        sys.stderr.flush()

    def _text(self, progress: Progress) -> str:
        rate, left = self._meter.speed(progress) or (None, None)
        parts = [progress.what, progress.amount]
        parts.append(f"{format_bytes(rate)}/s" if rate else "")
        parts.append(f"{left:.0f} s left" if left is not None else "")
        return " · ".join(filter(None, parts))

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")


def write(text: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(document: Any) -> None:
    """One document, readable."""
    write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
