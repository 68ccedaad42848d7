"""RESULTS.md, section by section: a script replaces its own and leaves the others alone."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def machine_line() -> str:
    """Date, machine and versions in one sentence."""
    import torch
    import transformers

    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name(0)}, {os.cpu_count()} cores"
    else:
        machine = f"{os.cpu_count()} cores, {_processor()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{datetime.date.today()}. {machine}; {versions}."


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put ``text`` between the marks of section ``name``; a section that is not there is added at the end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section, content = f"{begin}\n{text.strip()}\n{end}", path.read_text(encoding="utf-8") if path.exists() else ""
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(content):
        content = pattern.sub(lambda _: section, content)
    else:
        content = f"{content.rstrip()}\n\n## {name}\n\n{section}\n"
    path.write_text(content, encoding="utf-8")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
