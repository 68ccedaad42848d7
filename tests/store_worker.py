"""Converts a checkpoint in a process of its own, so that a test can kill it: ``store_worker.py SOURCE STORE CODEC``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from airllm_nb.encoding.formats import get_encoding
from airllm_nb.intake.find.local import fingerprint_of
from airllm_nb.progress import Progress
from airllm_nb.store.jobs import encode_jobs
from airllm_nb.store.manifest import StoreMeta
from airllm_nb.store.writer import write_store
from airllm_nb.tensors.index import read_index


def anonymous_bytes() -> int:
    """Anonymous memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def convert(source: Path, target: Path, codec: str, pause: float = 0.0) -> int:
    """Convert, with a pause at every step to widen the moments of a kill; returns the growth of anonymous memory."""
    torch.set_num_threads(2)
    index = read_index(source)
    encoder = get_encoding(codec)
    encoder.require()
    encoder.encode(torch.zeros(4, 64))
    rest = peak = anonymous_bytes()

    def step(progress: Progress) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())
        sys.stdout.write(f"{progress.stage} {progress.done} {progress.total}\n")
        sys.stdout.flush()
        time.sleep(pause)

    compressed = [name for name in index if "_proj" in name]
    jobs = encode_jobs(index, encoder, compressed, torch.bfloat16)
    write_store(target, jobs, StoreMeta(codec, "bfloat16", fingerprint_of(source, index.files)), progress=step)
    return peak - rest


if __name__ == "__main__":
    grown = convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]) if len(sys.argv) > 4 else 0.0)
    sys.stdout.write(f"grown {grown}\n")
