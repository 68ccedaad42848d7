"""``%airllm_load``, ``%%airllm_generate`` and the rest: parse and call, nothing else."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from IPython.core.magic import cell_magic, line_magic, magics_class, no_var_expand
from IPython.display import display

from .. import flags
from ..disk import expanded
from ..errors import OptionError
from . import cards, loading, options, pictures
from .environment import output_of
from .generating import TextView, View, generate, summary_line
from .loading import Loading
from .progress_line import ProgressLine, progress_line
from .prompt_variables import expand, visible
from .registry import DEFAULT_NAME, NOTHING, Entry, Registry, Run

if TYPE_CHECKING:
    from argparse import Namespace as Given

    from ..config import LoadOptions

DETACHED = "interrupted twice: no result is stored; the model stops by itself and can then be used again"


@magics_class
class AirLLM(options.SessionMagics):
    """The magics of one IPython; ``%config AirLLM`` shows and sets the defaults of their flags."""

    def __init__(self, shell: Any):
        super().__init__(shell)
        self.models = Registry()

    @line_magic
    @options.magic(*options.LOAD)
    def airllm_load(self, given: Given) -> None:
        """Load a model, to generate with %%airllm_generate.

        Loading under a name that is taken replaces that model: the new one is looked at first (so a wrong path leaves
        the old one in place), then the old one is closed and its memory freed, then the new one is loaded.
        """
        wanted, bar = self._load_options(given), progress_line(self.shell, given.dashboard)
        entry = loading.open_into(self.models, given.name or DEFAULT_NAME, given.model, wanted, given.dashboard, bar)
        if given.output:
            self.shell.user_ns[given.output] = entry.model
        self._show_plan(cards.model_card(entry.name, entry.model), entry.model.plan, bar, given.dashboard)

    @no_var_expand
    @cell_magic
    @options.magic(*options.GENERATE)
    def airllm_generate(self, given: Given, cell: str) -> None:
        """Generate from the cell's text; {name} becomes the notebook's variable of that name, where there is one."""
        entry = self.models.get(given.name)
        options.fill(given, self)
        how = flags.sampling(given)
        text = cell.rstrip("\n") if given.raw else expand(cell.rstrip("\n"), visible(self.shell))
        entry.settle()
        if given.seed is not None:
            _seed(given.seed)
        generation = entry.model.stream(flags.prompt(given, text), **how)
        result = generate(entry, generation, self._view(entry, generation))
        if result is None:
            display(cards.Line(DETACHED))
            return
        self.models.runs.append(Run.of(entry, result))
        if given.output:
            self.shell.user_ns[given.output] = result
        if self._draws(entry.dashboard):
            display(cards.generation_card(result.trace, pictures.words(result.trace, entry.model.name)))
        else:
            display(cards.Line(summary_line(result)))
        if entry.model.options.profiling_mode:
            _write(result.trace.table())

    @line_magic
    @options.magic(*options.PLAN)
    def airllm_plan(self, given: Given) -> None:
        """Show what would go where and how fast it would be; nothing is downloaded but config and headers."""
        wanted = self._load_options(given)
        bar = progress_line(self.shell)
        plan = Loading(lambda report: loading.plan(given.model, wanted, report)).result(bar)
        if given.output:
            self.shell.user_ns[given.output] = plan
        self._show_plan(cards.plan_card(given.model, plan), plan, bar, self.dashboard)
        if given.units:
            _write(plan.table())

    @line_magic
    @options.magic(*options.PANEL)
    def airllm_panel(self, given: Given) -> None:
        """Pick a model, a compression and budgets with the mouse, and see the plan of each choice; then load it.

        Below the controls stands the %airllm_load line that does the same.
        """
        if output_of(self.shell) != "kernel":
            raise OptionError("a panel needs a notebook; here use %airllm_plan MODEL and %airllm_load MODEL")
        from .panel import Panel

        def load(model: str, wanted: LoadOptions, bar: ProgressLine) -> list[Any]:
            entry = loading.open_into(self.models, given.name or DEFAULT_NAME, model, wanted, self.dashboard, bar)
            return [pictures.Still.of_plan(entry.model.plan), cards.model_card(entry.name, entry.model)]

        Panel(load, given.model or "", self.vram, self.ram, given.name or "").show()

    @line_magic
    @options.magic(*options.BENCH)
    def airllm_bench(self, given: Given) -> None:
        """Measure how fast a model runs: MODEL, random weights in a known shape, or the model that is loaded.

        It generates once to warm up and once more with the clock running, and says what each link carried, beside what
        the plan predicted. The shapes: llama-2-7b, llama-2-70b, llama-3-8b, llama-3-70b, llama-3.1-405b, qwen2.5-32b,
        and the mixtures mixtral-8x7b, qwen3-30b-a3b, gpt-oss-20b, gpt-oss-120b, deepseek-v3; small, small-qwen,
        small-moe.
        """
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
    @options.magic(*options.STATUS)
    def airllm_status(self, given: Given) -> None:
        """Show the loaded models with their budgets, tiers and last speed."""
        display(cards.status_card(list(self.models)) if self.models.names else cards.Line(NOTHING))

    @line_magic
    @options.magic(*options.TRACE)
    def airllm_trace(self, given: Given) -> None:
        """Show where the time of the last generation went."""
        runs = pictures.chosen(given, self.models, self.shell.user_ns)
        if given.file is None:
            pictures.show(runs)
        else:
            display(cards.Line(pictures.save(runs, expanded(given.file))))

    @line_magic
    @options.magic(*options.UNLOAD)
    def airllm_unload(self, given: Given) -> None:
        """Close one model, or all, and free their memory."""
        names = [self.models.get(given.name).name] if given.name else self.models.names
        for name in names:
            self.models.remove(name)
        display(cards.Line(f"closed {', '.join(names)}" if names else NOTHING))

    def _show_plan(self, card: cards.Card, plan: Any, bar: ProgressLine, dashboard: str) -> None:
        """The card in the place of ``bar``, after a picture where pictures are shown."""
        if self._draws(dashboard):
            bar.replace(pictures.Still.of_plan(plan))
            display(card)
        else:
            bar.replace(card)

    def _draws(self, dashboard: str) -> bool:
        return dashboard == "full" and output_of(self.shell) == "kernel"

    def _view(self, entry: Entry, generation: Any) -> View:
        """What fits where this cell's output goes."""
        if self._draws(entry.dashboard):
            from .dashboard import Dashboard

            return Dashboard(entry.model, generation)
        return TextView(entry.model, progress_line(self.shell, entry.dashboard))

    def _load_options(self, given: Given) -> LoadOptions:
        options.fill(given, self)
        name = given.hf_token
        return flags.load_options(given, f"set it first, for example with %env {name}=…, or use HF_TOKEN")

    def _to_bench(self, given: Given) -> Entry:
        """The loaded model, which is measured as it is."""
        if given.model or given.synthetic:
            raise OptionError("--name is of a loaded model; leave it out, or leave out what else is to be measured")
        if idle := options.given_flags(self.airllm_bench, given, but=("name", "sweeps", "batch", "routing", "output")):
            raise OptionError(f"a loaded model is measured as it is; {idle[0]} needs MODEL or --synthetic SHAPE")
        entry = self.models.get(given.name)
        entry.settle()
        return entry


def _bench(given: Given, wanted: LoadOptions, entry: Entry | None, report: Any) -> Any:
    from .. import bench

    how = {"sweeps": given.sweeps, "batch": given.batch, "routing": given.routing, "progress": report}
    if entry is not None:
        return bench.bench_open(entry.model, **how)
    return bench.bench(given.model, given.synthetic, wanted, layers=given.layers, keep=given.keep, cap=given.cap, **how)


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _write(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()
