"""Kernels as the notebooks of the world have them: folders that ``make kernels`` lays over the environment.

A stack is laid over the kernel's process alone, by PYTHONPATH; the test's own process keeps the newest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from time import monotonic
from typing import Any, NamedTuple

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[1]
SECONDS = 120


class Stack(NamedTuple):
    """What a notebook brings; "" is what the environment has."""

    ipykernel: str
    ipywidgets: str = ""
    ipython: str = ""


STACKS = {
    "colab": Stack("6.17.1", "7.7.1", "7.34.0"),
    "kaggle": Stack("6.17.1", "8.1.5", "7.34.0"),
    "6.31": Stack("6.31.0"),
    "7.0": Stack("7.0.1"),
    "7.1": Stack("7.1.0"),
    "7.3": Stack("7.3.0"),
    "newest": Stack(""),
}


def overlay(stack: str) -> Path | None:
    """The folder of a stack, None for the newest; skips the test where it is not installed."""
    if stack == "newest":
        return None
    folder = ROOT / "build" / f"kernel-{stack}"
    if not (folder / "installed").exists():
        pytest.skip(f"the kernel of {stack} is not installed for Python {sys.version_info[0]}.{sys.version_info[1]}: "
                    "run `make kernels`")  # fmt: skip
    return folder


def environment(stack: str) -> dict[str, str]:
    """What to set for a process that runs on this stack; it finds the package as it lies here."""
    paths = [overlay(stack), ROOT, os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


class Specs(KernelSpecManager):
    """One kernel: this interpreter on a stack."""

    def __init__(self, stack: str = "newest", **environ: str):
        super().__init__()
        self._env = environment(stack) | environ

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python", env=self._env)


def manager(stack: str = "newest", **environ: str) -> KernelManager:
    """A kernel manager, for nbclient's ``km`` too."""
    return KernelManager(kernel_spec_manager=Specs(stack, **environ))


class Kernel:
    """A running kernel, spoken to as a browser does: requests go out at once, answers are collected by request."""

    def __init__(self, km: KernelManager, kc: BlockingKernelClient):
        self.km, self.kc = km, kc
        self.messages: list[dict[str, Any]] = []
        self.replies: list[dict[str, Any]] = []

    def execute(self, code: str, **options: Any) -> str:
        """Queue a cell; returns its request's id."""
        return str(self.kc.execute(code, **options))

    def run(self, code: str) -> str:
        """Run a cell that must not fail; returns what it printed."""
        request = self.execute(code)
        reply = self.reply(request)
        assert reply["content"]["status"] == "ok", reply["content"]
        return self.text(request)

    def comm(self, comm_id: str, data: dict[str, Any], msg_type: str = "comm_msg") -> str:
        """Send what a widget in a browser sends; returns the message's id."""
        message = self.kc.session.msg(msg_type, {"comm_id": comm_id, "data": data})
        self.kc.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def click(self, comm_id: str) -> str:
        """Click on a button."""
        return self.comm(comm_id, {"method": "custom", "content": {"event": "click"}})

    def update(self, comm_id: str, **state: Any) -> str:
        """Move a slider, type a text."""
        return self.comm(comm_id, {"method": "update", "state": state, "buffer_paths": []})

    def reply(self, request: str) -> dict[str, Any]:
        """Wait for the answer on the shell channel, and for all of the request's output."""
        found = self._wait(lambda: next((r for r in self.replies if _parent(r) == request), None))
        self.idle(request)
        return found

    def idle(self, request: str) -> None:
        """Wait until the kernel says that it is done with a request."""
        self._wait(lambda: "idle" in self.states(request))

    def states(self, request: str) -> list[str]:
        """``["busy", "idle"]`` of a request, as far as they have come."""
        return [m["content"]["execution_state"] for m in self.output(request) if m["msg_type"] == "status"]

    def output(self, request: str) -> list[dict[str, Any]]:
        """What has come for a request on the iopub channel."""
        return [message for message in self.messages if _parent(message) == request]

    def text(self, request: str) -> str:
        """What a request has printed so far."""
        return "".join(m["content"]["text"] for m in self.output(request) if m["msg_type"] == "stream")

    def wait_for_text(self, request: str, text: str) -> None:
        """Wait until a request has printed this."""
        self._wait(lambda: text in self.text(request))

    def interrupt(self) -> None:
        """The notebook's interrupt button."""
        self.km.interrupt_kernel()

    def _wait(self, found: Callable[[], Any]) -> Any:
        deadline = monotonic() + SECONDS
        while not (value := found()):
            if monotonic() > deadline:
                raise TimeoutError(f"the kernel did not answer in {SECONDS} s; it said {self.messages[-5:]}")
            self._collect()
        return value

    def _collect(self) -> None:
        for channel, kept in ((self.kc.shell_channel, self.replies), (self.kc.iopub_channel, self.messages)):
            try:
                while True:
                    kept.append(channel.get_msg(timeout=0.005))
            except Empty:
                pass


def _parent(message: dict[str, Any]) -> str | None:
    return message["parent_header"].get("msg_id")


@contextmanager
def running(stack: str = "newest", **environ: str) -> Iterator[Kernel]:
    """A kernel of a stack; skips the test where the stack is not installed."""
    km = manager(stack, **environ)
    km.start_kernel()
    kc = km.blocking_client()
    try:
        kc.start_channels()
        kc.wait_for_ready(timeout=SECONDS)
        yield Kernel(km, kc)
    finally:
        kc.stop_channels()
        km.shutdown_kernel(now=True)
