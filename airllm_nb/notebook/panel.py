"""``%airllm_panel``: pick a model, a compression and budgets, see the plan at once, load with a click.

Whatever is picked stands below as the magic line that does the same, so that a notebook can be run again.
"""

from __future__ import annotations

import html
import shlex
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from ..config import GiB, LoadOptions
from ..errors import AirLLMError, in_flags
from ..preview import Preview
from .cached import cached_models
from .dashboard import close, image_html, view_of
from .loading import Loading
from .progress_line import ProgressLine
from .still import plan_picture

NONE, STEP = "none", 0.25
_WIDE = {"description_width": "110px"}


class Panel:
    """Widgets that write a ``%airllm_load`` line.

    Parameters
    ----------
    model
        Picked to begin with; may be empty.
    load
        Loads with a model, options and a progress line; called by the Load button.
    """

    def __init__(self, model: str, load: Callable[[str, LoadOptions, ProgressLine], None]):
        self._load, self._preview, self._of = load, None, ()  # type: Any, Preview | None, tuple[str, ...]
        self._setting = False
        self._build(model)

    def show(self) -> None:
        """Display it, and the plan of what is picked."""
        self._handle = display(
            view_of(self._root, f"a panel of widgets; as a line: {self.line}"), raw=True, display_id=True
        )
        self._changed(None)

    @property
    def line(self) -> str:
        """The magic line that loads what is picked."""
        words = ["%airllm_load", _quoted(self._model.value or "MODEL")]
        if self._compression.value != NONE:
            words += ["--compression", self._compression.value]
        for name, slider in (("--vram", self._vram), ("--ram", self._ram)):
            if slider.value != slider.max:
                words += [name, f"{slider.value:g}GiB"]
        return " ".join(words)

    # --- widgets

    def _build(self, model: str) -> None:
        self._model = widgets.Combobox(
            value=model, options=tuple(cached_models()), placeholder="Hub id, folder or .gguf file",
            description="Model", continuous_update=False, style=_WIDE, layout={"width": "auto"},
        )  # fmt: skip
        self._compression = widgets.Dropdown(
            options=[NONE, "4bit", "8bit"], description="Compression", style=_WIDE, layout={"width": "220px"}
        )
        self._vram, self._ram = (
            widgets.FloatSlider(
                value=1.0, min=STEP, max=1.0, step=STEP, description=name, readout_format=".2f", disabled=True,
                continuous_update=False, style=_WIDE, layout={"width": "auto"},
            )
            for name in ("VRAM, GiB", "RAM, GiB")
        )  # fmt: skip
        self._button = widgets.Button(
            description="Load", icon="play", button_style="primary", tooltip="Load this model"
        )
        self._line, self._said, self._picture = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._root = widgets.VBox(
            [
                self._model,
                self._compression,
                self._vram,
                self._ram,
                self._button,
                self._line,
                self._said,
                self._picture,
            ],
            layout={"max_width": "1000px"},
        )
        self._root.add_class("airllm-panel")
        for control in (self._model, self._compression, self._vram, self._ram):
            control.observe(self._changed, names="value")
        self._button.on_click(self._clicked)

    def _changed(self, change: Any) -> None:
        """Something was picked: plan again, from headers only."""
        if self._setting:
            return
        self._line.value = f"the same as a line: <code>{html.escape(self.line)}</code>"
        self._button.disabled = not self._model.value
        if not self._model.value:
            self._say("name a model to see its plan")
            return
        try:
            plan = self._plan()
        except (AirLLMError, OSError, ValueError) as error:
            self._say(in_flags(str(error)))
            self._picture.value = ""
            return
        self._say(str(plan).splitlines()[-1])
        picture = plan_picture(plan)
        self._picture.value = image_html(picture.png(), picture.alt)

    def _plan(self) -> Any:
        picked = (self._model.value, self._compression.value)
        if self._preview is None or picked != self._of:
            self._say("looking at the model …")
            self._preview = None
            options = LoadOptions.create(compression=None if picked[1] == NONE else picked[1])
            self._preview, self._of = (
                Loading(lambda report: Preview(picked[0], options, progress=report)).result(
                    ProgressLine(_Said(self._say))
                ),
                picked,
            )
            self._limit_sliders(self._preview)
        sizes = [None if slider.value == slider.max else int(slider.value * GiB) for slider in (self._vram, self._ram)]
        most = [int(slider.max * GiB) for slider in (self._vram, self._ram)]
        vram, ram = (size or limit for size, limit in zip(sizes, most, strict=True))
        return self._preview.plan(vram if self._preview.has_device else None, ram)

    def _limit_sliders(self, preview: Preview) -> None:
        """To what is free; where they stood at the end they stay at the end: that is "what is free"."""
        self._setting = True
        try:
            for slider, budget, there in zip(
                (self._vram, self._ram), preview.budgets, (preview.has_device, True), strict=True
            ):
                limit = max(budget // int(STEP * GiB) * STEP, STEP)
                at_end = slider.disabled or slider.value == slider.max
                slider.max, slider.disabled = limit, not there
                slider.value = limit if at_end else min(slider.value, limit)
        finally:
            self._setting = False

    def _clicked(self, _: Any) -> None:
        self._button.disabled = True
        options = LoadOptions.create(
            compression=None if self._compression.value == NONE else self._compression.value,
            **{name: f"{slider.value:g}GiB" for name, slider in (("vram_budget", self._vram), ("ram_budget", self._ram))
               if slider.value != slider.max},
        )  # fmt: skip
        line, bar = self.line, ProgressLine(_Said(self._say))
        try:
            self._load(self._model.value, options, bar)
        except (AirLLMError, OSError, ValueError) as error:
            self._say(in_flags(str(error)))
            self._button.disabled = False
            return
        text = f"loaded with: {line}"
        self._handle.update(
            {"text/plain": text, "text/html": f"loaded with: <code>{html.escape(line)}</code>"}, raw=True
        )
        self.close()

    def _say(self, text: str) -> None:
        self._said.value = html.escape(text)

    def close(self) -> None:
        """Free the widgets."""
        for widget in (*self._root.children, self._root):
            close(widget)


class _Said:
    """A progress line inside the panel."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def draw(self, text: str) -> None:
        self._say(text)

    def erase(self) -> None:
        self._say("")

    def replace(self, shown: Any) -> None:
        self.erase()
        display(shown)


def _quoted(text: str) -> str:
    return text if shlex.quote(text) == text else f'"{text}"'
