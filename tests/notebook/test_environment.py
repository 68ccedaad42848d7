"""The place is known by what it sets, on the stacks that real places have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from kernel_stacks import STACKS, Kernel, running

from airllm_nb.disk import free_disk
from airllm_nb.notebook import environment
from airllm_nb.notebook.environment import Place, place

KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
COLAB = {"COLAB_RELEASE_TAG": "release-colab_20260101"}
IN_COLAB = {"google.colab": ModuleType("google.colab")}


class DisplayPublisher:
    pass


class CapturingDisplayPublisher:
    """IPython's, under ``%%capture``; it is known by its name."""


def shell(publisher: Any = None, **user_ns: Any) -> Any:
    """A kernel's shell."""
    return SimpleNamespace(display_pub=publisher or DisplayPublisher(), kernel=object(), user_ns=user_ns)


@pytest.mark.parametrize(
    ("environ", "modules", "user_ns", "name"),
    [
        ({}, {}, {}, "jupyter"),
        ({}, IN_COLAB, {}, "colab"),
        (COLAB, {}, {}, "colab"),
        (KAGGLE, {}, {}, "kaggle"),
        (KAGGLE | COLAB, IN_COLAB, {}, "kaggle"),
        ({}, {}, {"__vsc_ipynb_file__": "a.ipynb"}, "vscode"),
        ({"VSCODE_PID": "12"}, {}, {}, "vscode"),
        ({"VSCODE_CWD": "/"}, {}, {}, "vscode"),
        (COLAB, IN_COLAB, {"__vsc_ipynb_file__": "a.ipynb"}, "colab"),
    ],
)
def test_a_place_is_known_by_what_it_sets(
    environ: dict[str, str], modules: dict[str, Any], user_ns: dict[str, Any], name: str
) -> None:
    found = place(shell(**user_ns), environ, modules)
    assert found.name == name
    assert found.ipywidgets >= 7
    assert found.shows_late_updates == (name != "colab")


def test_without_ipywidgets_nothing_is_shown_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", missing)
    assert place(shell(), {}, {}) == Place("jupyter", 0, False)


def test_captured_output_shows_no_widget_wherever_it_is() -> None:
    assert place(shell(CapturingDisplayPublisher()), COLAB, IN_COLAB) == Place("captured", 0, False)


@pytest.mark.parametrize(("terminal", "name"), [(True, "terminal"), (False, "captured")])
def test_without_a_kernel_it_is_a_terminal_or_a_pipe(
    terminal: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: terminal))
    without = SimpleNamespace(display_pub=DisplayPublisher(), user_ns={})
    assert place(without, KAGGLE, {}) == Place(name, 0, False)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["colab", "kaggle", "newest"])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """One kernel a stack, with the variables of its place."""
    environ = {"colab": COLAB, "kaggle": COLAB | KAGGLE, "newest": {}}[request.param]
    with running(request.param, **environ) as made:
        yield made


def test_the_place_of_a_real_kernel(kernel: Kernel, request: pytest.FixtureRequest) -> None:
    stack = request.node.callspec.params["kernel"]
    source = "from airllm_nb.notebook.environment import *; print(*place(get_ipython()), 'ipywidgets' in sys.modules)"
    expected = {"colab": "colab 7 False", "kaggle": "kaggle 8 True", "newest": "jupyter 8 True"}[stack]
    assert kernel.run("import sys; " + source) == f"{expected} False\n", "and ipywidgets is not imported for it"
    assert stack == "newest" or expected.split()[1] == STACKS[stack].ipywidgets[0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose disk was asked for what is free."""
    folders: list[Path] = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: folders.append(Path(path)) or SimpleNamespace(free=12345))
    return folders


def test_the_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path, asked: list[Path]) -> None:
    assert free_disk(tmp_path / "not" / "yet", {}) == 12345
    assert asked == [tmp_path]


def test_the_root_disk_of_kaggle_is_not_believed(asked: list[Path]) -> None:
    assert free_disk("/", {}) == 12345
    assert free_disk("/no/such/folder", KAGGLE) is None


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system at hand")
def test_a_disk_of_its_own_on_kaggle_is_believed(asked: list[Path]) -> None:
    assert free_disk("/dev/shm", KAGGLE) == 12345
    assert asked == [Path("/dev/shm")]
