"""Pictures that stay in the notebook, PNG and text, which every viewer shows and a screen reader reads; and
``%airllm_trace``: which generations are shown or saved.

Matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.display import display

from ..errors import OptionError
from ..routed import expert_use
from ..timeline import last_sweep
from ..trace import Trace
from . import cards
from .registry import Registry, Run

if TYPE_CHECKING:
    import argparse

CHROME = "ui.perfetto.dev and chrome://tracing open it"
PICTURES = (".png", ".svg")
NOTHING_YET = "nothing was generated yet; run a %%airllm_generate cell first"


class Still:
    """A picture as a display: ``image/png``, with its description as ``text/plain``."""

    def __init__(self, picture: Any):
        self.picture = picture

    @classmethod
    def of(cls, trace: Trace, title: str = "") -> Still | None:
        """The last sweep of a generation; ``None`` if there was none."""
        from .sweep_figures import overlap

        view = last_sweep(trace)
        return None if view is None else cls(overlap(view, title, trace.plan))

    @classmethod
    def of_memory(cls, trace: Trace) -> Still | None:
        """The memory of the GPU during a generation; ``None`` without a GPU."""
        from .memory_figures import vram_timeline

        return cls(vram_timeline(trace)) if trace.of_device else None

    @classmethod
    def of_experts(cls, trace: Trace, title: str = "") -> Still | None:
        """Which experts were asked for; ``None`` where all are there, or there are none."""
        from .expert_figures import expert_map

        use = expert_use(trace.experts, trace.sweeps)
        return None if use is None else cls(expert_map(use, title))

    @classmethod
    def of_plan(cls, plan: Any) -> Still:
        """What goes where."""
        from .memory_figures import plan_bar

        return cls(plan_bar(plan))

    def bundle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Data and metadata of the display."""
        from .canvas import WIDTH

        png = base64.b64encode(self.picture.png()).decode()
        shown = {"width": WIDTH, "alt": self.picture.alt}
        return {"text/plain": self.picture.alt, "image/png": png}, {"image/png": shown}

    def __repr__(self) -> str:
        return str(self.picture.alt)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        return self.bundle()


def words(trace: Trace, title: str = "") -> str:
    """What the pictures of a generation show, for whoever cannot see them."""
    from .expert_figures import expert_text
    from .memory_figures import memory_text
    from .sweep_figures import overlap_text

    view = last_sweep(trace)
    texts = [overlap_text(view, title, trace.plan)] if view else []
    if trace.of_device:
        texts.append(memory_text(trace))
    if use := expert_use(trace.experts, trace.sweeps):
        texts.append(expert_text(use, title))
    return "\n".join(texts)


# ---- %airllm_trace


def chosen(given: argparse.Namespace, models: Registry, variables: Mapping[str, Any]) -> list[Run]:
    """The generations that the arguments mean.

    Raises
    ------
    OptionError
        If there are none, or too few to compare, or a variable holds none.
    """
    done = [run for run in models.runs if run.trace.sweeps and given.name in (None, run.model)]
    if given.compare is None:
        if not done:
            models.get(given.name)  # a name that is not there is said first
            raise OptionError(NOTHING_YET)
        return done[-1:]
    names = list(given.compare)
    if names and given.file is None and Path(names[-1]).suffix.lower() in (".json", *PICTURES):
        given.file = names.pop()
    runs = [_of_variable(name, variables, models) for name in names] or done[-2:]
    if len(runs) < 2:
        raise OptionError("--compare needs two generations; store each with %%airllm_generate -o NAME and name both, "
                          "or generate twice and name none")  # fmt: skip
    return runs


def _of_variable(name: str, variables: Mapping[str, Any], models: Registry) -> Run:
    trace = getattr(variables.get(name), "trace", None)
    if not isinstance(trace, Trace) or not trace.sweeps:
        raise OptionError(f"--compare {name}: no generation's result is in this variable (%%airllm_generate -o {name})")
    titles = [run.title for run in models.runs if run.trace is trace]
    return Run(name, " · ".join([name, *titles[-1:]]), trace)


def show(runs: Sequence[Run]) -> None:
    """The picture and the figures."""
    display(Still(_picture(runs)))
    for run in runs:
        if memory := Still.of_memory(run.trace):
            display(memory)
        if experts := Still.of_experts(run.trace, run.title):
            display(experts)
        display(cards.trace_card(run.trace, run.title if len(runs) > 1 else ""))


def save(runs: Sequence[Run], path: Path) -> str:
    """Write the record (``.json``) or the picture; returns what to say.

    Raises
    ------
    OptionError
        If the name says no format, or the file cannot be written.
    """
    try:
        if path.suffix.lower() == ".json":
            if len(runs) > 1:
                raise OptionError("a .json file holds one generation; leave out --compare, or name a .png or .svg file")
            runs[0].trace.to_chrome(path)
            return f"wrote {path}; {CHROME}"
        if path.suffix.lower() in PICTURES:
            _picture(runs).save(path)
            return f"wrote {path}"
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror}); name another place") from None
    raise OptionError(f"{path}: name a file that ends in .json, {' or '.join(PICTURES)}")


def _picture(runs: Sequence[Run]) -> Any:
    from .sweep_figures import compare, overlap

    views = [last_sweep(run.trace) for run in runs]
    if len(runs) == 1:
        return overlap(views[0], runs[0].title, runs[0].trace.plan)
    return compare(views, [run.title for run in runs])
