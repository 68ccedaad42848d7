"""What streaming a unit costs the host beyond the native forward: 80 blocks so small that nothing else counts.

    python benchmarks/host_cost.py [--profile]

One JSON line: milliseconds a token of the resident model, of this project with everything resident and with units
streaming, and the microseconds that a streamed unit adds to the second. On a CPU a VRAM budget rehearses the device.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from airllm_nb import LoadOptions, open_model

LAYERS, TOKENS, REPEATS = 80, 30, 4
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--profile", action="store_true", help="print where the host's time goes, by function, to stderr")
given = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
ids = torch.randint(3, 100, (1, 16), generator=torch.Generator().manual_seed(0)).to(device)


def milliseconds(model: Any) -> float:
    """A token, at best."""
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        model.generate(ids, do_sample=False, **how)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / TOKENS * 1e3


with tempfile.TemporaryDirectory() as folder:
    width = 256 if device == "cuda" else 32
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=4, vocab_size=200)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(Path(folder))
    resident = LlamaForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "resident_ms": milliseconds(resident)}
    room = {"max_seq_len": 256, "ram_budget": "2GiB"}
    with open_model(folder, LoadOptions.create(vram_budget="2GiB", **room)) as model:
        found["fits_ms"], needs, weights = milliseconds(model), model.plan.needs.total, model.plan.tier_bytes("gpu")
    with open_model(folder, LoadOptions.create(vram_budget=needs + weights // 8, **room)) as model:
        found["streamed_ms"], found["streamed_units"] = milliseconds(model), model.plan.tiers.count("ram")
        if given.profile:
            with cProfile.Profile() as profile:
                milliseconds(model)
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)
found["us_a_streamed_unit"] = (found["streamed_ms"] - found["fits_ms"]) / found["streamed_units"] * 1e3
print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}))
