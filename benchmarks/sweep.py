"""Seconds a sweep of this project on one checkpoint, with the VRAM cap enforced by the allocator; one JSON line.

python benchmarks/sweep.py FOLDER --vram 4GiB --ram 100GiB --tokens 6 [--compression 4bit] [--no-prefetch]
"""

from __future__ import annotations

import argparse
import json
import time

began = time.perf_counter()
import torch  # noqa: E402
import transformers  # noqa: E402

from airllm_nb import LoadOptions, open_model  # noqa: E402
from airllm_nb.config import parse_bytes  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("--vram", default=None)
parser.add_argument("--ram", default=None)
parser.add_argument("--tokens", type=int, default=6)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--compression", default=None)
parser.add_argument("--shards", default=None)
parser.add_argument("--no-prefetch", action="store_true")
parser.add_argument("--cap", action="store_true", help="enforce --vram through the allocator")
given = parser.parse_args()

imported = time.perf_counter() - began
cuda = torch.cuda.is_available()
if cuda and given.cap and given.vram:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(parse_bytes(given.vram) / total)
options = LoadOptions.create(
    compression=given.compression, vram_budget=given.vram, ram_budget=given.ram, max_seq_len=256,
    batch_size=given.batch, prefetching=not given.no_prefetch, layer_shards_saving_path=given.shards,
)  # fmt: skip
start = time.perf_counter()
with open_model(given.folder, options) as model:
    opened = time.perf_counter() - start
    ids = torch.randint(3, 500, (given.batch, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    start = time.perf_counter()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=given.tokens, min_new_tokens=given.tokens, do_sample=False
    )
    first = time.perf_counter() - start
    start = time.perf_counter()
    again = model.generate(
        ids, attention_mask=mask, max_new_tokens=given.tokens, min_new_tokens=given.tokens, do_sample=False
    )
    second = time.perf_counter() - start
    summary = model.trace.summary()
    print(str(model.plan))
    print(
        json.dumps(
            {
                "transformers": transformers.__version__,
                "import_s": round(imported, 3),
                "open_s": round(opened, 3),
                "first_s": round(first, 3),
                "second_s": round(second, 3),
                "same": bool(torch.equal(out, again)),
                "tokens": out[0, 16:].tolist(),
                "sweep_s": round(summary["sweep_seconds"], 4),
                "predicted_s": round(summary["predicted_sweep_seconds"], 4),
                "link_gb_s_sweep": round(model.plan.streamed_bytes / summary["sweep_seconds"] / 1e9, 2),
                "probe_gb_s": {
                    name: round(getattr(model.plan.machine, name) / 1e9, 2) for name in ("disk", "link", "memory")
                },
                "stages": {
                    k: {"s": round(v["seconds"], 3), "gb_s": round(v["gb_per_second"], 2)}
                    for k, v in summary["stages"].items()
                },
                "peak_gib": round(summary["peak_device_bytes"] / 2**30, 3),
                "reserved_peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3) if cuda else None,
            }
        )
    )
