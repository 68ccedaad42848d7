"""One row a case: `airllm-nb bench` in a process of its own, with random weights in a known shape; writes RESULTS.md.

    python benchmarks/suite.py FOLDER bf16 cold batch          these groups of cases; FOLDER holds the checkpoints
    python benchmarks/suite.py FOLDER --list

A case whose checkpoint is not in FOLDER writes it first. "cold" drops the system's page cache, which needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from results import machine_line, write_section

ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """``options`` are those of `airllm-nb bench`; ``cold`` drops the page cache first."""

    name: str
    shape: str
    layers: int
    compression: str | None
    options: str
    cold: bool = False


L70, L405 = "llama-2-70b", "llama-3.1-405b"
CAP = "--vram 4GiB --cap --max-seq-len 256"
GROUPS: dict[str, list[Case]] = {
    "bf16": [Case("70B, 8 layers, bf16", L70, 8, None, f"{CAP} --ram 100GiB"),
             Case("the same, without prefetching", L70, 8, None, f"{CAP} --ram 100GiB --no-prefetch"),
             Case("the same, everything resident", L70, 8, None, "--vram 40GiB --cap --max-seq-len 256")],
    "405b": [Case("405B, 3 layers, bf16", L405, 3, None, f"{CAP} --ram 100GiB")],
    "cold": [Case("70B, 16 layers, 4-bit, cold disk, no RAM set", L70, 16, "4bit",
                  "--vram 1500MiB --cap --max-seq-len 256 --ram 400MiB --direct-io --sweeps 3", True),
             Case("the same, RAM a quarter of the model", L70, 16, "4bit",
                  "--vram 1500MiB --cap --max-seq-len 256 --ram 2200MiB --direct-io --sweeps 3", True)],
    "small": [Case("small, 4 layers", "small", 4, None, "--max-seq-len 256 --vram 40MiB")],
    "full": [Case("70B, all 80 layers, 4-bit, batch 1", L70, 80, "4bit", f"{CAP} --ram 100GiB --sweeps 4"),
             Case("the same, VRAM 24 GiB", L70, 80, "4bit", "--vram 24GiB --cap --max-seq-len 256 --ram 100GiB"),
             *(Case(f"48 tokens, batch {size}", L70, 80, "4bit",
                    f"--vram 4GiB --cap --max-seq-len 48 --ram 100GiB --batch {size} --sweeps 3") for size in (1, 32))],
    "batch": [Case(f"70B, 24 layers, 4-bit, batch {size}", L70, 24, "4bit",
                   f"--vram 4GiB --cap --max-seq-len 48 --ram 100GiB --batch {size}") for size in (1, 8, 32, 128)],
}  # fmt: skip


def run(case: Case, folder: Path) -> dict[str, Any]:
    """The result of one case as `airllm-nb bench --json` gives it, or ``{"error": …}``."""
    checkpoint = folder / f"{case.shape}-{case.layers}-{case.compression or 'none'}"
    if not checkpoint.exists():
        packed = ["--packed", case.compression] if case.compression else []
        command = [sys.executable, str(ROOT / "benchmarks" / "synthetic.py"), str(checkpoint), "--shape", case.shape]
        subprocess.run([*command, "--layers", str(case.layers), *packed], check=True)
        os.sync()  # what is still being written would take its share of the link
    if case.cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    command = [sys.executable, "-m", "airllm_nb", "bench", str(checkpoint), "--json", *case.options.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout)


def row(case: Case, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in found:
        return f"| {case.name} | failed: {found['error']} | | | | | |"
    links = found["links"]
    moved = [f"{links[name]['gb_per_second']:.3g} of {links[name]['probed_gb_per_second']:.3g}"
             if links.get(name, {}).get("bytes") else "" for name in ("disk", "link")]  # fmt: skip
    predicted = f"{found['predicted_sweep_seconds']:.3g} ({found['bound_by']})"
    share = f"{found['achieved_of_predicted']:.0%}"
    peak, opened = f"{found['peak_bytes'] / 2**30:.2f} GiB", f"{found['open_seconds']:.1f}"
    figures = f"{found['sweep_seconds']:.4f} | {predicted} | {share} | {moved[0]} | {moved[1]} | {peak} | {opened}"
    return f"| {case.name} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoints are, or are written")
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--list", action="store_true", help="only say what the groups are made of")
    parser.add_argument("--remove", action="store_true", help="delete each group's checkpoints after it")
    given = parser.parse_args()
    if unknown := set(given.groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if given.list:
        print("\n".join(f"{name}: {case.name}: {case.options}" for name in GROUPS for case in GROUPS[name]))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    head = "| case | seconds a sweep | predicted (bound) | achieved | disk GB/s | link GB/s | peak VRAM | opened in |"
    head += "\n|---|---|---|---|---|---|---|---|"
    for group in given.groups:
        rows = []
        for case in GROUPS[group]:
            found = run(case, given.folder)
            print(json.dumps({"case": case.name, **found}), flush=True)
            rows.append(row(case, found))
        text = "\n".join([machine_line(), "", f"`benchmarks/suite.py FOLDER {group}`:", "", head, *rows])
        print(text, flush=True)
        write_section(group, text)
        if given.remove:
            for case in GROUPS[group]:
                shutil.rmtree(given.folder / f"{case.shape}-{case.layers}-{case.compression or 'none'}", True)


if __name__ == "__main__":
    main()
