"""Mixtures on this machine beside what they are to reach, a row a case; random weights, the VRAM cap enforced.

    python benchmarks/experts.py FOLDER uniform-4bit local-8 resident-4bit     these rows; FOLDER holds the checkpoints
    python benchmarks/experts.py FOLDER uniform-q4_k --tree OTHER              also by another checkout: "× that"
    python benchmarks/experts.py FOLDER --list

``--layers N`` cuts mixtures to N layers, and their budgets with them, so that as large a share of the experts is
cached; speeds are then multiplied by N / all layers, which is pessimistic: the head is not cut. Every case is a process
of its own. The other checkout is given a GGUF file, as it may not read stores of experts; it routes as the weights do,
which makes no difference to what moves everything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
# VRAM that does not shrink with the layers: the head, the KV cache and what a step needs.
FIXED = 1.25
A3B, OSS = "qwen3-30b-a3b", "gpt-oss-120b"
PLAIN, NATIVE = "none", "native"


class Case(NamedTuple):
    """One measurement.

    Attributes
    ----------
    form
        ``none`` (as published), ``4bit`` or a type of GGUF.
    vram
        GiB; ``None`` is a CPU.
    bar
        Tokens a second to reach, of the prompt where ``prompt`` is long.
    times
        How many times as fast as the other checkout to be.
    ram
        Of the experts' bytes, the share that RAM has room for.
    share
        How many times as fast to be as transformers' resident model on the same files.
    layers
        Not more than so many.
    """

    shape: str
    form: str
    vram: float | None
    routing: str | None = None
    bar: float | None = None
    times: float | None = None
    prompt: int = 16
    sweeps: int = 64
    ram: float | None = None
    share: float | None = None
    layers: int | None = None


ROWS = {
    "uniform-4bit": Case(A3B, "4bit", 4, "uniform", 34, 14),
    "uniform-q4_k": Case(A3B, "Q4_K", 4, "uniform", 34, 14),
    "local-4": Case(A3B, "4bit", 4, "local", 42),
    "local-8": Case(A3B, "4bit", 8, "local", 56),
    "local-12": Case(A3B, "4bit", 12, "local", 75),
    "gpt-oss": Case(OSS, PLAIN, 8, "local", layers=6),
    "prompt-512": Case(A3B, "4bit", 4, "local", prompt=512, sweeps=4),
    "prompt-4096": Case(A3B, "4bit", 4, "local", 4000, prompt=4096, sweeps=4),
    "disk": Case(A3B, "4bit", 4, "local", ram=0.25, sweeps=24),
    "resident-4bit": Case(A3B, "4bit", 24, None, 150),
    "resident-q4_k": Case(A3B, "Q4_K", 24, None, 150),
    "dense-7b-4bit": Case("llama-2-7b", "4bit", 8, None, 150, 4),
    "dense-8b-q4_k": Case("llama-3-8b", "Q4_K", 10, None, 120, 4),
    "dense-8b-bf16": Case("llama-3-8b", PLAIN, 24, None, share=3),
    "cpu": Case(A3B, PLAIN, None, "uniform", share=0.8, sweeps=16, layers=4),
    "cpu-q4_k": Case(A3B, "Q4_K", None, "uniform", times=10, sweeps=16, layers=4),
}  # fmt: skip


# --- one measurement, in a process of its own


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """What `BenchResult.as_dict` has; of transformers' model, tokens a second alone."""
    if given.pop("tool", None) == NATIVE:
        return {"tokens_per_second": native(given["model"], given["how"]["sweeps"])}
    from airllm_nb import LoadOptions
    from airllm_nb.bench import bench_model

    options = LoadOptions.create(**given["options"])
    return bench_model(given["model"], options, cap=options.vram_budget is not None, **given["how"]).as_dict()


def native(folder: str, tokens: int) -> float:
    """Tokens a second of the resident model, launched from Python."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    ids = torch.randint(3, 1000, (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    times: list[float] = []

    class Clock:
        def put(self, _: object) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            times.append(time.perf_counter())

    for _ in range(2):
        times.clear()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, min_new_tokens=tokens + 1,
                       do_sample=False, streamer=Clock())  # fmt: skip
    return tokens / (times[-2] - times[1])


def run(given: dict[str, Any], tree: Path, on_cpu: bool) -> dict[str, Any]:
    """:func:`measure` by a checkout, or ``{"error": …}``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-P", str(Path(__file__)), "--child", json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


# --- the table


class Row:
    """One case, measured."""

    def __init__(self, name: str, case: Case, folder: Path, layers: int | None, tree: Path | None):
        sys.path.insert(0, str(ROOT))
        from packed import GGUF_TYPES, make

        from airllm_nb.bench import synthetic
        from airllm_nb.bench.shapes import SHAPES

        self.name, self.case, self.every = name, case, SHAPES[case.shape]["num_hidden_layers"]
        is_mixture = "num_experts_per_tok" in SHAPES[case.shape]
        self.layers = min(layers or self.every, case.layers or self.every) if is_mixture else self.every
        self.scale = 1.0 if case.vram is None else self.layers / self.every
        start = time.perf_counter()
        if case.form in GGUF_TYPES:
            self.model = make(folder, case.shape, self.layers, case.form)
        else:
            self.model = folder / f"{case.shape}-{self.layers}-{case.form}"
            synthetic.write(self.model, case.shape, self.layers, None if case.form == PLAIN else case.form)
        os.sync()
        self.wrote, on_cpu = time.perf_counter() - start, case.vram is None
        asked = {"model": str(self.model), "options": self._options(), "how": self._how()}
        self.found = run(asked, ROOT, on_cpu)
        self.other = self.native = None
        if tree is not None and case.times is not None:
            self.other = run(self._of_other(folder, make), tree, on_cpu)
        if case.share is not None:
            self.native = run(asked | {"tool": NATIVE}, ROOT, on_cpu)

    def _options(self) -> dict[str, Any]:
        case = self.case
        options: dict[str, Any] = {"max_seq_len": case.prompt + case.sweeps + 16, "ram_budget": "100GiB"}
        if case.vram is None:
            return options | {"device": "cpu", "ram_budget": None}
        if case.ram is not None:
            size = sum(path.stat().st_size for path in self.model.glob("layer-*.safetensors"))
            options |= {"ram_budget": int(case.ram * size) + GIB, "direct_io": True}
        fixed = min(FIXED, case.vram)
        return options | {"vram_budget": int((fixed + (case.vram - fixed) * self.scale) * GIB)}

    def _how(self) -> dict[str, Any]:
        return {"sweeps": self.case.sweeps, "prompt_tokens": self.case.prompt, "routing": self.case.routing}

    def _of_other(self, folder: Path, make: Any) -> dict[str, Any]:
        model = self.model
        if self.case.routing is not None and self.case.form == "4bit":
            model = make(folder, self.case.shape, self.layers, "Q4_K")
        how = {"sweeps": min(self.case.sweeps, 8), "prompt_tokens": self.case.prompt}
        return {"model": str(model), "options": self._options(), "how": how}

    @property
    def speed(self) -> float:
        """Tokens a second, as all layers would have them; of a long prompt its tokens."""
        if self.case.prompt > 16:
            return self.case.prompt / self.found["first_token_seconds"] * self.scale
        return float(self.found["tokens_per_second"]) * self.scale

    @property
    def bar(self) -> str:
        case, bars = self.case, []
        bars += [f"≥ {case.bar:g} tok/s"] if case.bar else []
        bars += [f"≥ {case.times:g} × the other checkout"] if case.times else []
        bars += [f"≥ {case.share:g} × transformers' resident model"] if case.share else []
        bars += ["≥ 90 % of the link"] if case.prompt == 512 else []
        return "; ".join(bars) or "reported"

    def verdict(self, resident: Row | None) -> str:
        """What was measured of the bar."""
        said = [_against(self.speed, self.case.bar, "tok/s")] if self.case.bar else []
        for found, wanted, whose in ((self.other, self.case.times, "the other's"), (self.native, self.case.share, "")):
            if found is not None and wanted is not None:
                said.append(found.get("error") or _against(
                    self.speed / (found["tokens_per_second"] * self.scale), wanted, f"× {whose}".strip(),
                ))  # fmt: skip
        experts, probed = self.found.get("experts") or {}, self.found["probed"]
        if self.case.prompt > 16 and experts:
            rate = experts["prompt_bytes"] / self.found["first_token_seconds"]
            said.append(f"{rate / probed['link']:.0%} of the link")
        if experts.get("moved"):
            ratio = experts["moved_bytes"] / (experts["moved"] * experts["expert_bytes"])
            said.append("bytes = missed experts" if abs(ratio - 1) < 1e-9 else f"bytes {ratio:.3f} × missed experts")
        if resident is not None and resident is not self and experts and "error" not in resident.found:
            least = experts["moved_bytes"] / probed["link"] + resident.found["sweep_seconds"]
            said.append(f"{self.found['sweep_seconds'] / least:.2f} × (missed / link + resident step)")
        if self.case.ram is not None and experts:
            said.append(f"read {experts['read_bytes'] / 1e9:.3g} GB a token, disk {probed['disk'] / 1e9:.3g} GB/s")
        return "; ".join(said) or f"{self.speed:.3g} tok/s"

    def text(self, resident: Row | None) -> str:
        """The row of the table."""
        case = f"{self.name} ({self.case.shape}, {self.layers} of {self.every} layers, {self.case.form}"
        case += f", {self._options()['vram_budget'] / GIB:.3g} GiB)" if self.case.vram else ", CPU)"
        if "error" in self.found:
            return f"| {case} | {self.bar} | failed: {self.found['error']} | | | | |"
        experts, link = self.found.get("experts") or {}, self.found["links"].get("link") or {"bytes": 0}
        hits = f"{experts['hit_rate']:.0%}" if experts.get("hit_rate") is not None else ""
        return (f"| {case} | {self.bar} | {self.verdict(resident)} | {self.found['tokens_per_second']:.3g} | {hits} | "
                f"{link['bytes'] / 1e9:.3g} | {self.found['achieved_of_predicted']:.0%} |")  # fmt: skip


def _against(value: float, bar: float, unit: str) -> str:
    return f"**{value:.3g} {unit}** ({'reached' if value >= bar else f'{value / bar:.0%} of it'})"


HEAD = "| case | bar | measured | tokens/s | hits | GB a token over the link | predicted / achieved |"
HEAD += "\n" + "|---" * 7 + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the checkpoints are, or are written")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all that run on this machine")
    parser.add_argument("--layers", type=int, metavar="N", help="cut mixtures to so many layers")
    parser.add_argument("--tree", type=Path, metavar="DIR", help="another checkout to compare with")
    parser.add_argument("--json", action="store_true", help="also print all that was measured, a line a row")
    parser.add_argument("--remove", action="store_true", help="delete each checkpoint after the last row that needs it")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--list", action="store_true", help="only say which rows there are")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(json.loads(given.child))))
        return
    if given.list or given.folder is None:
        print("\n".join(f"{name}: {case}" for name, case in ROWS.items()))
        return
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    given.folder.mkdir(parents=True, exist_ok=True)
    import torch
    from results import machine_line, write_section

    names = given.rows or [name for name, case in ROWS.items() if case.vram is None or torch.cuda.is_available()]
    rows: list[Row] = []
    for at, name in enumerate(names):
        rows.append(row := Row(name, ROWS[name], given.folder, given.layers, given.tree))
        same = [each for each in rows if each.case.vram == 24 and each.model == row.model]
        if given.json:
            print(json.dumps({"row": name, "other": row.other, "native": row.native, **row.found}), flush=True)
        print(row.text(same[0] if same else None), flush=True)
        if given.remove and not any(ROWS[later][:2] == row.case[:2] for later in names[at + 1 :]):
            shutil.rmtree(row.model if row.model.is_dir() else row.model.parent, ignore_errors=True)
    text = "\n".join([machine_line(), "", "`benchmarks/experts.py`:", "", HEAD])
    residents = {row.model: row for row in rows if row.case.vram == 24}
    text = "\n".join([text, *(row.text(residents.get(row.model)) for row in rows)])
    print(text, flush=True)
    if given.write:
        write_section("experts", text)


if __name__ == "__main__":
    main()
