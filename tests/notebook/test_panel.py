"""The panel: what is picked becomes a plan at once, and a magic line that does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import pytest
from IPython.testing.globalipapp import start_ipython

from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import plan_model
from airllm_nb.engine.preview import Preview
from airllm_nb.errors import BudgetError, SourceError
from airllm_nb.notebook.panel import Panel, cached_models

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
    made = Panel(lambda name, options, bar: loaded.append((name, options)) or [], model)
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
    panel._ram.value = 1.5
    assert "--ram 1.5GiB" in panel.line and "--vram" not in panel.line
    panel._button.click()
    ((name, options),) = loaded
    assert (name, options.compression, options.ram_budget) == (model, "8bit", 3 << 29)
    assert options.vram_budget is None, "what was not touched is what is free"


def test_it_begins_with_the_defaults_of_the_session(model: str) -> None:
    panel = Panel(lambda *_: [], model, vram="", ram="512MiB", name="big")
    assert panel.line == f"%airllm_load {model} --ram 0.5GiB --name big"
    assert panel.options.ram_budget == 512 << 20
    panel.close()


def test_an_interrupt_is_said(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("airllm_nb.notebook.panel.Preview.plan", interrupt)
    panel._compression.value = "4bit"
    assert panel._said.value == "interrupted" and panel._picture.value == ""


def test_a_wrong_name_is_said_and_repaired(panel: Panel, model: str) -> None:
    panel._model.value = "/no/such/folder"
    assert "/no/such/folder" in panel._said.value and panel._picture.value == ""
    panel._model.value = ""
    assert panel._button.disabled
    panel._model.value = model
    assert "predicted" in panel._said.value and not panel._button.disabled


@pytest.mark.parametrize("error", [SourceError("the disk is full"), RuntimeError("the disk is full")], ids=str)
def test_an_error_while_loading_is_said_and_the_panel_stays(model: str, error: Exception) -> None:
    def refuse(*_: Any) -> None:
        raise error

    panel = Panel(refuse, model)
    panel.show()
    panel._button.click()
    assert "the disk is full" in panel._said.value and not panel._button.disabled
    panel.close()


def test_it_leaves_no_widgets(model: str) -> None:
    registry = getattr(ipywidgets.widgets.widget, "_instances", None)
    if registry is None:
        registry = ipywidgets.Widget.widgets
    before = len(registry)
    panel = Panel(lambda *_: [], model)
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
    assert preview.plan().tiers == plan_model(model, options).tiers, "usable after a refusal"


def test_models_of_the_hubs_cache(tmp_path: Path) -> None:
    for name in ("models--Qwen--Qwen2.5-7B", "models--gpt2", "datasets--x--y", "models--a--empty"):
        folder = tmp_path / name / "snapshots" / "abc"
        folder.mkdir(parents=True)
        if not name.endswith("empty"):
            (folder / "config.json").write_text("{}")
    assert cached_models(tmp_path) == ["Qwen/Qwen2.5-7B", "gpt2"]
    assert cached_models(tmp_path / "none") == []
