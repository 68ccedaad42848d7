"""Measuring: open, generate once to warm up, generate again, compare with the plan."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import LoadOptions, cache_dir
from ..engine.facade import StreamedModel, open_model
from ..errors import OptionError
from ..model.device import choose_device
from ..plan.needs import context_length
from ..progress import Progress, ProgressCallback, silent
from ..store.names import SYNTHETIC
from . import synthetic
from .result import BenchResult, experts_of, links_of
from .routing import Routing

POLL = 0.1
# Of a synthetic model, where no number is given.
LAYERS = 4


def bench_model(
    model: str | Path, options: LoadOptions | None = None, *, sweeps: int = 5, prompt_tokens: int = 16, batch: int = 1,
    cap: bool = False, routing: str | None = None, progress: ProgressCallback = silent,
) -> BenchResult:  # fmt: skip
    """Open a model, warm it up, measure it and close it.

    Parameters
    ----------
    model, options
        As :func:`~airllm_nb.engine.facade.open_model` takes them.
    sweeps, prompt_tokens, batch
        Sweeps after the one over the prompt, each a token; length of the prompt of random tokens; sequences.
    cap
        Enforce the VRAM budget: PyTorch's allocator then fails above it.
    routing
        Of a mixture, how tokens are routed to experts: one of :data:`~airllm_nb.bench.routing.ROUTINGS`; ``None`` is as
        the model does.

    Raises
    ------
    OptionError
        If a number is not above 0, or there is nothing to enforce.
    """
    options = dataclasses.replace(options or LoadOptions(), batch_size=_positive(batch=batch))
    _positive(sweeps=sweeps, prompt_tokens=prompt_tokens)
    check_cap(options, cap)
    with _capped(options, cap):
        device = choose_device(options)
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        with open_model(model, options, progress=progress) as opened:
            seconds = time.perf_counter() - start
            result = _measure(opened, sweeps, prompt_tokens, batch, routing, progress)
    return dataclasses.replace(result, open_seconds=seconds, vram_cap=options.vram_budget if cap else None)


def bench_open(
    model: StreamedModel, *, sweeps: int = 5, prompt_tokens: int = 16, batch: int = 1,
    routing: str | None = None, progress: ProgressCallback = silent,
) -> BenchResult:  # fmt: skip
    """:func:`bench_model` of a model that is open, as it is; it stays open."""
    _positive(sweeps=sweeps, prompt_tokens=prompt_tokens, batch=batch)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    return _measure(model, sweeps, prompt_tokens, batch, routing, progress)


def bench_synthetic(
    shape: str, layers: int, options: LoadOptions | None = None, *, keep: bool = False, cap: bool = False,
    routing: str | None = None, progress: ProgressCallback = silent, **measured: int,
) -> BenchResult:  # fmt: skip
    """:func:`bench_model` of a known shape with random weights, which are deleted again unless ``keep``.

    A checkpoint that an earlier call kept is used, and stays. A mixture's tokens are routed evenly unless ``routing``
    says otherwise.
    """
    options = options or LoadOptions()
    if "num_experts_per_tok" in synthetic.shape_config(shape, layers):
        routing = routing or "uniform"
    elif routing:
        raise OptionError(f"routing={routing!r} is of mixtures, and {shape} has no experts; leave it out")
    _positive(**measured)
    check_cap(options, cap)
    folder = _synthetic_folder(shape, layers, options.compression)
    kept = keep or synthetic.is_finished(folder, shape, layers, options.compression)
    try:
        synthetic_model(shape, layers, options.compression, progress)
        result = bench_model(folder, options, cap=cap, routing=routing, progress=progress, **measured)
    finally:
        if not kept:
            synthetic.remove(folder)
    facts = {"shape": shape, "layers": layers, "layers_of_shape": synthetic.SHAPES[shape]["num_hidden_layers"],
             "folder": str(folder), "kept": kept}  # fmt: skip
    return dataclasses.replace(result, synthetic=facts)


def bench(
    model: str | None, shape: str | None, options: LoadOptions, *, layers: int | None = None, keep: bool = False,
    **how: Any,
) -> BenchResult:  # fmt: skip
    """:func:`bench_model` or :func:`bench_synthetic`, whichever was asked for; messages name the flags.

    Raises
    ------
    OptionError
        If both were, or none, or what is of one was given for the other.
    """
    if (model is None) == (shape is None):
        both = "" if model is None else ", not both"
        raise OptionError(f"bench measures one thing: give a MODEL or --synthetic SHAPE{both}")
    if shape is not None:
        return bench_synthetic(shape, LAYERS if layers is None else layers, options, keep=keep, **how)
    for flag, given in (("--layers", layers is not None), ("--keep", keep)):
        if given:
            raise OptionError(f"{flag} is of a synthetic checkpoint; add --synthetic SHAPE, or leave it out")
    assert model is not None
    return bench_model(model, options, **how)


def synthetic_model(
    shape: str, layers: int, compression: str | None = None, progress: ProgressCallback = silent
) -> Path:
    """A checkpoint of a known shape with random weights, in the cache; written unless it is there.

    Parameters
    ----------
    shape
        One of :data:`airllm_nb.bench.shapes.SHAPES`.
    compression
        ``None``, or ``"4bit"`` or ``"8bit"`` for the finished store.
    """
    folder = _synthetic_folder(shape, layers, compression)
    synthetic.write(folder, shape, layers, compression, progress=progress)
    return folder


def _synthetic_folder(shape: str, layers: int, compression: str | None) -> Path:
    name = f"{shape}-{layers}-layer{'s' * (layers != 1)}" + (f"-{compression}" if compression else "")
    return cache_dir() / SYNTHETIC / name


def check_cap(options: LoadOptions, cap: bool) -> None:
    """Refuse a cap without a budget or without a GPU."""
    if cap and options.vram_budget is None:
        raise OptionError("--cap enforces --vram, which is not given; add --vram 4GiB, or leave --cap out")
    if cap and choose_device(options).type != "cuda":
        raise OptionError("--cap needs a GPU; this runs on the CPU, which has no VRAM to cap: leave it out")


@contextlib.contextmanager
def _capped(options: LoadOptions, cap: bool) -> Iterator[None]:
    if not cap:
        yield
        return
    device = choose_device(options)
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (options.vram_budget or 0) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _positive(**given: int) -> int:
    for name, value in given.items():
        if value < 1:
            raise OptionError(f"{name}={value}: a measurement needs 1 or more")
    return max(given.values(), default=1)


# --- measuring


def _measure(
    model: StreamedModel, sweeps: int, prompt_tokens: int, batch: int, routing: str | None, progress: ProgressCallback
) -> BenchResult:
    tokens = sweeps + 1
    context = model.options.max_seq_len or context_length(model.config)
    if context and prompt_tokens + tokens > context:
        raise OptionError(f"{prompt_tokens} tokens of prompt and {tokens} generated are more than the {context:,} "
                          "that this model has room for; measure fewer sweeps, or raise max_seq_len")  # fmt: skip
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (batch, prompt_tokens), generator=generator)
    routed = Routing(model, routing, batch, sweeps) if routing else None
    # The first generation of a thread plans attention anew for every length: on a GPU some tens of milliseconds a
    # token. Hence one thread for both.
    with ThreadPoolExecutor(1, "airllm-bench") as pool, routed or contextlib.nullcontext():
        first, _ = _generate(
            pool, model, ids, tokens, routed, lambda *at: progress(_report("warming up", 0, tokens, *at))
        )
        again, times = _generate(
            pool, model, ids, tokens, routed, lambda *at: progress(_report("measuring", tokens, tokens, *at))
        )
    summary, plan, cuda = model.trace.summary(), model.plan, model.device.type == "cuda"
    experts = experts_of(model.trace, plan)
    return BenchResult(
        model=model.name, compression=model.status()["compression"], device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."), sweeps=sweeps, prompt_tokens=prompt_tokens, batch=batch,
        routing=routing, predicted_sweep_seconds=plan.sweep_seconds, bound_by=plan.bound_by,
        sweep_seconds=summary["sweep_seconds"],
        achieved_of_predicted=plan.sweep_seconds / summary["sweep_seconds"],
        tokens_per_second=batch * sweeps / (times[-1] - times[1]), first_token_seconds=times[1] - times[0],
        open_seconds=None, same_tokens=bool(torch.equal(first, again)),
        peak_bytes=torch.cuda.max_memory_reserved(model.device) if cuda else summary["peak_device_bytes"],
        links=links_of(plan, summary["sweep_seconds"], experts), experts=experts, stages=summary["stages"],
        plan=plan.as_dict(),
        probed=dataclasses.asdict(plan.machine), machine=machine_facts(model.device),
    )  # fmt: skip


class _Clock:
    """A streamer that notes when each token comes, and routes the next one; the first call is the prompt."""

    def __init__(self, routed: Routing | None) -> None:
        self.times, self._routed = list[float](), routed

    def put(self, _: Any) -> None:
        if self._routed is not None:
            self._routed.step() if self.times else self._routed.begin()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to finish."""


def _generate(
    pool: ThreadPoolExecutor, model: StreamedModel, ids: torch.Tensor, tokens: int, routed: Routing | None, report: Any
) -> tuple[torch.Tensor, list[float]]:
    """One generation in the pool's thread, so that an interrupt, or a report that raises, ends it within a unit."""
    cancel, clock = threading.Event(), _Clock(routed)
    how = {"inputs": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "min_new_tokens": tokens,
           "do_sample": False, "num_beams": 1, "streamer": clock}  # fmt: skip
    future = pool.submit(model.run, how, cancel)
    try:
        while not wait([future], POLL).done:
            report(len(clock.times) - 1, *model.position)
        return future.result(), clock.times
    finally:
        cancel.set()


def _report(what: str, before: int, tokens: int, done: int, unit: int, units: int) -> Progress:
    return Progress("bench", before + max(done, 0), 2 * tokens, "tokens", f"{what}, unit {unit} of {units}")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a figure belongs to, as plain values."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "airllm_nb": __version__}  # fmt: skip


def _cpu_name() -> str:
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
