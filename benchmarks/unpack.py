"""How fast packed matrices are unpacked: values a second, and packed bytes a second to hold against the link's.

    python benchmarks/unpack.py [--device cuda] [--dtype bfloat16] [--rows 4096] [--columns 8192] [--threads 1]

A Markdown table on standard output; random bytes, the best of several runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import gguf
import torch
from results import machine_line

from airllm_nb.checkpoint.codecs.awq import AWQ
from airllm_nb.checkpoint.codecs.ggml import packed_row_bytes, packing_of
from airllm_nb.checkpoint.codecs.gptq import GPTQ
from airllm_nb.checkpoint.codecs.packing import Packing

Parts = dict[str, torch.Tensor]
GROUP = 128


def cases(rows: int, columns: int) -> Iterator[tuple[str, Packing, Parts]]:
    """Name, packing and the parts of one matrix ``[rows, columns]``."""
    for kind in gguf.GGMLQuantizationType:
        packing = packing_of(kind.value)
        if packing is not None:
            yield f"GGUF {kind.name}", packing, {"weight": noise(rows, packed_row_bytes(kind.value, columns))}
    scale = torch.rand(columns // GROUP, rows, dtype=torch.float16)
    zeros = noise(columns // GROUP, rows // 2).view(torch.int32)
    words = noise(columns // 8, rows * 4).view(torch.int32)
    yield "GPTQ 4-bit", GPTQ(4, GROUP, 1), {"weight": words, "zeros": zeros, "scale": scale}
    words = noise(columns, rows // 2).view(torch.int32)
    yield "AWQ 4-bit", AWQ(GROUP), {"weight": words, "zeros": zeros, "scale": scale}


def noise(rows: int, row_bytes: int) -> torch.Tensor:
    """Bytes that are small numbers, whatever dtype a scale among them has."""
    return torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8) & 0x3B


def best(run: Callable[[], None], device: torch.device, seconds: float = 1.0) -> float:
    """The shortest of the runs that fit in ``seconds``; the first is not counted."""
    shortest, began = float("inf"), None
    while began is None or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if began is None:
            began = time.perf_counter()
        else:
            shortest = min(shortest, time.perf_counter() - start)
    return shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    print(machine_line())
    print(f"\n`benchmarks/unpack.py`, [{given.rows}, {given.columns}] into {given.dtype}, {given.threads} threads:\n")
    print("| format | million values/s | packed GB/s |\n|---|---|---|")
    for name, packing, parts in cases(given.rows, given.columns):
        parts = {key: part.to(device) for key, part in parts.items()}
        shape = (given.columns, given.rows) if packing.transposed else (given.rows, given.columns)
        out = torch.empty(shape, dtype=dtype, device=device)
        seconds = best(lambda packing=packing, parts=parts, out=out: packing.unpack(parts, out), device)
        nbytes = sum(part.numel() * part.element_size() for part in parts.values())
        print(f"| {name} | {out.numel() / seconds / 1e6:.0f} | {nbytes / seconds / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
