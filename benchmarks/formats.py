"""Seconds a sweep of every packed format beside the nf4 store, at the same number of bytes; writes RESULTS.md.

    python benchmarks/formats.py FOLDER [--shape llama-2-70b] [--layers 6] [--only fp8 Q4_K] [--keep]
    python benchmarks/formats.py --from LOG...

The checkpoints have random bytes in the layouts that the formats' libraries write. `airllm-nb bench` measures each in a
process of its own, on one machine, one after the other; the last column is (seconds / byte) over that of nf4. Each has
the VRAM that a run needs and the arena that keeps the link busy, and no more: what were resident would be unpacked
behind no copy. Rows that an earlier run on this machine wrote stay. A JSON line a format is printed; `--from` makes the
table of such lines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packed import KINDS, make
from results import RESULTS, machine_line, write_section

ROOT = Path(__file__).parents[1]
# Of all that could stream, what has to.
STREAMED = 0.85


def least_budget(model: Path, given: argparse.Namespace) -> int:
    """The VRAM in which nothing stays resident."""
    from airllm_nb.config import LoadOptions
    from airllm_nb.intake import planning, prepare
    from airllm_nb.plan.placement import window
    from airllm_nb.stream.ring import align

    budget = 4 << 30
    for _ in range(2):  # units are cut to suit the budget
        options = LoadOptions.create(vram_budget=budget, ram_budget=given.ram, max_seq_len=given.max_seq_len)
        prepared = prepare.prepare(model, options)
        prepared.held.close()
        units = [align(unit.nbytes) for unit in prepared.sizes if unit.kind != "embedding"]
        budget = planning.needs(prepared, prepared.planned, prepared.planned.sizes[0]).total + window(units)
    return budget


def measure(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What `airllm-nb bench --json` says, or ``{"error": …}``."""
    os.sync()  # what is still being written would take its share of the link
    options = ["--vram", str(least_budget(model, given)), "--ram", given.ram, "--max-seq-len", str(given.max_seq_len)]
    command = [sys.executable, "-m", "airllm_nb", "bench", str(model), "--json", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(done.stdout))


HEAD = """| format | seconds a sweep | GB moved | streamed | GB/s | peak VRAM (budget) | seconds a byte, of nf4's |
|---|---|---|---|---|---|---|"""


def rows(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Format → its row, nf4 first."""
    base = None
    lines = {}
    for kind, result in found.items():
        if "error" in result:
            lines[kind] = f"| {kind} | failed: {result['error']} | | | | | |"
            continue
        seconds, nbytes = result["sweep_seconds"], result["links"].get("link", {}).get("bytes", 0)
        each = seconds / nbytes if nbytes else 0
        base = base or each
        of_base = f"{each / base:.2f}" if base else ""
        streamed = nbytes / (nbytes + result["plan"]["tiers"]["gpu"]["bytes"] or 1)
        share = f"{streamed:.0%}" if streamed >= STREAMED else f"only {streamed:.0%}: tells nothing"
        peak = f"{result['peak_bytes'] / 2**30:.2f} ({result['plan']['vram_budget'] / 2**30:.2f}) GiB"
        figures = f"{seconds:.4f} | {nbytes / 1e9:.2f} | {share} | {nbytes / seconds / 1e9:.1f} | {peak} | {of_base}"
        lines[kind] = f"| {kind} | {figures} |"
    return lines


def section(title: str, found: dict[str, dict[str, Any]], before: str) -> str:
    """The section, with the rows of the one ``before`` that has the same title."""
    kept = re.findall(r"^(\| (\S+) \|.*)$", before, re.MULTILINE) if title in before else []
    lines = {kind: line for line, kind in kept if kind in KINDS} | rows(found)
    return "\n".join([title, "", HEAD, *(lines[kind] for kind in KINDS if kind in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the checkpoints are, or are written")
    parser.add_argument("--shape", default="llama-2-70b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ram", default="100GiB", help="as of airllm-nb bench")
    parser.add_argument("--max-seq-len", type=int, default=256, help="as of airllm-nb bench")
    parser.add_argument("--only", nargs="+", choices=KINDS[1:], help="these formats, beside nf4")
    parser.add_argument("--keep", action="store_true", help="keep each checkpoint after it was measured")
    parser.add_argument("--from", dest="logs", type=Path, nargs="+", help="what earlier runs printed; measure nothing")
    given = parser.parse_args()
    if (given.folder is None) == (given.logs is None):
        parser.error("name a folder for the checkpoints, or logs after --from")
    records = printed(given.logs) if given.logs else measured(given)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["title"], {}).setdefault(record["format"], record)
    for title, results in found.items():
        text = section(title, results, RESULTS.read_text("utf-8"))
        print(text, flush=True)
        write_section("formats", text)


def measured(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record a format, each printed when it is there."""
    what = f"`benchmarks/formats.py`, {given.shape} cut to {given.layers} layers, at most {given.max_seq_len} tokens:"
    for kind in ["nf4", *(given.only or KINDS[1:])]:
        model = make(given.folder, given.shape, given.layers, kind)
        record = {"format": kind, "title": f"{machine_line()}\n\n{what}", **measure(model, given)}
        print(json.dumps(record), flush=True)
        yield record
        if not given.keep:
            shutil.rmtree(given.folder / f"{given.shape}-{given.layers}-{kind}", ignore_errors=True)


def printed(logs: list[Path]) -> Iterator[dict[str, Any]]:
    """The records in what earlier runs printed."""
    for line in (line for log in logs for line in log.read_text("utf-8").splitlines()):
        if line.startswith('{"format": '):
            yield json.loads(line)


if __name__ == "__main__":
    main()
