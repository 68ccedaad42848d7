"""Seconds a sweep of this project on one checkpoint, as `airllm-nb bench` measures them; the last line is JSON.

python benchmarks/sweep.py FOLDER --vram 4GiB --ram 100GiB --tokens 6 [--compression 4bit] [--no-prefetch] [--cap]
"""

from __future__ import annotations

import argparse
import json
import time

began = time.perf_counter()
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401

from airllm_nb import LoadOptions  # noqa: E402
from airllm_nb.bench import bench_model  # noqa: E402

imported = time.perf_counter() - began

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("--vram")
parser.add_argument("--ram")
parser.add_argument("--tokens", type=int, default=6, help="of each generation, the first one included")
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--compression")
parser.add_argument("--shards")
parser.add_argument("--no-prefetch", action="store_true")
parser.add_argument("--direct-io", action=argparse.BooleanOptionalAction)
parser.add_argument("--cap", action="store_true", help="enforce --vram through the allocator")
given = parser.parse_args()

options = LoadOptions.create(
    compression=given.compression, vram_budget=given.vram, ram_budget=given.ram, max_seq_len=256,
    prefetching=not given.no_prefetch, layer_shards_saving_path=given.shards, direct_io=given.direct_io,
)  # fmt: skip
result = bench_model(given.folder, options, sweeps=given.tokens - 1, batch=given.batch, cap=given.cap)
print(result)
print(json.dumps({"import_seconds": round(imported, 3), **result.as_dict()}))
