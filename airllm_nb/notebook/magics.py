"""``%airllm_load``, ``%%airllm_generate`` and the rest: parse and call, nothing else."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from IPython.display import display
from traitlets import Enum, Float, Int, Unicode

from ..errors import AirLLMError, BudgetError, OptionError
from . import cards, options
from .completion import FlagCompletion
from .generating import generate, summary_line
from .loading import Loading
from .mistakes import one_line
from .progress_line import progress_line
from .prompt_variables import expand, visible
from .registry import DEFAULT_NAME, NOTHING, Entry, Registry

if TYPE_CHECKING:
    import argparse

    from ..config import LoadOptions

CHROME = "ui.perfetto.dev and chrome://tracing open it"
DETACHED = "interrupted twice: no result is stored; the model stops by itself and can then be used again"


@magics_class
class AirLLM(Magics):
    """The magics of one IPython; ``%config AirLLM`` shows and sets the defaults of their flags."""

    max_new_tokens = Int(200, help="Longest answer in tokens (-n).").tag(config=True)
    temperature = Float(0.0, help="Temperature; 0 is greedy (-t).").tag(config=True)
    vram = Unicode("", help="Memory budget on the GPU (--vram); empty: what is free.").tag(config=True)
    ram = Unicode("", help="Budget for weights in RAM (--ram); empty: what is free.").tag(config=True)
    dashboard = Enum(options.DASHBOARDS, "bar", help="How much to show while it works (--dashboard).").tag(config=True)

    def __init__(self, shell: Any):
        super().__init__(shell)
        self.models = Registry()

    @line_magic
    @options.arguments(options.LOAD)
    @one_line
    def airllm_load(self, line: str) -> None:
        """Load a model, to generate with %%airllm_generate.

        Loading under a name that is taken replaces that model: the new one is looked at first (so a wrong path leaves
        the old one in place), then the old one is closed and its memory freed, then the new one is loaded.
        """
        given = self._parsed(self.airllm_load, line)
        if given is None:
            return
        name = given.name or DEFAULT_NAME
        wanted = self._load_options(given)
        bar = progress_line(self.shell, given.dashboard or self.dashboard)
        closed = name in self.models
        try:
            if closed:
                self._check(given.model, wanted, bar)
                self.models.remove(name)
            model = Loading(lambda report: _open(given.model, wanted, report)).result(bar)
        except KeyboardInterrupt:
            kept = name in self.models
            raise OptionError("interrupted; " + (f"{name!r} is as it was" if kept else
                              "nothing is loaded, and what was downloaded or converted is kept")) from None  # fmt: skip
        except AirLLMError as error:
            if closed and name not in self.models:
                raise type(error)(f"{error} (the model that was {name!r} is closed already)") from None
            raise
        self.models.add(Entry(name, model, given.dashboard or self.dashboard))
        if given.output:
            self.shell.user_ns[given.output] = model
        bar.replace(cards.model_card(name, model))

    @no_var_expand
    @cell_magic
    @options.arguments(options.GENERATE)
    @one_line
    def airllm_generate(self, line: str, cell: str) -> None:
        """Generate from the cell's text; {name} becomes the notebook's variable of that name, where there is one."""
        variables = visible(self.shell)
        given = self._parsed(self.airllm_generate, line, lambda word: expand(word, variables))
        if given is None:
            return
        entry = self.models.get(given.name)
        given.max_new_tokens = self.max_new_tokens if given.max_new_tokens is None else given.max_new_tokens
        given.temperature = self.temperature if given.temperature is None else given.temperature
        how = options.sampling(given) | {"max_new_tokens": given.max_new_tokens, "stop": options.stop_texts(given)}
        text = cell.rstrip("\n") if given.raw else expand(cell.rstrip("\n"), variables)
        entry.settle()
        if given.seed is not None:
            _seed(given.seed)
        generation = entry.model.stream(_prompt(given, text), **how)
        result = generate(entry, generation, progress_line(self.shell, entry.dashboard))
        if result is None:
            display(cards.Line(DETACHED))
            return
        if given.output:
            self.shell.user_ns[given.output] = result
        display(cards.Line(summary_line(result)))
        if entry.model.options.profiling_mode:
            _write(result.trace.table())

    @line_magic
    @options.arguments(options.PLAN)
    @one_line
    def airllm_plan(self, line: str) -> None:
        """Show what would go where and how fast it would be; nothing is downloaded but config and headers."""
        given = self._parsed(self.airllm_plan, line)
        if given is None:
            return
        wanted = self._load_options(given)
        plan = Loading(lambda report: _plan(given.model, wanted, report)).result(progress_line(self.shell))
        if given.output:
            self.shell.user_ns[given.output] = plan
        display(cards.plan_card(given.model, plan))
        if given.units:
            _write(plan.table())

    @line_magic
    @options.arguments(options.BENCH)
    @one_line
    def airllm_bench(self, line: str) -> None:
        """Measure how fast a model runs: MODEL, random weights in a known shape, or the model that is loaded.

        It generates once to warm up and once more with the clock running, and says what each link carried, beside what
        the plan predicted. The shapes: llama-2-7b, llama-2-70b, llama-3-70b, llama-3.1-405b, qwen2.5-32b, small,
        small-qwen.
        """
        given = self._parsed(self.airllm_bench, line)
        if given is None:
            return
        loaded = given.model is None and given.synthetic is None
        entry = self._to_bench(given) if loaded or given.name else None
        work = functools.partial(_bench, given, self._load_options(given), entry)
        bar = progress_line(self.shell, entry.dashboard if entry else self.dashboard)
        try:
            result = Loading(work).result(bar)
        except KeyboardInterrupt:
            raise OptionError("interrupted; nothing was measured") from None
        if given.output:
            self.shell.user_ns[given.output] = result
        bar.replace(cards.bench_card(result))

    @line_magic
    @options.arguments(options.STATUS)
    @one_line
    def airllm_status(self, line: str) -> None:
        """Show the loaded models with their budgets, tiers and last speed."""
        if self._parsed(self.airllm_status, line) is not None:
            display(cards.status_card(list(self.models)) if self.models.names else cards.Line(NOTHING))

    @line_magic
    @options.arguments(options.TRACE)
    @one_line
    def airllm_trace(self, line: str) -> None:
        """Show where the time of the last generation went."""
        given = self._parsed(self.airllm_trace, line)
        if given is None:
            return
        trace = self.models.get(given.name).model.trace
        if not trace.sweeps:
            raise OptionError("nothing was generated yet; run a %%airllm_generate cell first")
        if given.file is None:
            display(cards.trace_card(trace.summary()))
            return
        path = Path(given.file).expanduser()
        if path.suffix != ".json":
            raise OptionError(f"{given.file}: name a file that ends in .json")
        try:
            trace.to_chrome(path)
        except OSError as error:
            raise OptionError(f"{path} cannot be written ({error.strerror}); name another place") from None
        display(cards.Line(f"wrote {path}; {CHROME}"))

    @line_magic
    @options.arguments(options.UNLOAD)
    @one_line
    def airllm_unload(self, line: str) -> None:
        """Close one model, or all, and free their memory."""
        given = self._parsed(self.airllm_unload, line)
        if given is None:
            return
        names = [self.models.get(given.name).name] if given.name else self.models.names
        for name in names:
            self.models.remove(name)
        display(cards.Line(f"closed {', '.join(names)}" if names else NOTHING))

    def _parsed(self, magic: Any, line: str, change: Any = str) -> argparse.Namespace | None:
        given = options.parse(magic, line, change)
        if given is None:
            _write(magic.parser.format_help().replace("::\n\n  %", "%"))
        return given

    def _load_options(self, given: argparse.Namespace) -> LoadOptions:
        given.vram, given.ram = given.vram or self.vram or None, given.ram or self.ram or None
        return options.load_options(given)

    def _to_bench(self, given: argparse.Namespace) -> Entry:
        """The loaded model, which is measured as it is."""
        if given.model or given.synthetic:
            raise OptionError("--name is of a loaded model; leave it out, or leave out what else is to be measured")
        if idle := options.given_flags(self.airllm_bench, given, but=("name", "sweeps", "batch", "output")):
            raise OptionError(f"a loaded model is measured as it is; {idle[0]} needs MODEL or --synthetic SHAPE")
        entry = self.models.get(given.name)
        entry.settle()
        return entry

    def _check(self, model: str, wanted: LoadOptions, bar: Any) -> None:
        """Refuse what cannot be loaded while the old model is still there."""
        # A GGUF file on the Hub has its config inside: looking at it is downloading it.
        if "gguf" in model.lower() and not Path(model).expanduser().exists():
            return
        try:
            Loading(lambda report: _plan(model, wanted, report)).result(bar)
        except BudgetError as error:
            # A budget that was not given is what the old model leaves free: the new one will have more.
            if getattr(wanted, str(error).partition("=")[0], None) is not None:
                raise


def _open(model: str, wanted: LoadOptions, report: Any) -> Any:
    from ..engine import open_model

    return open_model(model, wanted, progress=report)


def _plan(model: str, wanted: LoadOptions, report: Any) -> Any:
    from ..engine import plan_model

    return plan_model(model, wanted, progress=report)


def _bench(given: argparse.Namespace, wanted: LoadOptions, entry: Entry | None, report: Any) -> Any:
    from .. import bench

    how = {"sweeps": given.sweeps, "batch": given.batch, "progress": report}
    if entry is not None:
        return bench.bench_open(entry.model, **how)
    return bench.bench(given.model, given.synthetic, wanted, layers=given.layers, keep=given.keep, cap=given.cap, **how)


def _prompt(given: argparse.Namespace, text: str) -> Any:
    if not (given.chat or given.system) or not text.strip():
        return text
    system = [{"role": "system", "content": given.system}] if given.system else []
    return [*system, {"role": "user", "content": text}]


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _write(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def load(shell: Any) -> None:
    """Register the magics in this IPython; a second time is harmless and says so."""
    if AirLLM.__name__ in shell.magics_manager.registry:
        _write("airllm_nb is loaded already; %reload_ext airllm_nb loads it anew")
        return
    magics = AirLLM(shell)
    shell.register_magics(magics)
    FlagCompletion(shell).add({name: functools.partial(options.flags, magic) for name, magic in _named(magics).items()})


def unload(shell: Any) -> None:
    """Close the models and take everything out that :func:`load` put in."""
    magics = shell.magics_manager.registry.pop(AirLLM.__name__, None)
    if magics is None:
        return
    magics.models.close()
    FlagCompletion(shell).remove(_named(magics))
    for kind, names in magics.magics.items():
        for name, function in names.items():
            if shell.magics_manager.magics[kind].get(name) == function:
                del shell.magics_manager.magics[kind][name]
    if magics in shell.configurables:
        shell.configurables.remove(magics)


def _named(magics: AirLLM) -> dict[str, Any]:
    """``{"%airllm_load": method, "%%airllm_generate": method, …}``"""
    marks = {"line": "%", "cell": "%%"}
    return {marks[kind] + name: function for kind, names in magics.magics.items() for name, function in names.items()}
