"""How fast packed matrices are unpacked and multiplied: packed bytes a second, to hold against the link's.

    python benchmarks/unpack.py [--device cuda] [--dtypes bfloat16 float16] [--no-kernels]
    python benchmarks/unpack.py --rows 1536 --columns 2048 --slots 8   # an expert of Qwen3-30B-A3B, eight of them

A Markdown table on standard output; random bytes, the best of several runs. The matrix is the largest of a 70B model.
Products are taken from a graph of launches over several matrices, as a token is: Python's time is not in them, and what
the last one left in the GPU's cache is of no use to the next.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from results import machine_line

from airllm_nb.encoding import nf4
from airllm_nb.encoding.affine8 import Affine8
from airllm_nb.encoding.awq import AWQ
from airllm_nb.encoding.base import Encoding
from airllm_nb.encoding.bnb import Int8
from airllm_nb.encoding.fp8 import FP8
from airllm_nb.encoding.ggml import encoding_of, packed_row_bytes
from airllm_nb.encoding.gptq import GPTQ
from airllm_nb.encoding.kernels import launch
from airllm_nb.encoding.mxfp4 import MXFP4
from airllm_nb.encoding.nf4 import NF4

Parts = dict[str, torch.Tensor]
Case = tuple[str, Encoding, Callable[[], Parts]]
GROUP = 128
WITH_KERNEL = "nf4, by bitsandbytes"
CACHE_BYTES = 256 << 20  # more than a GPU's cache holds


def cases(rows: int, columns: int) -> Iterator[Case]:
    """Name, encoding and what makes the parts of one matrix ``[rows, columns]``."""
    yield from gptq_cases(rows, columns)
    scale = {"scale": torch.full((rows // 128, columns // 128), 0.5)}
    yield "FP8, blocks", FP8((128, 128)), lambda: {
        "weight": noise(rows, columns).view(torch.float8_e4m3fn), **scale,
    }  # fmt: skip
    # What lies there are its columns.
    yield "MXFP4", MXFP4(), lambda: {"weight": noise(columns, rows // 2), "scale": noise(columns, rows // 32) + 90}
    nested = {"nested_absmax": torch.rand(-(-rows * columns // 64 // 256)), "nested_quant_map": torch.rand(256)}
    for name in ("nf4, without kernels", WITH_KERNEL):
        yield name, NF4(64, 256, 0.01), lambda: {
            "weight": noise(rows, columns // 2), "absmax": noise(rows, columns // 64), **nested,
        }  # fmt: skip
    yield "4bit", NF4(), lambda: {
        "weight": noise(rows, columns // 2), "absmax": torch.rand(rows, columns // 64),
    }  # fmt: skip
    yield "8bit", Affine8(), lambda: {
        "weight": noise(rows, columns), "spread": torch.rand(rows, columns // 32).half(),
        "minimum": torch.rand(rows, columns // 32).half(),
    }  # fmt: skip
    yield "int8", Int8(), lambda: {"weight": noise(rows, columns).view(torch.int8), "scale": torch.rand(rows)}
    try:
        import gguf
    except ModuleNotFoundError:
        print("no GGUF types: the package gguf is missing", file=sys.stderr)
        return
    for kind in gguf.GGMLQuantizationType:
        if (encoding := encoding_of(kind.value)) is not None:
            nbytes = packed_row_bytes(kind.value, columns)
            yield f"GGUF {kind.name}", encoding, lambda nbytes=nbytes: {"weight": noise(rows, nbytes)}


def gptq_cases(rows: int, columns: int) -> Iterator[Case]:
    """GPTQ in all its bits and with its inputs in order of activation, and AWQ."""
    order = {"group_index": torch.randperm(columns).int() // GROUP}

    def parts(bits: int, words: tuple[int, int]) -> Parts:
        groups = columns // GROUP
        return {
            "weight": noise(words[0], 4 * words[1]).view(torch.int32),
            "zeros": noise(groups, rows * bits // 8).view(torch.int32),
            "scale": torch.rand(groups, rows, dtype=torch.float16),
        }

    for bits in (4, 3, 2, 8):
        of_bits = functools.partial(parts, bits, (columns * bits // 32, rows))
        yield f"GPTQ {bits}-bit", GPTQ(bits, GROUP, 1), of_bits
        if bits in (3, 4):
            yield f"GPTQ {bits}-bit, g_idx", GPTQ(bits, GROUP, 1, True), lambda made=of_bits: made() | order
    yield "AWQ 4-bit", AWQ(GROUP), lambda: parts(4, (columns, rows // 8))


def noise(rows: int, row_bytes: int) -> torch.Tensor:
    """Bytes that are small numbers, whatever dtype a scale among them has; one block over and over."""
    block = torch.randint(0, 256, (min(rows * row_bytes, 16_777_213),), dtype=torch.uint8) & 0x3B
    return block.repeat(-(-rows * row_bytes // len(block)))[: rows * row_bytes].view(rows, row_bytes)


def best(run: Callable[[], None], device: torch.device, seconds: float = 0.5) -> float:
    """The shortest of the runs that fit in ``seconds``, one at least; the first is not counted."""
    shortest, began = float("inf"), None
    while began is None or shortest == float("inf") or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if began is None:
            began = time.perf_counter()
        else:
            shortest = min(shortest, time.perf_counter() - start)
    return shortest


def measured(encoding: Encoding, parts: Parts, shape: tuple[int, int], dtype: str, device: torch.device) -> float:
    """Seconds."""
    out = torch.empty(shape[::-1] if encoding.transposed else shape, dtype=getattr(torch, dtype), device=device)
    with torch.inference_mode():
        return best(lambda: encoding.unpack(parts, out), device)


def product_rate(encoding: Encoding, parts: Parts, shape: tuple[int, int], nbytes: int, slots: int) -> str:
    """Encoded GB/s of a product with a vector, or out of ``slots``; empty where no kernel computes on packed bytes."""
    device = parts["weight"].device
    if encoding == MXFP4():
        encoding = MXFP4(transposed=False)  # an expert's product is with what lies there
    number = -(-CACHE_BYTES // nbytes) + 1 + slots
    matrices = {name: part.expand(number, *part.shape).contiguous() for name, part in parts.items()}
    x = torch.rand(1, shape[1], dtype=torch.float16, device=device)
    out = torch.empty(slots, shape[0], dtype=x.dtype, device=device)
    places = [torch.randperm(number, device=device)[:slots] for _ in range(number)]

    def product(i: int) -> bool:
        if slots:
            return launch.multiply_slots(encoding, x, matrices, places[i], out)
        return encoding.multiply(x, {name: part[i] for name, part in matrices.items()}, shape, None) is not None

    with torch.inference_mode():
        if device.type != "cuda" or not product(0):
            return ""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(number):
                product(i)
        return f"{number * max(slots, 1) * nbytes / best(graph.replay, device) / 1e9:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--rows", type=int, default=28672, help="a multiple of 128")
    parser.add_argument("--columns", type=int, default=8192, help="a multiple of 256")
    parser.add_argument("--slots", type=int, default=0, help="products out of so many slots at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-kernels", action="store_true", help="by PyTorch alone, as on an old GPU")
    parser.add_argument("--only", nargs="+", default=[""], help="formats whose name has one of these words in it")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device, has_kernels = torch.device(given.device), nf4.has_kernels
    if given.no_kernels:
        launch.usable = lambda _: False
    print(machine_line())
    kinds = " | ".join(given.dtypes)
    how = f"{given.device}, {given.threads} threads{', no kernels' * given.no_kernels}"
    print(f"\n`benchmarks/unpack.py`, [{given.rows}, {given.columns}], {how}; packed GB/s:\n")
    products = f"products out of {given.slots} slots" if given.slots else "product with a vector"
    print(f"| format | bytes a value | {kinds} | {products} |")
    print("|---|---|---|" + "---|" * len(given.dtypes))
    for name, encoding, make in cases(given.rows, given.columns):
        if not any(word in name for word in given.only) or (name == WITH_KERNEL and not has_kernels(device)):
            continue
        nf4.has_kernels = lambda _, allowed=name == WITH_KERNEL: allowed
        parts = {key: part.to(device) for key, part in make().items()}
        nbytes = sum(part.numel() * part.element_size() for part in parts.values())
        shape = (given.rows, given.columns)
        rates = [nbytes / measured(encoding, parts, shape, dtype, device) / 1e9 for dtype in given.dtypes]
        figures = " | ".join(f"{rate:.2f}" for rate in rates)
        product = product_rate(encoding, parts, shape, nbytes, given.slots)
        print(f"| {name} | {nbytes / given.rows / given.columns:.3f} | {figures} | {product} |", flush=True)


if __name__ == "__main__":
    main()
