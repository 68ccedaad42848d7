"""Seconds a token of this project beside AirLLM 4.0.0, transformers + accelerate and the resident model.

    python benchmarks/compare.py                        SmolLM2-135M on this machine
    python benchmarks/compare.py FOLDER --vram 4GiB --tools ours,airllm,accelerate --compression 4bit

Every tool runs in a process of its own, one after the other, on the same files, with the same prompt and VRAM cap.
The figure is the median over the tokens after the first. AirLLM is installed into build/airllm for this only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
AIRLLM = ROOT / "build" / "airllm"
TOOLS = ("resident", "ours", "airllm", "accelerate")


class Clock:
    """A streamer that notes when each token comes; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to finish."""

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def measure(given: argparse.Namespace) -> dict[str, object]:
    """Run one tool in this process."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda and given.vram and given.child != "resident":
        from airllm_nb.config import parse_bytes

        torch.cuda.set_per_process_memory_fraction(
            parse_bytes(given.vram) / torch.cuda.get_device_properties(0).total_memory
        )
    start = time.perf_counter()
    model = open_tool(given, cuda)
    loaded = time.perf_counter() - start
    ids = torch.randint(3, 500, (1, 16), generator=torch.Generator().manual_seed(0), device="cpu")
    ids = ids.to("cuda") if cuda else ids
    clock = Clock()
    out = model.generate(ids, max_new_tokens=given.tokens, use_cache=True, do_sample=False, streamer=clock)
    seconds = clock.seconds()
    return {
        "tool": given.child, "seconds_a_token": statistics.median(seconds[1:] or seconds), "first": seconds[0],
        "load": loaded, "tokens": out[0, 16:].tolist(), "threads": torch.get_num_threads(),
        "peak_vram_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
    }  # fmt: skip


def open_tool(given: argparse.Namespace, cuda: bool):
    """Open the checkpoint the way a user of the tool would."""
    import torch

    device = "cuda:0" if cuda else "cpu"
    if given.child == "ours":
        from airllm_nb import AutoModel

        return AutoModel.from_pretrained(
            given.folder, compression=given.compression, vram_budget=given.vram if cuda else None,
            ram_budget=given.ram, max_seq_len=256, layer_shards_saving_path=given.shards,
        )  # fmt: skip
    if given.child == "airllm":
        from airllm import AutoModel

        return AutoModel.from_pretrained(
            given.folder, device=device, compression=given.compression, layer_shards_saving_path=given.shards
        )
    from transformers import AutoModelForCausalLM

    if given.child == "resident":
        return AutoModelForCausalLM.from_pretrained(given.folder, dtype="auto").to(device)
    limits = {"cpu": given.ram or "100GiB"} | ({0: given.vram or "4GiB"} if cuda else {})
    return AutoModelForCausalLM.from_pretrained(
        given.folder, dtype=torch.bfloat16, device_map="auto", max_memory=limits, offload_folder=tempfile.mkdtemp()
    )


def run_child(tool: str, given: argparse.Namespace, folder: Path, shards: str) -> dict[str, object]:
    """Measure one tool in a fresh process."""
    command = [
        sys.executable,
        __file__,
        str(folder),
        "--child",
        tool,
        "--tokens",
        str(given.tokens),
        "--shards",
        shards,
    ]
    for name in ("compression", "vram", "ram"):
        if value := getattr(given, name):
            command += [f"--{name}", value]
    path = [str(ROOT), *([str(AIRLLM)] if tool == "airllm" else []), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=given.limit)
    if done.returncode:
        return {"tool": tool, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def install_airllm() -> None:
    """The peer, without what it depends on: that is here already."""
    if not (AIRLLM / "airllm").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(AIRLLM), "airllm==4.0.0"]
        subprocess.run(command, check=True)


def sample_folder() -> Path:
    """SmolLM2-135M as a plain folder."""
    from airllm_nb.checkpoint.sample import sample_model
    from airllm_nb.config import LoadOptions
    from airllm_nb.engine import convert_model

    return convert_model(sample_model(), LoadOptions())


def report(rows: list[dict[str, object]], given: argparse.Namespace, folder: Path) -> None:
    """A Markdown table with ratios to this project."""
    import torch
    import transformers

    machine = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()}-core {cpu_name()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{folder.name}, compression {given.compression}, VRAM {given.vram}, on {machine}; {versions}\n")
    ours = next((row.get("seconds_a_token") for row in rows if row["tool"] == "ours"), None)
    print("| tool | seconds a token | first token | load | against ours | peak VRAM |\n|---|---|---|---|---|---|")
    for row in rows:
        if "error" in row:
            print(f"| {row['tool']} | {row['error']} | | | | |")
            continue
        ratio = f"{row['seconds_a_token'] / ours:.2f} x" if ours else ""
        peak = f"{row['peak_vram_gib']:.2f} GiB" if row["peak_vram_gib"] else ""
        figures = f"{row['seconds_a_token']:.4f} | {row['first']:.3f} | {row['load']:.1f}"
        print(f"| {row['tool']} | {figures} | {ratio} | {peak} |")
    answers = {str(row["tokens"]) for row in rows if "tokens" in row}
    print(f"\nTokens {'are the same in every row' if len(answers) == 1 else 'differ'}.")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint folder (default: SmolLM2-135M)")
    parser.add_argument("--tools", default="resident,ours,airllm", help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--compression", choices=["4bit", "8bit"])
    parser.add_argument("--vram")
    parser.add_argument("--ram")
    parser.add_argument("--shards", help="where converted weights go (default: a temporary folder)")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one tool may take")
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given)))
        return
    if "airllm" in given.tools:
        install_airllm()
    folder = given.folder or sample_folder()
    rows = []
    for tool in given.tools.split(","):
        with tempfile.TemporaryDirectory() as shards:
            rows.append(run_child(tool, given, folder, given.shards or shards))
            print(json.dumps(rows[-1]), file=sys.stderr)
    report(rows, given, folder)


if __name__ == "__main__":
    main()
