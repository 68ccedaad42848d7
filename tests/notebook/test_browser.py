"""The notebook as a person sees it: JupyterLab in a real browser, a real model, real clicks while a cell runs."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab as laboratory
import nbformat
import pytest
from lab import ROOT, Kernel, Lab, Server

# Other kernels under the same JupyterLab: Kaggle's, and one that answers clicks in a thread of its own (a subshell).
KERNELS = {"kaggle": "6.17.1 8.1.5", "7.3": "7.3.0 8.1.9"}
# Some of it in each tier.
LOAD = '%airllm_load "{model}" --vram 150MiB --ram 160MiB'
SETUP = '%load_ext airllm_nb\nimport os\n\nmodel = os.environ["AIRLLM_NB_DEMO_MODEL"]'
# Too long to end before it is stopped, also where pictures are drawn seldom because drawing is slow.
LONG = "%%airllm_generate --chat -n 1500\nTell me a long story about a river and the people who live beside it."
SHORT = "%%airllm_generate --chat -n 12\nWhat is the capital of France?"
LANES = ("disk read", "host to device", "compute", "waits")
# JupyterLab shows these in place of a widget that it cannot show.
BROKEN = re.compile(r"Error displaying widget|model not found|Loading widget|javascript error", re.IGNORECASE)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Iterator[Server]:
    """JupyterLab with a kernel of the newest packages and some of others, which know where SmolLM2 is."""
    if reason := laboratory.missing():
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("notebooks")
    environment = {"AIRLLM_NB_CACHE": str(cache)}
    kernels = {"python3": Kernel((), environment)}
    kernels |= {name: Kernel([_overlay(name)], environment) for name in KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRLLM_NB_DEMO_MODEL", str(smollm2_folder))  # kernels inherit what the server has
        with laboratory.serve(folder, kernels) as running:
            yield running


@pytest.fixture(scope="module")
def opened(server: Server) -> Iterator[Lab]:
    """One page for all tests."""
    with laboratory.browse() as page:
        yield Lab(page, server)


@pytest.fixture
def lab(opened: Lab) -> Iterator[Lab]:
    """The page; what it reports as an error fails the test that was running."""
    yield opened
    assert opened.take_errors() == []


@pytest.fixture
def loaded(lab: Lab) -> Lab:
    """A notebook with the model loaded, made once; later tests go on at its end."""
    if not (lab.server.folder / "live.ipynb").exists():
        _load(lab, "live.ipynb", "python3")
    return lab


def _load(lab: Lab, name: str, kernel: str) -> int:
    """A new notebook that has loaded SmolLM2; returns the cell's index."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SETUP)])
    notebook.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(notebook, lab.server.folder / name)
    lab.open(name)
    lab.start(0)
    lab.wait_end(0)
    return lab.run(LOAD)


def _live(lab: Lab, source: str = LONG) -> tuple[int, Any]:
    """Start a generation; returns when both pictures are there and text has come: the cell's index and itself."""
    index = lab.write(source)
    lab.start(index)
    cell = lab.cell(index)
    for name in ("vram", "overlap"):
        cell.locator(f".airllm-{name} img").wait_for(timeout=120_000)
    ends = time.monotonic() + 120
    while " " not in _text(cell).inner_text():  # asked anew each time: outputs are drawn again as they come
        assert time.monotonic() < ends, "no text came"
        lab.page.wait_for_timeout(50)
    assert lab.is_running(index)
    return index, cell


def _text(cell: Any) -> Any:
    """Where the answer is written: between the bar and the pictures."""
    return cell.locator(".jp-OutputArea-output").nth(1)


def _stop(lab: Lab, index: int, how: Any) -> None:
    """Stop the cell and wait for its end, which is a second where nothing else runs."""
    how()
    lab.wait_end(index)


def _assert_static(lab: Lab, index: int) -> Any:
    """What a generation leaves: Markdown, a picture and a table; nothing that needs a kernel. Returns the cell."""
    cell = lab.cell(index)
    picture = cell.locator(".jp-RenderedImage img")
    picture.wait_for()
    outputs = lab.outputs(index)
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"text/markdown", "image/png", "text/html"} <= kinds, kinds
    assert "application/vnd.jupyter.widget-view+json" not in kinds
    assert not [output for output in outputs if output["output_type"] in ("error", "stream")], outputs
    assert len(json.dumps(outputs)) < 300_000
    assert cell.locator(".jp-OutputArea").locator("button, .airllm-dashboard").count() == 0
    assert not BROKEN.search(cell.inner_text())
    _assert_drawn(lab, picture.last)
    said = [output["data"]["text/plain"] for output in outputs if "image/png" in output.get("data", {})]
    assert said and all(re.search(r"\d", "".join(text)) for text in said), "a picture needs its numbers in words"
    return cell


def _assert_drawn(lab: Lab, img: Any) -> None:
    """A picture with something on it: several colours, over a good part of it."""
    shown = lab.picture(img).convert("RGB")
    colours = sorted(shown.getcolors(shown.width * shown.height), reverse=True)
    inked = 1 - colours[0][0] / (shown.width * shown.height)
    assert shown.width > 400 and len(colours) > 20 and inked > 0.05, (shown.size, len(colours), inked)


# ---- a person's ways -------------------------------------------------------------------------------------------------


def test_load_shows_what_goes_where(loaded: Lab) -> None:
    cell = loaded.cell(1)
    picture = cell.locator("img")
    picture.wait_for()
    _assert_drawn(loaded, picture)
    described = "".join(o["data"]["text/plain"] for o in loaded.outputs(1) if "image/png" in o["data"])
    assert all(re.search(rf"{tier} \d", described) for tier in ("GPU", "RAM", "disk")), described
    said = cell.inner_text()
    assert "is loaded as" in said and "SmolLM2" in said
    assert cell.locator("table").count() >= 1
    loaded.screen("load", cell, gallery=True)


def test_a_generation_is_seen_and_stopped(loaded: Lab) -> None:
    index, cell = _live(loaded)
    root = cell.locator(".airllm-dashboard")
    header, numbers = cell.locator(".airllm-header"), cell.locator(".airllm-numbers")
    assert re.search(r"token \d+ of 1500", header.inner_text()), header.inner_text()
    assert "tok/s" in numbers.inner_text()
    assert root.locator(".airllm-sweep").is_visible()
    stop = root.locator("button.airllm-stop")
    assert stop.get_attribute("title") and "Stop" in stop.inner_text()

    before = {name: cell.locator(f".airllm-{name} img").get_attribute("src") for name in ("vram", "overlap")}
    text, told = _text(cell).inner_text(), header.inner_text()
    for name, src in before.items():
        changed = "([el, src]) => el.querySelector('img').src !== src"
        loaded.until(changed, [cell.locator(f".airllm-{name}").element_handle(), src], 90)
        _assert_drawn(loaded, cell.locator(f".airllm-{name} img"))
    loaded.until("([el, n]) => el.innerText.length > n", [_text(cell).element_handle(), len(text)])
    assert header.inner_text() != told
    alt = cell.locator(".airllm-overlap img").get_attribute("alt")
    assert [lane for lane in LANES if lane not in alt] == [], alt
    assert re.search(r"\d+ MiB|\d+ GiB", cell.locator(".airllm-vram img").get_attribute("alt"))
    loaded.screen("live", cell, gallery=True)
    assert loaded.is_running(index)

    partial = _text(cell).inner_text()
    _stop(loaded, index, stop.click)
    cell = _assert_static(loaded, index)
    assert "stopped by you" in cell.inner_text()
    answer = next(o["data"]["text/plain"] for o in loaded.outputs(index) if "text/markdown" in o.get("data", {}))
    assert "".join(answer).startswith(partial.strip()[:40])
    loaded.screen("stopped", cell, gallery=True)


def test_it_ends_by_itself(loaded: Lab) -> None:
    index = loaded.run(SHORT)
    cell = _assert_static(loaded, index)
    assert "Paris" in cell.inner_text()
    loaded.screen("ended", cell)
    loaded.screen("overlap", cell.locator(".jp-RenderedImage img").first, gallery=True)


def test_the_interrupt_button_does_the_same(loaded: Lab) -> None:
    index, _ = _live(loaded)
    _stop(loaded, index, loaded.interrupt)
    assert "stopped by you" in _assert_static(loaded, index).inner_text()
    assert "Paris" in loaded.cell(loaded.run(SHORT)).inner_text()


def test_a_second_click_is_harmless(loaded: Lab) -> None:
    index, cell = _live(loaded)
    twice = "el => { el.click(); el.click(); }"
    _stop(loaded, index, lambda: cell.locator("button.airllm-stop").evaluate(twice))
    assert "stopped by you" in _assert_static(loaded, index).inner_text()
    assert "Paris" in loaded.cell(loaded.run(SHORT)).inner_text()


def test_a_dark_theme_and_a_narrow_window(loaded: Lab) -> None:
    index, cell = _live(loaded)
    fits = "el => [el, ...el.querySelectorAll('*')].filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)"
    fits += ".map(e => `${e.tagName}.${e.className}: ${e.scrollWidth} > ${e.clientWidth}`)"
    try:
        loaded.theme("JupyterLab Dark")
        loaded.screen("live-dark", cell, gallery=True)
        loaded.resize(800)
        assert cell.locator(".airllm-dashboard").evaluate(fits) == []
        loaded.screen("live-dark-narrow", cell)
        loaded.theme("JupyterLab Light")
        loaded.screen("live-narrow", cell, gallery=True)
        _stop(loaded, index, cell.locator("button.airllm-stop").click)
        cell = _assert_static(loaded, index)
        assert cell.locator(".jp-OutputArea").evaluate(fits) == []
        loaded.screen("ended-narrow", cell)
    finally:
        loaded.theme("JupyterLab Light")
        loaded.resize()


def test_a_saved_notebook_needs_no_kernel(loaded: Lab) -> None:
    index = loaded.run(SHORT)
    path = loaded.save()
    saved = nbformat.read(path, as_version=4)
    nbformat.validate(saved)
    cells = [len(json.dumps(cell.outputs)) for cell in saved.cells if cell.source.startswith("%%airllm_generate")]
    assert cells and max(cells) < 300_000
    loaded.open("live.ipynb", kernel=False)
    _assert_static(loaded, index)
    body = loaded.page.locator(".jp-Notebook")
    assert not BROKEN.search(body.inner_text())
    assert "Paris" in loaded.cell(index).inner_text()
    _assert_drawn(loaded, loaded.cell(1).locator("img"))
    loaded.screen("without-kernel", loaded.cell(index), gallery=True)


def test_a_panel_plans_and_loads(lab: Lab) -> None:
    _load(lab, "panel.ipynb", "python3")
    index = lab.write("%airllm_panel {model}")
    lab.start(index)
    lab.wait_end(index)
    cell = lab.cell(index)
    root = cell.locator(".airllm-panel")
    root.locator("img").wait_for(timeout=180_000)
    for name in ("Model", "Compression", "VRAM, GiB", "RAM, GiB"):
        assert root.get_by_label(name, exact=True).count() == 1, name
    before = root.locator("img").get_attribute("src")
    root.get_by_label("Compression").select_option("8bit")
    lab.until("([el, src]) => (el.querySelector('img') || {src: src}).src !== src", [root.element_handle(), before], 60)
    assert "--compression 8bit" in root.locator("code").inner_text()
    lab.screen("panel", cell)
    root.get_by_label("Compression").select_option("none")
    root.get_by_role("button", name="Load").click()
    cell.locator("table").wait_for(timeout=180_000)
    said = cell.inner_text()
    assert "loaded with: %airllm_load" in said and "is loaded as" in said
    _assert_drawn(lab, cell.locator(".jp-RenderedImage img"))
    assert cell.locator(".airllm-panel").count() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_stop_in_other_kernels(lab: Lab, kernel: str) -> None:
    if not (_overlay(kernel) / "installed").exists():
        pytest.skip(f"the kernel of {kernel} is not installed: run `make kernels`")
    _load(lab, f"{kernel}.ipynb", kernel)
    versions = lab.run("import ipykernel, ipywidgets; print(ipykernel.__version__, ipywidgets.__version__)")
    assert lab.stream(versions).strip() == KERNELS[kernel]
    index, cell = _live(lab)
    _stop(lab, index, cell.locator("button.airllm-stop").click)
    assert "stopped by you" in _assert_static(lab, index).inner_text()
    lab.screen(f"stopped-{kernel}", lab.cell(index))


def _overlay(kernel: str) -> Path:
    return ROOT / "build" / f"kernel-{kernel}"


def test_the_gallery_is_whole() -> None:
    shown = re.findall(r"\(gallery/([\w-]+\.png)\)", (ROOT / "docs" / "GALLERY.md").read_text(encoding="utf-8"))
    files = {path.name: path.stat().st_size for path in (ROOT / "docs" / "gallery").iterdir()}
    assert sorted(files) == sorted(set(shown)) and max(files.values()) < 150_000, files
