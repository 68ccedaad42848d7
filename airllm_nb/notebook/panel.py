"""``%airllm_panel``: pick a model, a compression and budgets, see the plan at once, load with a click.

Whatever is picked stands below as the magic line that does the same, so that a notebook can be run again.
"""

from __future__ import annotations

import contextlib
import html
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from ..config import COMPRESSIONS, GiB, LoadOptions, parse_bytes
from ..engine.preview import Preview
from ..errors import AirLLMError
from ..flags import in_flags
from .cards import Line
from .dashboard import WIDTH, close, image_html, view_of
from .loading import Loading
from .memory_figures import plan_bar
from .progress_line import ProgressLine, Sink

log = logging.getLogger(__name__)

NONE = "none"
_EMPTY = {"text/plain": ""}
_WIDE = {"description_width": "110px"}
_FREE = "0 is what is free"


class Panel:
    """Widgets that write a ``%airllm_load`` line.

    Parameters
    ----------
    load
        Loads with a model, options and a progress line, and returns what to show of it; called by the Load button.
    model, vram, ram
        Picked to begin with; budgets as ``"4GiB"``. May be empty.
    name
        The name that ``load`` gives the model, if it is not the usual one.
    """

    def __init__(
        self, load: Callable[[str, LoadOptions, ProgressLine], Sequence[Any]], model: str = "", vram: str = "",
        ram: str = "", name: str = "",
    ):  # fmt: skip
        self._load, self._name = load, name
        self._preview, self._of = None, ()  # type: Preview | None, tuple[str, ...]
        self._build(model, vram, ram)

    def show(self) -> None:
        """Display it, and the plan of what is picked."""
        shown = view_of(self._root, f"a panel of widgets; as a line: {self.line}")
        # What a callback displays has no cell: it is put into these places.
        self._places = [display(data, raw=True, display_id=True) for data in (shown, _EMPTY, _EMPTY)]
        self._changed(None)

    @property
    def line(self) -> str:
        """The magic line that loads what is picked."""
        words = ["%airllm_load", _quoted(self._model.value or "MODEL")]
        if self._compression.value != NONE:
            words += ["--compression", self._compression.value]
        for flag, field in (("--vram", self._vram), ("--ram", self._ram)):
            words += [flag, f"{field.value:g}GiB"] if field.value else []
        return " ".join(words + (["--name", self._name] if self._name else []))

    @property
    def options(self) -> LoadOptions:
        """The options of the line."""
        return LoadOptions.create(
            compression=None if self._compression.value == NONE else self._compression.value,
            vram_budget=_bytes(self._vram), ram_budget=_bytes(self._ram),
        )  # fmt: skip

    def close(self) -> None:
        """Free the widgets."""
        for widget in (*self._root.children, self._root):
            close(widget)

    # --- widgets

    def _build(self, model: str, vram: str, ram: str) -> None:
        self._model = widgets.Combobox(
            value=model, options=tuple(cached_models()), placeholder="Hub id, folder or .gguf file",
            description="Model", continuous_update=False, style=_WIDE, layout={"width": "auto"},
        )  # fmt: skip
        self._compression = widgets.Dropdown(options=[NONE, *COMPRESSIONS], description="Compression", style=_WIDE)
        # Fields, not sliders: a slider has no label that a screen reader finds.
        self._vram, self._ram = (
            widgets.BoundedFloatText(
                value=(parse_bytes(given or None) or 0) / GiB, max=65_536.0, step=0.25, style=_WIDE,
                description=f"{name}, GiB", tooltip=f"{name} budget in GiB; {_FREE}",
            )
            for name, given in (("VRAM", vram), ("RAM", ram))
        )  # fmt: skip
        self._button = widgets.Button(description="Load", icon="play", button_style="primary")
        self._button.tooltip = "Load this model under these budgets"
        self._line, self._said, self._picture = widgets.HTML(), widgets.HTML(), widgets.HTML()
        controls = [self._model, self._compression, self._vram, self._ram]
        self._root = widgets.VBox(
            [*controls, self._button, self._line, self._said, self._picture], layout={"max_width": WIDTH}
        )
        self._root.add_class("airllm-panel")
        for control in controls:
            control.observe(self._changed, names="value")
        self._button.on_click(self._clicked)

    def _changed(self, _: Any) -> None:
        """Something was picked: plan again, from headers only."""
        self._line.value = f"the same as a line: <code>{html.escape(self.line)}</code>"
        self._button.disabled = not self._model.value
        self._picture.value = ""
        if not self._model.value:
            self._say("name a model to see its plan")
            return
        with self._saying_what_fails():
            plan = self._plan()
            picture = plan_bar(plan)
            self._picture.value = image_html(picture.png(), picture.alt)
            said = [f"{label} {text}" for label, text in plan.rows if label in ("fits", "predicted")]
            self._say(" · ".join([*said, f"budgets: {_FREE}"]))

    def _plan(self) -> Any:
        picked = (self._model.value, self._compression.value)
        if self._preview is None or picked != self._of:
            self._preview = None
            options = LoadOptions.create(compression=self.options.compression)
            looking = Loading(lambda report: Preview(picked[0], options, progress=report))
            self._preview, self._of = looking.result(ProgressLine(_Said(self._say))), picked
        self._vram.disabled = not self._preview.has_device
        vram = _bytes(self._vram) if self._preview.has_device else None
        return self._preview.plan(vram, _bytes(self._ram))

    def _clicked(self, _: Any) -> None:
        self._button.disabled = True
        with self._saying_what_fails():
            shown = self._load(self._model.value, self.options, ProgressLine(_Said(self._say)))
            for place, what in zip(self._places, [Line(f"loaded with: {self.line}"), *shown], strict=False):
                place.update(what)
            self.close()
            return
        self._button.disabled = False

    @contextlib.contextmanager
    def _saying_what_fails(self) -> Iterator[None]:
        """An error in a callback has no cell to be shown in."""
        try:
            yield
        except KeyboardInterrupt:
            self._say("interrupted")
        except AirLLMError as error:
            self._say(in_flags(str(error)))
        except Exception as error:
            log.debug("in a panel", exc_info=True)
            self._say(f"{type(error).__name__}: {error}")

    def _say(self, text: str) -> None:
        self._said.value = html.escape(text)


class _Said(Sink):
    """A progress line inside the panel."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def draw(self, text: str) -> None:
        self._say(text)

    def replace(self, shown: Any) -> None:
        self._say(repr(shown))


def cached_models(folder: Path | None = None) -> list[str]:
    """Hub ids of the cached repositories that have a config, ``"org/name"``, sorted."""
    if folder is None:
        from huggingface_hub import constants

        folder = Path(constants.HF_HUB_CACHE)
    found = {path.parents[2].name for path in folder.glob("models--*/snapshots/*/config.json")}
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in found)


def _bytes(field: Any) -> int | None:
    return int(field.value * GiB) or None


def _quoted(text: str) -> str:
    return text if shlex.quote(text) == text else f'"{text}"'
