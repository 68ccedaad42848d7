"""How much room a folder has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def nearest(path: str | Path) -> Path:
    """The folder that exists nearest to ``path``: itself, or the first above it."""
    absolute = Path(path).expanduser().absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def free_disk(path: str | Path, environ: Mapping[str, str] = os.environ) -> int | None:
    """Free bytes where this path is, or would be made.

    Returns
    -------
    int or None
        ``None`` where the system's answer is not ours: on Kaggle the root folder is on the host's disk of terabytes, of
        which a session is given a share that nobody tells.
    """
    existing = nearest(path)
    if "KAGGLE_KERNEL_RUN_TYPE" in environ and existing.stat().st_dev == Path("/").stat().st_dev:
        return None
    return shutil.disk_usage(existing).free
