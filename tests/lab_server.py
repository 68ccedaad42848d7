"""A JupyterLab server for tests: in folders of its own, with kernels of our choice, stopped with all it has started."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SETTINGS = {
    # Outputs out of view are detached from the page otherwise, and a locator finds nothing.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false"},
    # The file on disk is what a test has saved, no more.
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


class Kernel(NamedTuple):
    """A kernel of this interpreter; ``overlay`` folders come before its own packages."""

    overlay: Sequence[Path] = ()
    environment: Mapping[str, str] = {}

    def spec(self, name: str) -> dict[str, Any]:
        path = os.pathsep.join(map(str, [*self.overlay, ROOT]))
        return {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"],
            "display_name": name,
            "language": "python",
            "env": {"PYTHONPATH": path, "PYDEVD_DISABLE_FILE_VALIDATION": "1", **self.environment},
        }


class Server(NamedTuple):
    """A running JupyterLab that serves ``folder``."""

    url: str
    token: str
    folder: Path


@contextmanager
def serve(folder: Path, kernels: Mapping[str, Kernel], seconds: float = 180) -> Iterator[Server]:
    """Start JupyterLab on a free port of this machine, apart from its user's settings; stop it and its kernels."""
    with tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True) as made:
        home, token, port = Path(made), secrets.token_hex(16), _free_port()
        environment = _environment(home, kernels)
        command = [
            sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root",
            "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}",
            "--LabApp.expose_app_in_browser=True",  # gives the page window.jupyterapp
            "--LabApp.news_url=None",
        ]  # fmt: skip
        with (home / "server.log").open("wb") as log:
            # Its own process group: what it started can be ended with it.
            server = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                _wait_for(server, f"http://127.0.0.1:{port}/api/status?token={token}", home / "server.log", seconds)
                yield Server(f"http://127.0.0.1:{port}", token, folder)
            finally:
                _stop(server)


def _environment(home: Path, kernels: Mapping[str, Kernel]) -> dict[str, str]:
    settings = home / "config" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    for name, kernel in kernels.items():
        spec = home / "data" / "kernels" / name / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps(kernel.spec(name)))
    folders = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib",
    }  # fmt: skip
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    environment.pop("JUPYTER_PATH", None)
    return environment


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _wait_for(server: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)  # it shuts its kernels down too
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
