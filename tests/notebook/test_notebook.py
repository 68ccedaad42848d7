"""Notebooks in a real kernel: the quickstart, and what a person does while a cell runs."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"
SECONDS = 120


class ThisPython(KernelSpecManager):
    """Kernels of the running interpreter."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        import sys

        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """The kernel finds the package as it lies here, also where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        yield


@pytest.fixture(scope="module")
def client() -> Iterator[NotebookClient]:
    """One kernel for all tests that do not need a fresh one."""
    made = NotebookClient(
        nbformat.v4.new_notebook(), km=KernelManager(kernel_spec_manager=ThisPython()), timeout=SECONDS
    )
    with made.setup_kernel(cleanup_kc=True):
        yield made


@pytest.fixture(scope="module")
def run(client: NotebookClient, tiny_llama: Callable[..., Path]) -> Callable[[str], Any]:
    """``run(source)`` executes a cell in a kernel with a model that never ends by itself; returns its outputs."""

    def execute(source: str) -> Any:
        client.nb.cells.append(nbformat.v4.new_code_cell(source))
        return client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1)["outputs"]

    execute("%load_ext airllm_nb")
    model = tiny_llama(eos_token_id=None, max_position_embeddings=120_000)
    outputs = execute(f'%airllm_load "{model}" --dashboard bar')
    assert [output["output_type"] for output in outputs] == ["display_data"], "the card is in the place of the line"
    assert "is loaded as" in outputs[0]["data"]["text/plain"] and "<table>" in outputs[0]["data"]["text/html"]
    return execute


def text_of(outputs: Any) -> str:
    return "".join(output.get("text", "") for output in outputs if output["output_type"] == "stream")


def test_quickstart_is_committed_clean() -> None:
    notebook = nbformat.read(QUICKSTART, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells) <= 6
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


def test_quickstart_runs_from_top_to_bottom(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIRLLM_NB_DEMO_MODEL", str(tiny_llama()))
    notebook = nbformat.read(QUICKSTART, as_version=4)
    client = NotebookClient(
        notebook,
        km=KernelManager(kernel_spec_manager=ThisPython()),
        timeout=SECONDS,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(cleanup_kc=True)
    assert "tokens/s" in text_of(notebook.cells[-1].outputs)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]


def test_text_line_and_result(run: Callable[[str], Any]) -> None:
    outputs = run("%%airllm_generate -n 8 -o answer\nhello")
    assert [output["output_type"] for output in outputs if "text" not in output] == ["display_data"]
    assert "8 tokens" in outputs[-1]["data"]["text/plain"] and "<small>" in outputs[-1]["data"]["text/html"]
    assert text_of(run("print(len(answer.token_ids), answer.stopped_by)")) == "8 length\n"


def test_the_progress_line_keeps_its_place_and_goes_away(run: Callable[[str], Any]) -> None:
    run("from airllm_nb.notebook import generating; generating.PATIENCE, generating.POLL = 0.0, 0.001")
    outputs = run("%%airllm_generate -n 8\nhello")
    run("generating.PATIENCE, generating.POLL = 2.0, 0.1")
    assert [output["output_type"] for output in outputs if "text" not in output] == ["display_data"] * 2
    assert outputs[0]["data"]["text/plain"] == "", "above the text, and empty in the end"
    assert "8 tokens" in outputs[-1]["data"]["text/plain"]


def test_a_mistake_stops_the_notebook_with_one_line(run: Callable[[str], Any]) -> None:
    with pytest.raises(CellExecutionError) as caught:
        run("%airllm_load /nowhere/at/all")
    assert "check the path" in str(caught.value)
    assert "2 tokens" in run("%%airllm_generate -n 2\nhello")[-1]["data"]["text/plain"]


def test_the_interrupt_button_keeps_the_answer_so_far(client: NotebookClient, run: Callable[[str], Any]) -> None:
    kc = client.kc
    asked = kc.execute("%%airllm_generate -n 100000 -o partial\nhello")
    messages, deadline, interrupted = [], time.monotonic() + SECONDS, False
    while time.monotonic() < deadline:
        try:
            message = _wait(kc.get_iopub_msg(timeout=1))
        except queue.Empty:
            continue
        if message["parent_header"].get("msg_id") != asked:
            continue
        messages.append(message)
        if message["msg_type"] == "stream" and not interrupted:
            interrupted = True
            _wait(client.km.interrupt_kernel())
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            break
    assert interrupted and not [message for message in messages if message["msg_type"] == "error"]
    last = [message for message in messages if message["msg_type"] == "display_data"][-1]
    assert "stopped by you after" in last["content"]["data"]["text/plain"]
    assert text_of(run("print(partial.stopped_by, len(partial.token_ids) > 0)")) == "user True\n"
    assert "3 tokens" in run("%%airllm_generate -n 3\nhello")[-1]["data"]["text/plain"]


def test_unloading_leaves_no_thread(run: Callable[[str], Any]) -> None:
    run("%unload_ext airllm_nb")
    assert (
        text_of(run("import threading; print([t.name for t in threading.enumerate() if 'airllm' in t.name])")) == "[]\n"
    )


def _wait(value: Any) -> Any:
    """Clients are blocking or async, as nbclient has chosen."""
    import asyncio
    import inspect

    return asyncio.get_event_loop().run_until_complete(value) if inspect.isawaitable(value) else value
