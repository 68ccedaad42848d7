"""The panel: what is picked becomes a plan at once, and a magic line that does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import pytest
from IPython.testing.globalipapp import start_ipython

from airllm_nb.config import LoadOptions
from airllm_nb.engine import plan_model
from airllm_nb.errors import BudgetError, SourceError
from airllm_nb.notebook.cached import cached_models
from airllm_nb.notebook.panel import Panel
from airllm_nb.preview import Preview

Loaded = list[tuple[str, LoadOptions]]


@pytest.fixture(scope="module", autouse=True)
def shell() -> Any:
    return start_ipython()


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> str:
    return str(tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=6))


@pytest.fixture
def loaded() -> Loaded:
    return []


@pytest.fixture
def panel(model: str, loaded: Loaded) -> Iterator[Panel]:
    made = Panel(model, lambda name, options, bar: loaded.append((name, options)))
    made.show()
    yield made
    made.close()


def test_it_shows_the_plan_of_what_is_picked(panel: Panel, model: str) -> None:
    assert "predicted" in panel._said.value and "<img" in panel._picture.value and "alt=" in panel._picture.value
    assert panel.line == f"%airllm_load {model}" and model in panel._line.value
    before = panel._picture.value
    panel._compression.value = "4bit"
    assert panel.line.endswith("--compression 4bit") and panel._picture.value != before
    assert all(control.description for control in (panel._model, panel._compression, panel._vram, panel._ram))


def test_load_hands_over_what_is_picked_and_leaves_the_line(panel: Panel, loaded: Loaded, model: str) -> None:
    panel._compression.value = "8bit"
    panel._ram.value = panel._ram.max - 0.5
    asked, line = panel._ram.value, panel.line
    assert f"--ram {asked:g}GiB" in line
    panel._button.click()
    ((name, options),) = loaded
    assert (name, options.compression, options.ram_budget) == (model, "8bit", int(asked * 2**30))
    assert options.vram_budget is None, "what was not touched is what is free"


def test_a_wrong_name_is_said_and_repaired(panel: Panel, model: str) -> None:
    panel._model.value = "/no/such/folder"
    assert "/no/such/folder" in panel._said.value and panel._picture.value == ""
    panel._model.value = ""
    assert panel._button.disabled
    panel._model.value = model
    assert "predicted" in panel._said.value and not panel._button.disabled


def test_an_error_while_loading_is_said_and_the_panel_stays(model: str) -> None:
    def refuse(*_: Any) -> None:
        raise SourceError("the disk is full; free 3 GiB")

    panel = Panel(model, refuse)
    panel.show()
    panel._button.click()
    assert "the disk is full" in panel._said.value and not panel._button.disabled
    panel.close()


def test_it_leaves_no_widgets(model: str) -> None:
    registry = getattr(ipywidgets.widgets.widget, "_instances", None)
    if registry is None:
        registry = ipywidgets.Widget.widgets
    before = len(registry)
    panel = Panel(model, lambda *_: None)
    panel.show()
    assert len(registry) > before
    panel._button.click()
    assert len(registry) == before


def test_a_preview_plans_as_loading_would(model: str) -> None:
    options = LoadOptions.create(vram_budget="40MiB", ram_budget="1GiB")
    preview = Preview(model, options)
    for vram in (8 << 20, 12 << 20, 40 << 20):
        there = plan_model(model, LoadOptions.create(vram_budget=vram, ram_budget="1GiB"))
        assert preview.plan(vram).tiers == there.tiers
    with pytest.raises(BudgetError):
        preview.plan(1 << 16)
    assert preview.plan(40 << 20).tier_bytes("gpu") > 0, "usable after a refusal"


def test_models_of_the_hubs_cache(tmp_path: Path) -> None:
    for name in ("models--Qwen--Qwen2.5-7B", "models--gpt2", "datasets--x--y", "models--a--empty"):
        folder = tmp_path / name / "snapshots" / "abc"
        folder.mkdir(parents=True)
        if not name.endswith("empty"):
            (folder / "config.json").write_text("{}")
    assert cached_models(tmp_path) == ["Qwen/Qwen2.5-7B", "gpt2"]
    assert cached_models(tmp_path / "none") == []
