"""Milliseconds a token with everything on the GPU: eager (`exact`), and with the decode step as one CUDA graph.

    python benchmarks/graph.py FOLDER [--tokens 96] [--batch 1] [--only graph] [--native] [--profile]

One JSON line: what `generate` takes a token by the clock, what a sweep takes on the device, how many tokens differ,
and with `--native` the same for the resident model of transformers.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import pstats
import sys
import time
from typing import Any

import torch

from airllm_nb import LoadOptions, open_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("--tokens", type=int, default=96)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--prompt", type=int, default=64)
parser.add_argument("--only", choices=("eager", "graph"), help="one of the two")
parser.add_argument("--native", action="store_true", help="the resident model of transformers too")
parser.add_argument("--profile", action="store_true", help="where the host's time goes, by function, to stderr")
parser.add_argument("--kernels", action="store_true", help="which kernels a replay runs, to stderr")
given = parser.parse_args()
logging.basicConfig(level=logging.WARNING)
logging.getLogger("airllm_nb.decode").setLevel(logging.DEBUG)
ids = torch.randint(300, 900, (given.batch, given.prompt), generator=torch.Generator().manual_seed(0)).cuda()
how = {"attention_mask": torch.ones_like(ids), "do_sample": False}


def run(model: Any, tokens: int) -> tuple[float, torch.Tensor]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **how)
    torch.cuda.synchronize()
    return time.perf_counter() - start, found[:, ids.shape[1] :]


def milliseconds(model: Any) -> tuple[float, torch.Tensor]:
    """A token, the prompt and the first ones left out, at best of three; and the tokens."""
    run(model, 16)
    few, many = [], []
    for _ in range(3):
        few.append(run(model, 16)[0])
        seconds, found = run(model, given.tokens)
        many.append(seconds)
    return (min(many) - min(few)) / (given.tokens - 16) * 1e3, found


found: dict[str, Any] = {"folder": given.folder.rpartition("/")[2], "batch": given.batch, "prompt": given.prompt}
answers: dict[str, torch.Tensor] = {}
if given.native:
    from transformers import AutoModelForCausalLM

    native = AutoModelForCausalLM.from_pretrained(given.folder, dtype="auto").cuda().eval()
    found["native_ms"], answers["native"] = milliseconds(native)
    del native
    torch.cuda.empty_cache()
for name, exact in (("eager", True), ("graph", False)):
    if given.only not in (None, name):
        continue
    torch.cuda.reset_peak_memory_stats()
    options = LoadOptions.create(exact=exact, max_seq_len=1024, batch_size=given.batch, vram_budget="40GiB")
    with open_model(given.folder, options) as model:
        first, _ = run(model, 32)
        found[f"{name}_first_32_s"] = first
        found[f"{name}_ms"], answers[name] = milliseconds(model)
        found[f"{name}_sweep_ms"] = (model.trace.median_sweep() or 0) * 1e3
        found[f"{name}_peak_mib"] = torch.cuda.max_memory_reserved() >> 20
        if not exact:
            found["replayed"], found["sweeps"] = model.trace.replayed, model.trace.sweeps
            graph = getattr(model._residence.steps, "_graph", None)
            found["graph_mib"] = graph and [graph.nbytes >> 20, graph.cache.nbytes >> 20]
            if given.kernels and graph:
                from torch.profiler import ProfilerActivity, profile

                with profile(activities=[ProfilerActivity.CUDA]) as kernels:
                    for _ in range(4):
                        graph._replay()
                    torch.cuda.synchronize()
                sys.stderr.write(
                    kernels.key_averages().table(sort_by="cuda_time_total", row_limit=18, max_name_column_width=60)
                )
            if given.profile:
                with cProfile.Profile() as profile:
                    run(model, given.tokens)
                pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(28)
    torch.cuda.empty_cache()
for name, each in answers.items():
    if name != "graph" and "graph" in answers:
        found[f"differ_from_{name}"] = int((each != answers["graph"]).sum())
print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}))
