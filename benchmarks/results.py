"""RESULTS.md, section by section: a script replaces its own and leaves the others alone."""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def machine_line() -> str:
    """Date, machine and versions in one sentence."""
    import torch

    sys.path.insert(0, str(RESULTS.parents[1]))
    from airllm_nb.bench import machine_facts

    facts = machine_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}, Python {facts['python']}"
    return f"{datetime.date.today()}. {facts['device']}, {facts['cores']} cores; {versions}."


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
