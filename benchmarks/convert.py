"""Speed of a conversion beside what the disks can do, and the wait for the first token after it; one JSON line.

python benchmarks/convert.py SOURCE_FOLDER OUT_FOLDER [--compression 4bit] [--cold]

The limit is the slower of reading the source and writing the store: min(read, write * source / store). Both are
measured here, just before: reading by eight threads in pieces of 8 MiB, through the page cache and past it, each on a
part of the source of its own; writing one file into OUT_FOLDER and syncing it. Where both are on one disk, no
conversion reaches that: "both" is the rate of reading the source while a file grows beside it as the store does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import convert_model, open_model, plan_model
from airllm_nb.progress import Progress
from airllm_nb.tensors.files import Files
from airllm_nb.tensors.index import read_index

PIECE, THREADS = 8 << 20, 8
MOST_READ, MOST_WRITTEN = 4 << 30, 2 << 30


def drop_caches(files: tuple[Path, ...]) -> str:
    """Have the source on the disk only; returns how."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "drop_caches"
    except OSError as error:
        sys.stderr.write(f"the page cache may not be dropped ({error}); only the source's own pages are given up\n")
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "fadvise"


def read_speed(pieces: list[tuple[Path, int, int]], direct: bool) -> float:
    """Bytes a second over ``(path, offset, bytes)``."""
    files = Files(direct)
    buffers = [memoryview(bytearray(PIECE)) for _ in range(THREADS)]  # touched: page faults are not the disk's

    def read(piece: tuple[Path, int, int]) -> None:
        path, offset, nbytes = piece
        buffer = buffers.pop()
        files.read(path, offset, buffer[:nbytes])
        buffers.append(buffer)

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, pieces))
    seconds = time.perf_counter() - start
    files.close()
    return sum(nbytes for _, _, nbytes in pieces) / seconds


def write_speed(folder: Path, most: int = MOST_WRITTEN) -> float:
    """Bytes a second of one file written and synced."""
    path, block = folder / "speed.tmp", os.urandom(PIECE)
    count = max(min(most, shutil.disk_usage(folder).free // 4) // PIECE, 1)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return count * PIECE / seconds


def both_speed(pieces: list[tuple[Path, int, int]], folder: Path, stored: float) -> float:
    """Bytes a second of reading ``pieces`` past the cache while ``stored`` bytes are written for each byte of them."""
    nbytes = sum(size for _, _, size in pieces)
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_speed, folder, int(nbytes * stored))
        read_speed(pieces, True)
        writing.result()
    return nbytes / (time.perf_counter() - start)


def pieces_of(files: tuple[Path, ...]) -> list[tuple[Path, int, int]]:
    sizes = [(path, path.stat().st_size) for path in files]
    return [(path, at, min(PIECE, size - at)) for path, size in sizes for at in range(0, size, PIECE)]


def first_token(source: str, options: LoadOptions) -> float:
    """Seconds from nothing loaded to one token."""
    start = time.perf_counter()
    with open_model(source, options) as model:
        ids = torch.tensor([[1, 5, 9]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path, help="a folder that is empty or not there")
    parser.add_argument("--compression", choices=["4bit", "8bit"], default="4bit")
    parser.add_argument("--cold", action="store_true", help="drop the page cache first, and again before converting")
    parser.add_argument("--device", default=None)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if any(given.out.iterdir()):
        parser.error(f"{given.out} is not empty")
    options = LoadOptions.create(
        compression=given.compression, layer_shards_saving_path=given.out, max_seq_len=256, device=given.device
    )
    start = time.perf_counter()
    plan_model(given.source, options)  # libraries and CUDA are loaded once a session, whatever comes after
    warm_up = time.perf_counter() - start

    index = read_index(Path(given.source))
    pieces = pieces_of(index.files)
    part = min(MOST_READ // PIECE, len(pieces) // 2 or 1)
    how = drop_caches(index.files) if given.cold else None
    buffered, direct = read_speed(pieces[:part], False), read_speed(pieces[-part:], True)
    os.sync()
    write = write_speed(given.out)
    if given.cold:
        drop_caches(index.files)

    steps: list[float] = []

    def progress(step: Progress) -> None:
        if step.stage == "convert":
            steps.append(time.perf_counter())

    start = time.perf_counter()
    folder = convert_model(given.source, options, progress=progress)
    seconds = time.perf_counter() - start
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    limit = min(max(buffered, direct), write * index.nbytes / stored)
    token = first_token(given.source, options)
    if given.cold:
        drop_caches(index.files)
    both = both_speed(pieces[:part], folder, stored / index.nbytes)
    rates = {"read_buffered": buffered, "read_direct": direct, "write_synced": write, "limit": limit, "both": both,
             "source": index.nbytes / seconds, "store": stored / seconds}  # fmt: skip
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and given.device != "cpu" else "cpu",
        "compression": given.compression,
        "cold": how,
        "source_gb": round(index.nbytes / 1e9, 3),
        "store_gb": round(stored / 1e9, 3),
        "warm_up_s": round(warm_up, 3),
        "seconds": round(seconds, 3),
        "before_first_step_s": round(steps[0] - start, 3),
        "after_last_step_s": round(start + seconds - steps[-1], 3),
        "gb_s": {name: round(rate / 1e9, 3) for name, rate in rates.items()},
        "limited_by": "read" if limit < write * index.nbytes / stored else "write",
        "fraction_of_limit": round(rates["source"] / limit, 3),
        "fraction_of_both": round(rates["source"] / both, 3),
        "first_token_s": round(token, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
