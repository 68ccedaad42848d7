"""What is possible where this cell's output goes."""

from __future__ import annotations

import sys
from typing import Any, Literal

Output = Literal["kernel", "terminal", "captured"]


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
