"""Loads models in forked processes that are killed, or find the disk full, at a chosen step: one JSON command a line.

Forked, because what a load imports takes longer than the load. A step is a file that is opened for writing, renamed or
removed below the watched folders, or a report of progress. The bytes below those folders are counted at every step:
they shrink at none but a removal, which is seen before it happens, so that the largest count is the peak.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: F401
from huggingface_hub.utils import get_session

from airllm_nb import LoadOptions
from airllm_nb.errors import AirLLMError
from airllm_nb.intake.prepare import prepare
from airllm_nb.progress import Progress

SEEN = struct.Struct("qq")  # steps, peak


class Steps:
    """Counts steps, in memory that outlives the process, and ends things at the chosen one."""

    def __init__(self, command: dict[str, Any], seen: mmap.mmap):
        self._watched = [str(path) for path in command["watch"]]
        self._kill_at, self._full_at = command.get("kill_at"), command.get("full_at")
        self._kill_stage, self._seen = command.get("kill_stage"), seen
        self._lock, self._mine = threading.Lock(), threading.local()
        self.reports: list[Progress] = []

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or hasattr(self._mine, "inside"):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
        writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        # What is below an open folder is removed by its name alone.
        if writes and (any(path.startswith(folder) for folder in self._watched) or event == "os.remove"):
            self._step(makes=event in ("open", "os.mkdir"))

    def report(self, progress: Progress) -> None:
        self.reports.append(progress)
        self._step(makes=False)
        if progress.stage == self._kill_stage:
            os.kill(os.getpid(), signal.SIGKILL)

    def _step(self, makes: bool) -> None:
        self._mine.inside = True  # counting opens folders too
        with self._lock:
            steps, peak = SEEN.unpack_from(self._seen)
            SEEN.pack_into(self._seen, 0, steps + 1, max(peak, sum(map(nbytes, self._watched))))
        del self._mine.inside
        if steps == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if makes and self._full_at is not None and steps >= self._full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nbytes(folder: str) -> int:
    found = 0
    for above, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(above, name))  # noqa: PTH118
            except FileNotFoundError:
                continue
            found += status.st_size
    return found


def load(command: dict[str, Any], seen: mmap.mmap) -> dict[str, Any]:
    if "pid_file" in command:
        Path(command["pid_file"]).write_text(str(os.getpid()), encoding="ascii")
    steps = Steps(command, seen)
    sys.addaudithook(steps.audit)
    if command.get("free") is not None:
        shutil.disk_usage = lambda _: type("Usage", (), {"free": command["free"]})
    try:
        prepared = prepare(command["model"], LoadOptions.create(**command["options"]), progress=steps.report)
    except AirLLMError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"folder": str(prepared.folder), "reports": steps.reports}


def forked(command: dict[str, Any]) -> dict[str, Any]:
    """What ``times`` processes at once made of it: the answer of the last one; ``killed`` without one."""
    seen, running = mmap.mmap(-1, SEEN.size), []
    for _ in range(command.get("times", 1)):
        reader, writer = os.pipe()
        if pid := os.fork():
            os.close(writer)
            running.append((pid, reader))
            continue
        try:
            answer = load(command, seen)
        except BaseException as error:
            answer = {"error": "unexpected", "text": repr(error)}
        with os.fdopen(writer, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    for pid, reader in running:
        with os.fdopen(reader) as out:
            text = out.read()
        os.waitpid(pid, 0)
        answer = json.loads(text) if text else {"killed": True}
    steps, peak = SEEN.unpack_from(seen)
    return {**answer, "steps": steps, "peak": peak}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:  # so that what the loads import is there; without weights no thread is begun
        prepare(folder, LoadOptions.create(compression="4bit", device="cpu"), weights=False)
    get_session().close()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(forked(json.loads(line))) + "\n")
        sys.stdout.flush()
