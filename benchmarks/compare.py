"""Seconds a token of this project beside AirLLM 4.0.0, transformers + accelerate and the resident model.

    python benchmarks/compare.py                        SmolLM2-135M on this machine
    python benchmarks/compare.py FOLDER --vram 4GiB --tools ours,airllm,accelerate --compression 4bit --write NAME

Every tool runs in a process of its own, one after the other, on the same files, with the same prompt and VRAM cap. A
first generation warms up (on a GPU attention kernels are planned for each new length); the figure is the median over
the tokens after the first of the second one. AirLLM is installed into build/airllm for this only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import machine_line, write_section

ROOT = Path(__file__).parents[1]
AIRLLM = ROOT / "build" / "airllm"
TOOLS = {
    "resident": "resident (transformers)",
    "ours": "this project",
    "airllm": "AirLLM 4.0.0",
    "accelerate": "transformers + accelerate, CPU offload",
    "accelerate-disk": "transformers + accelerate, disk offload",
}
PROMPT = 16


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


def measure(given: argparse.Namespace) -> dict[str, Any]:
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
    ids = torch.randint(3, 500, (1, PROMPT), generator=torch.Generator().manual_seed(0), device="cpu")
    ids = ids.to("cuda") if cuda else ids
    for _ in range(2):
        clock = Clock()
        out = model.generate(ids, max_new_tokens=given.tokens, use_cache=True, do_sample=False, streamer=clock)
    seconds = clock.seconds()
    return {
        "tool": given.child, "seconds_a_token": statistics.median(seconds[1:] or seconds), "first": seconds[0],
        "load": loaded, "tokens": out[0, PROMPT:].tolist(), "threads": torch.get_num_threads(),
        "peak_vram_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
    }  # fmt: skip


def open_tool(given: argparse.Namespace, cuda: bool) -> Any:
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
    on_host = "1GiB" if given.child == "accelerate-disk" else given.ram or "100GiB"
    # What accelerate keeps on the GPU leaves no room for the layers that it brings there: hence less than the cap.
    limits = {"cpu": on_host} | ({0: given.accelerate_vram or given.vram} if cuda else {})
    return AutoModelForCausalLM.from_pretrained(
        given.folder, dtype=torch.bfloat16, device_map="auto", max_memory=limits, offload_folder=tempfile.mkdtemp()
    )


def run_child(tool: str, given: argparse.Namespace, folder: Path, shards: str) -> dict[str, Any]:
    """Measure one tool in a fresh process."""
    command = [sys.executable, __file__, str(folder), "--child", tool, "--tokens", str(given.tokens)]
    command += ["--shards", shards]
    for name in ("compression", "vram", "ram", "accelerate_vram"):
        if value := getattr(given, name):
            command += [f"--{name.replace('_', '-')}", value]
    path = [str(ROOT), *([str(AIRLLM)] if tool == "airllm" else []), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
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
    """SmolLM2-135M as transformers saves it: AirLLM cannot read other names of shards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from airllm_nb.checkpoint.hub.sample import sample_model
    from airllm_nb.config import LoadOptions
    from airllm_nb.engine.facade import convert_model

    folder = ROOT / "build" / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors.index.json").is_file():
        store = convert_model(sample_model(), LoadOptions())
        AutoTokenizer.from_pretrained(store).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(store, dtype="auto").save_pretrained(folder, max_shard_size="100MB")
    return folder


def report(rows: list[dict[str, Any]], given: argparse.Namespace, folder: Path) -> str:
    """A Markdown table with ratios to this project."""
    ours = next((row.get("seconds_a_token") for row in rows if row["tool"] == "ours"), None)
    cap = f", VRAM capped at {given.vram}" if given.vram else ""
    lines = [f"{machine_line()}", "", f"`benchmarks/compare.py`, one run; {folder.name}, "
             f"compression {given.compression or 'none'}{cap}, {given.tokens} tokens after {PROMPT}:", "",
             "| tool | seconds a token | against ours | first token | load | peak VRAM |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        name = TOOLS[row["tool"]]
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error']} | | | | |")
            continue
        ratio = f"{row['seconds_a_token'] / ours:.2f} x" if ours else ""
        peak = f"{row['peak_vram_gib']:.2f} GiB" if row["peak_vram_gib"] else ""
        figures = f"{row['seconds_a_token']:.4f} | {ratio} | {row['first']:.3f} | {row['load']:.1f}"
        lines.append(f"| {name} | {figures} | {peak} |")
    answers = {str(row["tokens"]) for row in rows if "tokens" in row}
    return "\n".join([*lines, "", f"Tokens {'are the same in every row' if len(answers) == 1 else 'differ'}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint folder (default: SmolLM2-135M)")
    parser.add_argument("--tools", default="resident,ours,airllm", help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--compression", choices=["4bit", "8bit"])
    parser.add_argument("--vram")
    parser.add_argument("--ram")
    parser.add_argument("--accelerate-vram", help="what accelerate may fill; it needs room for a layer beside that")
    parser.add_argument("--shards", help="where converted weights go (default: a temporary folder)")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one tool may take")
    parser.add_argument("--write", metavar="NAME", help="put the table into RESULTS.md, in the section of this name")
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given)))
        return
    tools = given.tools.split(",")
    if "airllm" in tools:
        install_airllm()
    folder = given.folder or sample_folder()
    rows = []
    for tool in tools:
        with tempfile.TemporaryDirectory() as shards:
            rows.append(run_child(tool, given, folder, given.shards or shards))
            print(json.dumps(rows[-1]), file=sys.stderr)
    text = report(rows, given, folder)
    print(text)
    if given.write:
        write_section(given.write, text)


if __name__ == "__main__":
    main()
