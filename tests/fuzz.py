"""Damages everything that a model's folder is read from, and says what that does.

Whatever the damage, there is an ``AirLLMError`` of one line, or what runs is what the reference makes of these bytes.
``make fuzz`` runs this for long, in child processes with limits; tests/whole/test_fuzz.py some thousands of mutations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fuzz_models import BASES, opened, quiet, reference

from airllm_nb.checkpoint.bin.in_place import pickle_index
from airllm_nb.checkpoint.bin.pickles import load_pickle
from airllm_nb.checkpoint.gguf.header import read_gguf
from airllm_nb.errors import AirLLMError
from airllm_nb.store.manifest import open_store
from airllm_nb.tensors.index import read_header, read_index

SECONDS, MEMORY = 20, 512 << 20
NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, -1.5, 1e30, float("nan"))
OTHERS: tuple[Any, ...] = (None, True, False, "", "x", "../x", "0", [], {}, [1, 2], {"a": 1}, [[]], "\ud800", "x" * 300)


class Finding(AssertionError):
    """Something that must not happen."""


# ---- what is done to a file ------------------------------------------------------------------------------------------


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut off, put in, left out, swapped, or written twice."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(raw) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 64))
        match chance.randrange(7):
            case 0 if raw:
                raw[min(at, len(raw) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                raw[at : at + size] = chance.randbytes(min(size, len(raw) - at))
            case 2:
                del raw[at:]
            case 3:
                del raw[at : at + size]
            case 4:
                raw[at:at] = chance.randbytes(size)
            case 5:
                raw[at:at] = raw[at : at + size]
            case _:
                number = chance.choice((0, 1, 8, len(raw), 2**31, 2**62, 2**64 - 1))
                raw[at : at + 8] = struct.pack("<Q", number)[: len(raw) - at]
    return bytes(raw)


def changed(chance: random.Random, value: Any) -> Any:
    """A JSON value with one to three places that say something else."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return chance.choice((*NUMBERS, *OTHERS))
        holder, key = chance.choice(places)
        old = holder[key]
        match chance.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[f"{key}_"] = holder.pop(key)
            case 2:
                holder[key] = json.loads(json.dumps(chance.choice(list(places))[0]))
            case 3 | 4 if isinstance(old, (int, float)):
                holder[key] = old + chance.choice((-1, 1, 8, -8, old))
            case 5 if isinstance(old, str) and old:
                holder[key] = damaged(chance, old.encode()).decode("utf-8", "replace")
            case 6:
                holder[key] = [old] if chance.random() < 0.5 else {"x": old}
            case _:
                holder[key] = chance.choice((*NUMBERS, *OTHERS))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def json_file(chance: random.Random, data: bytes) -> bytes:
    if chance.random() < 0.25:
        return damaged(chance, data)
    return json.dumps(changed(chance, json.loads(data))).encode("utf-8", "replace")


def header(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else, or whose length is of another one."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    match chance.randrange(6):
        case 0:
            return damaged(chance, data[: 8 + length]) + rest
        case 1:  # by its padding, most of all
            return (length + chance.choice((-8, -4, -2, -1, 1, 2, 4, 8))).to_bytes(8, "little") + text + rest
        case 2:
            rest = rest[: -chance.randrange(1, 9)] if chance.random() < 0.5 else rest + bytes(chance.randrange(1, 9))
        case 3:  # the same in other words
            table = dict(sorted(json.loads(text).items(), key=lambda _: chance.random()))
            table["__metadata__"] = chance.choice(({}, {"format": "pt"}, None, {"x": "y"}, [], {"x": 1}, "x"))
            text = json.dumps(table, indent=chance.choice((None, 1))).encode() + b" " * chance.randrange(9)
        case _:
            text = json.dumps(changed(chance, json.loads(text))).encode()
            text += b" " * (-len(text) % chance.choice((1, 8)))
    return len(text).to_bytes(8, "little") + text + rest


def gguf(chance: random.Random, data: bytes) -> bytes:
    """Of a GGUF file mostly what lies before the weights."""
    end = min(len(data), 4000)
    return damaged(chance, data[:end]) + data[end:] if chance.random() < 0.9 else damaged(chance, data)


def archive(chance: random.Random, data: bytes) -> bytes:
    """A .bin file: its bytes, or those of one of its records, zipped anew."""
    if chance.random() < 0.4:
        return damaged(chance, data)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(data)
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
            names = old.namelist()
            victim = chance.choice((next(name for name in names if name.endswith("data.pkl")), chance.choice(names)))
            for name in names:
                record = old.read(name)
                new.writestr(name, damaged(chance, record) if name == victim else record)
        target.seek(0)
        return target.read()


# ---- what must hold --------------------------------------------------------------------------------------------------


def header_holds(folder: Path, file: Path) -> None:
    """Exactly as strict as the reference, but for what it takes for an entry though the format has no such thing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            theirs = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        theirs = None
    try:
        ours = {name: info.shape for name, info in read_header(file).items()}
    except AirLLMError:
        if theirs is not None and not _is_odd(file):
            raise Finding(f"{file}: the reference reads it") from None
        raise
    if ours != theirs:
        raise Finding(f"{file}: read as {ours}, the reference says {theirs}")


def _is_odd(file: Path) -> bool:
    """Rust's reader takes a list in the order of the fields for an entry, and ``{"F32": null}`` for a dtype."""
    data = file.read_bytes()
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    entries.pop("__metadata__", None)
    return any(not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) for entry in entries.values())


def pickle_holds(folder: Path, file: Path) -> None:
    pickle_index((file,), 8)
    load_pickle(file)


def model_holds(folder: Path, file: Path) -> None:
    """What runs is what transformers makes of the same folder; where that refuses it, what ran before."""
    ours, base = opened(folder), BASES[folder.name]
    if not base.compares:
        return
    theirs = reference(folder)
    if theirs is None:
        theirs = torch.load(folder.with_name(f"{folder.name}.logits"))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True):
        raise Finding(f"{file}: other logits than transformers'")


class Target(NamedTuple):
    """``file`` of a copy of ``base`` is damaged by ``mutate``; ``holds`` reads it."""

    base: str
    file: str
    mutate: Callable[[random.Random, bytes], bytes]
    holds: Callable[[Path, Path], Any]


def _read(function: Callable[[Path], Any]) -> Callable[[Path, Path], Any]:
    return lambda folder, file: function(file)


def _in_folder(function: Callable[[Path], Any]) -> Callable[[Path, Path], Any]:
    return lambda folder, file: function(folder)


# Thousands a second, or a few.
READERS = {
    "header": Target("plain", "model.safetensors", header, header_holds),
    "index": Target("shards", "model.safetensors.index.json", json_file, _in_folder(read_index)),
    "manifest": Target("store", "manifest.json", json_file, _in_folder(open_store)),
    "store header": Target("store", "rest.safetensors", header, header_holds),
    "gguf table": Target("gguf", "model.gguf", gguf, _read(read_gguf)),
    "pickle": Target("bin", "pytorch_model.bin", archive, pickle_holds),
}
MODELS = {
    "weights": Target("plain", "model.safetensors", header, model_holds),
    "config": Target("plain", "config.json", json_file, model_holds),
    "generation config": Target("plain", "generation_config.json", json_file, model_holds),
    "tokenizer": Target("plain", "tokenizer.json", json_file, model_holds),
    "tokenizer config": Target("plain", "tokenizer_config.json", json_file, model_holds),
    "pointer": Target("plain", "airllm_nb_store.json", json_file, model_holds),
    "shards": Target("shards", "model.safetensors.index.json", json_file, model_holds),
    "bin": Target("bin", "pytorch_model.bin", archive, model_holds),
    "gguf": Target("gguf", "model.gguf", gguf, model_holds),
    "adapter config": Target("adapter", "adapter/adapter_config.json", json_file, model_holds),
    "adapter weights": Target("adapter", "adapter/adapter_model.safetensors", header, model_holds),
    "fp8 config": Target("fp8", "config.json", json_file, model_holds),
    "fp8 weights": Target("fp8", "model.safetensors", header, model_holds),
}
TARGETS = READERS | MODELS


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(name: str, seeds: range, bases: dict[str, Path], work: Path) -> dict[str, int]:
    """How many mutations of a target were refused, and how many were read.

    Raises
    ------
    Finding
        With the target and the seed, which give the same mutation again.
    """
    target, counts = TARGETS[name], {"refused": 0, "read": 0}
    folder = work / target.base
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bases[target.base], folder)
    original = (folder / target.file).read_bytes()
    if target.holds is model_holds:
        torch.save(opened(folder), folder.with_name(f"{folder.name}.logits"))
    for seed in seeds:
        chance = random.Random(f"{name} {seed}")
        (folder / target.file).write_bytes(target.mutate(chance, original))
        try:
            with _limited():
                target.holds(folder, folder / target.file)
            counts["read"] += 1
        except AirLLMError as error:
            counts["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                raise Finding(f"{name} {seed}: not one line: {str(error)[:300]!r}") from error
        except Finding as error:
            raise Finding(f"{name} {seed}: {error}") from error
        except Exception as error:  # whatever it is, it is the finding
            raise Finding(f"{name} {seed}: {type(error).__name__}: {str(error)[:200]}") from error
    return counts


@contextmanager
def _limited() -> Iterator[None]:
    """Seconds of the processor, so that a busy machine makes no finding; and memory that is taken, not returned."""

    def late(*_: object) -> None:
        raise Finding(f"more than {SECONDS} s")

    before, old = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if grown > MEMORY:
        raise Finding(f"{grown >> 20} MiB more memory")


def made(folder: Path) -> dict[str, Path]:
    """The folders that are damaged, by the names of their bases."""
    return {name: base.make(folder / name) for name, base in BASES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: 600)")
    parser.add_argument("--seed", type=int, default=None, help="where to begin; a finding names its own")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only these")
    parser.add_argument("--count", type=int, default=0, help="run so many of each here, without a child, and end")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(1 << 40) if options.seed is None else options.seed
    names = options.target or list(TARGETS)
    if options.count:
        quiet()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["AIRLLM_NB_CACHE"] = f"{folder}/cache"
            bases = made(Path(folder) / "bases")
            for name in names:
                print(name, run(name, range(first, first + options.count), bases, Path(folder) / "work"), flush=True)
        return 0
    end, findings = time.monotonic() + options.seconds, 0
    while time.monotonic() < end:
        for name in names:
            count = 400 if name in READERS else 25
            command = [sys.executable, __file__, "--seed", str(first), "--count", str(count), "--target", name]
            child = subprocess.run(command, capture_output=True, text=True, timeout=600, preexec_fn=_limits)
            if child.returncode:
                findings += 1
                print(f"{name} {first}: exit {child.returncode}", (child.stderr.splitlines() or [""])[-1], flush=True)
        first += 400
    print(f"{findings} findings up to seed {first}")
    return 1 if findings else 0


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    raise SystemExit(main())
