"""Write a checkpoint of a known shape with random weights: what speed depends on, without a download.

python benchmarks/synthetic.py FOLDER --shape llama-2-70b --layers 8 [--packed 4bit]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from airllm_nb.bench.synthetic import SHAPES, write
from airllm_nb.errors import AirLLMError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--shape", choices=SHAPES, default="llama-2-70b")
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--packed", choices=["4bit", "8bit"])
given = parser.parse_args()
start = time.perf_counter()
try:
    size = write(given.folder, given.shape, given.layers, given.packed)
except AirLLMError as error:
    sys.exit(str(error))
print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")
