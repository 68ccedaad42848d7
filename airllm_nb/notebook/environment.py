"""What is possible where this cell's output goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

Output = Literal["kernel", "terminal", "captured"]
Name = Literal["colab", "kaggle", "vscode", "jupyter", "terminal", "captured"]


def output_of(shell: Any) -> Output:
    """Where output goes now.

    Returns
    -------
    ``"kernel"`` where displays can be replaced in place, ``"terminal"`` where a line can be written again, and
    ``"captured"`` where nothing that is taken back later should be shown: under ``%%capture``, in a pipe, in a test.
    """
    if type(shell.display_pub).__name__ == "CapturingDisplayPublisher":
        return "captured"
    if getattr(shell, "kernel", None) is not None:
        return "kernel"
    return "terminal" if sys.stdout.isatty() else "captured"


class Place(NamedTuple):
    """A kind of notebook, and what it can do.

    Attributes
    ----------
    name
        ``"jupyter"`` is every kernel that is none of the three before it: JupyterLab, nbconvert, papermill.
    ipywidgets
        Major version of ipywidgets, 0 where widgets cannot be shown.
    shows_late_updates
        Whether a widget still changes after its cell has returned.
    """

    name: Name
    ipywidgets: int
    shows_late_updates: bool


def place(shell: Any, environ: Mapping[str, str] = os.environ, modules: Mapping[str, Any] = sys.modules) -> Place:
    """Where this runs."""
    output = output_of(shell)
    name = _front_end(shell, environ, modules) if output == "kernel" else output
    widgets = ipywidgets_major() if output == "kernel" else 0
    # Colab drops what a thread sends once no cell runs (googlecolab/colabtools issue 3373).
    return Place(name, widgets, shows_late_updates=widgets > 0 and name != "colab")


def _front_end(shell: Any, environ: Mapping[str, str], modules: Mapping[str, Any]) -> Name:
    # First, because Kaggle's image is built on Colab's: Colab's variables and package are there too.
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:
        return "kaggle"
    if "COLAB_RELEASE_TAG" in environ or "google.colab" in modules:
        return "colab"
    # The variables are the extension's when it starts the kernel here itself; in a container or on a server that it
    # connects to, only the name of the notebook is told.
    if "__vsc_ipynb_file__" in shell.user_ns or "VSCODE_PID" in environ or "VSCODE_CWD" in environ:
        return "vscode"
    return "jupyter"


def ipywidgets_major() -> int:
    """``7`` or ``8``; 0 where it is not installed."""
    try:
        return int(version("ipywidgets").split(".")[0])
    except PackageNotFoundError:
        return 0
