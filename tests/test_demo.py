"""tools/demo.py: what it prints and leaves for a notebook that works, and for each way in which one can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

DEMO = Path(__file__).parents[1] / "tools" / "demo.py"
ANSWER = (
    "from types import SimpleNamespace\nanswer = SimpleNamespace("
    "prompt='Capital of France?', text='Paris.', tokens_per_second=12.34, sweep_seconds=0.081, peak_bytes=300 << 20)"
)


def demo(folder: Path, *sources: str) -> subprocess.CompletedProcess[str]:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "some.ipynb")
    command = [sys.executable, DEMO, "--notebook", folder / "some.ipynb", "--build", folder / "build", "--timeout", "3"]
    environment = os.environ | {"AIRLLM_NB_DEMO_MODEL": "none"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_a_notebook_that_works(tmp_path: Path) -> None:
    result = demo(tmp_path, "import sys, os\nprint(sys.executable, os.environ['AIRLLM_NB_DEMO_MODEL'])", ANSWER)
    assert result.returncode == 0, result.stderr
    for fact in ("Capital of France?", "Paris.", "12.3 tokens/s", "81 ms", "300 MiB"):
        assert fact in result.stdout
    executed = nbformat.read(tmp_path / "build" / "some.ipynb", as_version=4)
    assert len(executed.cells) == 2, "what the runner asked the kernel is not in the file"
    assert executed.cells[0].outputs[0].text == f"{sys.executable} none\n"
    assert "Paris" in (tmp_path / "build" / "some.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os\nos._exit(1)", "the kernel died"),
        ("import time\ntime.sleep(60)", "longer than 3 s"),
        ("x = 1", "no usable `answer`"),
    ],
)
def test_a_notebook_that_fails(tmp_path: Path, cell: str, message: str) -> None:
    result = demo(tmp_path, cell)
    assert result.returncode == 1
    assert message in result.stderr
    assert "\x1b" not in result.stderr
    assert (tmp_path / "build" / "some.ipynb").is_file(), "what ran is kept, to look at"


def test_no_notebook(tmp_path: Path) -> None:
    command = [sys.executable, DEMO, "--notebook", tmp_path / "absent.ipynb"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "there is no" in result.stderr) == (1, True)
