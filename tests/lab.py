"""A real JupyterLab in a real, headless browser: what the tests marked ``browser`` drive.

``serve`` (of lab_server.py) starts the server, ``browse`` opens the machine's Chromium, ``Lab`` is the few things a
person does in a notebook. Every wait is for a condition, with a deadline.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab_server import ROOT, Kernel, Server, serve

__all__ = ["ROOT", "Kernel", "Lab", "Server", "browse", "chromium", "missing", "serve"]

SCREENS = ROOT / "build" / "screens"
# docs/gallery/ is made by `AIRLLM_NB_GALLERY=1 make test PYTEST_ARGS="-m browser"`.
GALLERY = ROOT / "docs" / "gallery" if os.environ.get("AIRLLM_NB_GALLERY") else None
# Tall: an element is only seen whole where it fits into the window.
WIDTH, HEIGHT = 1280, 1700
FLAGS = [
    "--no-sandbox",  # needed where tests run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NOTEBOOK = "const nb = window.jupyterapp.shell.currentWidget;"


# ---- what the machine must have --------------------------------------------------------------------------------------


def chromium() -> str | None:
    """The browser's program."""
    given = os.environ.get("AIRLLM_NB_CHROMIUM")
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    return given or next(filter(None, found), None)


def missing() -> str | None:
    """Why there can be no browser test on this machine, and what to install; ``None`` where there can."""
    absent = [name for name in ("playwright", "jupyterlab") if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; pip install -e '.[browser]'"
    if chromium() is None:
        return "no chromium or google-chrome; as root: apt-get install chromium, or name one in AIRLLM_NB_CHROMIUM"
    return None


# ---- the browser -----------------------------------------------------------------------------------------------------


@contextmanager
def browse(width: int = WIDTH, height: int = HEIGHT) -> Iterator[Any]:
    """A page of a new, empty browser profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


class Lab:
    """What a person does in JupyterLab, through its own commands and its document model.

    Attributes
    ----------
    errors
        Everything that the page has reported as an error since they were last looked at.
    """

    def __init__(self, page: Any, server: Server):
        self.page, self.server = page, server
        page.set_default_timeout(180_000)  # machines that test are busy; what comes, comes at once elsewhere
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(f"page: {error}"))
        page.on("console", self._said)

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"console: {message.text} {message.location.get('url', '')}")

    def open(self, notebook: str, *, kernel: bool = True) -> None:
        """Load the page anew with this notebook; without a kernel as by "Open With: Notebook (no kernel)"."""
        place = f"/tree/{notebook}" if kernel else ""
        self.page.goto(f"{self.server.url}/lab{place}?reset&token={self.server.token}")
        self.page.wait_for_function("() => window.jupyterapp !== undefined", timeout=180_000)
        self.page.evaluate("() => window.jupyterapp.restored.then(() => true)")
        if not kernel:
            preference = {"canStart": False, "shouldStart": False}
            self.command("docmanager:open", path=notebook, factory="Notebook", kernelPreference=preference)
        state = "nb.sessionContext.session?.kernel?.status === 'idle'" if kernel else "nb.sessionContext"
        self.page.wait_for_function(
            f"() => {{ {NOTEBOOK} return !!nb?.content?.model && !!nb.context.isReady && !!({state}); }}",
            timeout=180_000,
        )
        if kernel:
            self._do("await nb.sessionContext.ready; await nb.sessionContext.session.kernel.info")
        self._do("window.jupyterapp.shell.collapseLeft();")

    def _do(self, body: str, argument: Any = None) -> Any:
        return self.page.evaluate(f"async argument => {{ {NOTEBOOK} {body} }}", argument)

    def command(self, name: str, **arguments: Any) -> None:
        """Start one of JupyterLab's commands; does not wait for it, since running a cell ends with the cell."""
        self.page.evaluate("([n, a]) => { window.jupyterapp.commands.execute(n, a); }", [name, arguments])

    # ---- cells

    def write(self, source: str) -> int:
        """Add a cell at the end; returns its index."""
        add = "const shared = nb.content.model.sharedModel, at = shared.cells.length;"
        add += "shared.insertCell(at, {cell_type: 'code', source: argument}); return at;"
        index = int(self._do(add, source))
        self.cell(index).wait_for()
        return index

    def start(self, index: int) -> None:
        """Run a cell; returns at once."""
        self._do("nb.content.deselectAll(); nb.content.activeCellIndex = argument;", index)
        self.command("notebook:run-cell")

    def run(self, source: str, seconds: float = 180) -> int:
        """Write a cell, run it and wait for its end."""
        index = self.write(source)
        self.start(index)
        self.wait_end(index, seconds)
        return index

    def is_running(self, index: int) -> bool:
        """Whether the prompt shows ``[*]``. The kernel's status says idle during a cell, with ipykernel 7."""
        return "*" in (self.cell(index).locator(".jp-InputPrompt").text_content() or "")

    def wait_end(self, index: int, seconds: float = 180) -> None:
        """Wait until a cell that was started has ended and has its number."""
        self.page.wait_for_function(
            f"i => {{ {NOTEBOOK} return nb.content.model.cells.get(i).executionCount !== null; }}",
            arg=index,
            timeout=seconds * 1000,
        )

    def interrupt(self) -> None:
        """The notebook's own interrupt button."""
        self.command("notebook:interrupt-kernel")

    def save(self) -> Path:
        """Save the notebook; returns its file."""
        path = self._do("await nb.context.save(); return nb.context.path;")
        return self.server.folder / str(path)

    def outputs(self, index: int) -> list[dict[str, Any]]:
        """Outputs of a cell as nbformat has them, from the document, not from the page."""
        return list(self._do("return nb.content.model.cells.get(argument).toJSON().outputs;", index))

    def stream(self, index: int) -> str:
        """What a cell has printed."""
        texts = (output["text"] for output in self.outputs(index) if output["output_type"] == "stream")
        return "".join(text if isinstance(text, str) else "".join(text) for text in texts)

    # ---- what is seen

    def cell(self, index: int) -> Any:
        """A cell in the page."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def until(self, condition: str, argument: Any = None, seconds: float = 120) -> None:
        """Wait for a JavaScript function of ``argument`` to say yes."""
        self.page.wait_for_function(condition, arg=argument, timeout=seconds * 1000, polling=50)

    def theme(self, name: str) -> None:
        """``"JupyterLab Dark"`` or ``"JupyterLab Light"``."""
        self.command("apputils:change-theme", theme=name)
        self.until("name => document.body.dataset.jpThemeName === name", name)

    def resize(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        """Another size of the window."""
        self.page.set_viewport_size({"width": width, "height": height})

    def screen(self, name: str, what: Any = None, *, gallery: bool = False) -> Path:
        """Write ``build/screens/NAME.png``: the window, or one element whole; on request also for the gallery."""
        SCREENS.mkdir(parents=True, exist_ok=True)
        path = SCREENS / f"{name}.png"
        # The mouse shows buttons and outlines where it rests.
        self.page.mouse.move(0, 0)
        (what or self.page).screenshot(path=str(path))
        if gallery and GALLERY:
            _save_small(path, GALLERY / path.name)
        return path

    def picture(self, img: Any) -> Any:
        """What an ``<img>`` shows, as the browser has decoded it: a PIL image."""
        from PIL import Image

        data = img.evaluate(
            """async el => { await el.decode();
                const canvas = document.createElement('canvas');
                [canvas.width, canvas.height] = [el.naturalWidth, el.naturalHeight];
                canvas.getContext('2d').drawImage(el, 0, 0);
                return canvas.toDataURL('image/png'); }"""
        )
        return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))

    def take_errors(self) -> list[str]:
        """The errors so far; they are looked at once."""
        taken, self.errors = self.errors, []
        return taken


def _save_small(source: Path, target: Path) -> None:
    """A copy in 256 colours: less than half the bytes, and no difference that one sees on a chart."""
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the default way to choose colours: it takes the hatches for noise.
    few = Image.open(source).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(target, optimize=True)
