"""What may be done with files and memory on this machine: tried once, in a process that may fail, and remembered.

Answers are kept in ``machine.json`` in the cache folder, by file system, GPU and kernel; delete it to try again.
"""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..config import cache_dir
from ..disk import open_file, read_json, status
from ..errors import OptionError
from ..store.atomic import write_atomically
from ..tensors import libc
from .probe import disk_bandwidth
from .ring import LOCKED, PAGE_CACHE, PAGEABLE

log = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("trial_child.py")
SECONDS = 20
MACHINE = "machine.json"
# Slower than this is no better than copying through the ring.
LEAST_RATE_OF_LINK = 0.7
# Smaller files say nothing about rates, and their models need none of this.
LEAST_FILE, LEAST_DIRECT = 64 << 20, 1 << 30
# Locked memory that makes the RAM tier worth locking.
LEAST_LOCKED = 1 << 30


def ram_kind(file: Path, device: torch.device, link: float) -> str:
    """How RAM units should lie in host memory, for ``file``'s file system and a GPU with a link of ``link`` bytes/s."""
    if device.type != "cuda":
        return PAGE_CACHE if libc.is_supported() else LOCKED
    if not libc.is_supported() or status(file).st_size < LEAST_FILE:
        return LOCKED
    key = f"{file_system(file)}, {torch.cuda.get_device_name(device)}, {platform.release()}"
    return _remembered(key, "ram", lambda: _kind(_try(file, device.index or 0), link)) or LOCKED


def direct_is_faster(file: Path) -> bool:
    """Whether reading past the page cache is at least as fast as through it, for what the cache does not hold."""
    if status(file).st_size < LEAST_DIRECT or not libc.is_supported():
        return False
    return bool(_remembered(file_system(file), "direct", lambda: _direct_is_faster(file)))


def file_system(path: Path) -> str:
    """Type, device and mount point of the file system that ``path`` is on."""
    path = path.resolve()
    best = ("", "unknown")
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            mount, (kind, source, *_) = before.split()[4], after.split()
            if path.is_relative_to(mount) and len(mount) >= len(best[0]):
                best = mount, f"{kind} {source} at {mount}"
    return best[1]


def _direct_is_faster(file: Path) -> bool | None:
    quarter = status(file).st_size // 4
    with open_file(file) as opened:
        if any(libc.is_resident(opened.fileno(), quarter * part, 1) for part in (1, 2, 3)):
            return None  # cached: nothing to learn about the disk now
    return disk_bandwidth(file, direct=True) >= 0.95 * disk_bandwidth(file)


def _kind(answer: dict[str, Any], link: float) -> str | None:
    """What an answer of the child means; ``None`` where it says nothing for good."""
    if "failed" in answer:
        return None
    if "page_cache" in answer:
        # Right but slow: something else used the GPU, perhaps; ask again next time.
        return PAGE_CACHE if answer["page_cache"] >= LEAST_RATE_OF_LINK * link else None
    return LOCKED if answer.get("locked", LEAST_LOCKED) >= LEAST_LOCKED else PAGEABLE


def _try(file: Path, index: int) -> dict[str, Any]:
    if not sys.executable or getattr(sys, "frozen", False):
        return {"failed": "there is no Python to start"}
    command = [sys.executable, "-I", str(CHILD), str(file), str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        log.warning("copying from the page cache hangs on %s: it is not used", file_system(file))
        return {"refused": "it hangs"}
    except OSError as error:
        return {"failed": str(error)}
    with suppress(ValueError, IndexError):
        return dict(json.loads(done.stdout.splitlines()[-1]))
    return {"refused": f"exit code {done.returncode}"}


def _remembered(key: str, what: str, find: Callable[[], Any]) -> Any:
    """The answer of an earlier time, else of ``find``, which is kept unless it is ``None``."""
    try:
        path = cache_dir() / MACHINE
    except OptionError:  # a user without a home: try each time
        return find()
    known: dict[str, dict[str, Any]] = {}
    with suppress(OSError, ValueError):
        known = read_json(path)
    if not isinstance(known, dict) or not isinstance(known.get(key, {}), dict):
        known = {}
    if what in known.get(key, {}):
        return known[key][what]
    found = find()
    log.info("%s: %s is %s", key, what, found)
    if found is not None:
        known.setdefault(key, {})[what] = found
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(known, indent=1).encode())
    return found
