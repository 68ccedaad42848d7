"""What this machine is and can, each fact with a verdict and, where something is wrong, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..config import GiB, cache_dir, format_bytes
from .commands import write, write_json

PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors", "gguf", "bitsandbytes", "ipython", "ipywidgets",
            "matplotlib")  # fmt: skip
# In a process of its own: a broken build of bitsandbytes can take the interpreter with it.
_BITSANDBYTES = """
import torch, bitsandbytes.functional as F
device = "cuda" if torch.cuda.is_available() else "cpu"
weight = torch.randn(64, 64, device=device)
packed, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4")
error = (F.dequantize_4bit(packed, state) - weight).abs().mean().item()
print(device, error < 0.2)
"""
_SECONDS = 120


class Check(NamedTuple):
    """One fact. ``verdict``: ``"ok"``, ``"note"`` (works, but know it) or ``"fix"`` (something will fail)."""

    name: str
    verdict: Literal["ok", "note", "fix"]
    value: str
    remedy: str = ""


def doctor(given: argparse.Namespace) -> int:
    """All checks; 1 where something must be fixed."""
    checks: list[Check] = []
    for check in _checks():
        checks.append(check)
        if not given.json:
            width = 16
            write(f"{check.verdict:<5}{check.name:<{width}}{check.value}\n")
            if check.remedy:
                write(f"{'':<{width + 5}}-> {check.remedy}\n")
    healthy = all(check.verdict != "fix" for check in checks)
    if given.json:
        write_json({"ok": healthy, "checks": [check._asdict() for check in checks]})
    return 0 if healthy else 1


def _checks() -> Iterator[Check]:
    yield Check("place", "ok", _place())
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield from map(_package, PACKAGES)
    if importlib.util.find_spec("torch") is not None:
        yield from _gpus()
    if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("bitsandbytes") is not None:
        yield _bitsandbytes()
    yield _ram()
    yield _pinning()
    yield _disk("disk, stores", cache_dir(), "AIRLLM_NB_CACHE or --shards")
    yield _disk("disk, Hub cache", _hub_cache(), "HF_HOME")


def _place() -> str:
    system = f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs"
    if "COLAB_RELEASE_TAG" in os.environ:
        return f"Google Colab, {system}"
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return f"Kaggle, {system}"
    if "microsoft" in platform.release().lower():
        return f"WSL, {system}"
    inside = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    return f"{system}, in a container" if inside else system


def _package(name: str) -> Check:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fix", "not installed", f"pip install '{_requirement(name)}'")
    wanted = _requirement(name)
    if not _satisfies(wanted, version):
        return Check(name, "fix", version, f"pip install '{wanted}'")
    return Check(name, "ok", version)


def _requirement(name: str) -> str:
    """As our own metadata states it; the bare name where we are not installed."""
    try:
        stated = importlib.metadata.requires("airllm-nb") or []
    except importlib.metadata.PackageNotFoundError:
        stated = []
    mine = [line for line in stated if "extra ==" not in line and line.replace("-", "_").lower().startswith(name)]
    return mine[0] if mine else name


def _satisfies(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement

        return Requirement(requirement).specifier.contains(version, prereleases=True)
    except ImportError:
        return True


def _gpus() -> Iterator[Check]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
    has_driver = shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        if has_driver and not torch.version.cuda:
            yield Check("gpu", "fix", f"there is an NVIDIA driver, but torch is built {build}",
                        "install torch with CUDA: pytorch.org/get-started says how")  # fmt: skip
        elif has_driver:
            yield Check("gpu", "fix", f"torch (built for {build}) sees no GPU",
                        "run nvidia-smi: does the driver fit this torch, is the GPU on?")  # fmt: skip
        else:
            yield Check("gpu", "note", f"none; torch is built {build}", "models run on the CPU, slowly but the same")
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(torch, index, build)


def _gpu(torch: Any, index: int, build: str) -> Check:
    name = f"gpu {index}"
    capability = torch.cuda.get_device_capability(index)
    label = f"{torch.cuda.get_device_name(index)}, capability {capability[0]}.{capability[1]}, torch for {build}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(1, device=f"cuda:{index}").add_(1).cpu()
    except Exception as error:
        return Check(name, "fix", f"{label}: does not compute ({str(error).splitlines()[0]})",
                     f"this torch has kernels for {', '.join(torch.cuda.get_arch_list())}; install one for this GPU, "
                     "choose another GPU, or give --device cpu")  # fmt: skip
    label += f", {format_bytes(free)} of {format_bytes(total)} free"
    if capability < (8, 0):
        return Check(name, "note", f"{label}, no bfloat16", "float16 is used; models trained in bfloat16 may overflow")
    if free < 2 * GiB:
        return Check(name, "note", f"{label}, bfloat16", "little is free: end other notebooks that use this GPU")
    return Check(name, "ok", f"{label}, bfloat16")


def _bitsandbytes() -> Check:
    remedy = "reinstall it: pip install -U bitsandbytes; without it, load without --compression"
    try:
        done = subprocess.run([sys.executable, "-c", _BITSANDBYTES], capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return Check("4bit works", "fix", f"no answer in {_SECONDS} s", remedy)
    words = done.stdout.split()
    if done.returncode == 0 and words[-1:] == ["True"]:
        return Check("4bit works", "ok", f"on {words[-2]}")
    said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    return Check("4bit works", "fix", said[-1], remedy)


def _ram() -> Check:
    total, free = _meminfo("MemTotal"), _meminfo("MemAvailable")
    if total is None or free is None:
        return Check("ram", "note", "unknown on this system", "give --ram, so that the budget is not a guess")
    text = f"{format_bytes(free)} of {format_bytes(total)} available"
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and limit < total:
        free = min(free, limit - (used or 0))
        text += f", limited to {format_bytes(limit)} by the container"
    if free < 2 * GiB:
        return Check("ram", "note", text, "weights will stream from disk; end other programs for more speed")
    return Check("ram", "ok", text)


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _cgroup(name: str) -> int | None:
    old = {"memory.max": "memory.limit_in_bytes", "memory.current": "memory.usage_in_bytes"}[name]
    for path in (Path("/sys/fs/cgroup") / name, Path("/sys/fs/cgroup/memory") / old):
        try:
            return int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None


def _pinning() -> Check:
    try:
        import resource
    except ImportError:
        return Check("pinned memory", "note", "unknown on this system")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Check("pinned memory", "ok", "no limit")
    # CUDA's driver pins on its own account, so this limit rarely matters; it does inside some containers.
    return Check("pinned memory", "note", f"ulimit -l is {format_bytes(limit)}",
                 "only if copies to a GPU are slow: raise it (docker run --ulimit memlock=-1)")  # fmt: skip


def _hub_cache() -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        return Path.home() / ".cache" / "huggingface" / "hub"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _disk(name: str, folder: Path, elsewhere: str) -> Check:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    text = f"{format_bytes(free)} free at {folder}"
    if not os.access(existing, os.W_OK):
        return Check(name, "fix", f"{folder} cannot be written", f"name another folder with {elsewhere}")
    if free < 20 * GiB:
        return Check(name, "note", text, f"a 7B model takes 15 GB; for more, name another disk with {elsewhere}")
    return Check(name, "ok", text)
