"""Banks of experts as bytes: whatever extents they lie in, each expert's bytes come to its slot."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airllm_nb.errors import CheckpointError, GenerationStopped
from airllm_nb.stream.bank import Bank, Slots
from airllm_nb.stream.copier import MemoryCopier
from airllm_nb.stream.experts import FromFiles, FromHost, FromPageCache, Reading, Source
from airllm_nb.stream.reader import Reader
from airllm_nb.stream.ring import align
from airllm_nb.tensors import libc
from airllm_nb.tensors.index import Extent, TensorInfo

EXPERTS = 6


def lie(folder: Path, chance: random.Random, bias: bool) -> tuple[Bank, dict[str, bytes]]:
    """A bank of which the parts lie in pieces of any size, at any place of two files, with holes between them."""
    stacks = {"weight": ("U8", (EXPERTS * 2, 3, 5)), "scale": ("F32", (EXPERTS, 7))}
    stacks |= {"bias": ("BF16", (EXPERTS, 4))} if bias else {}
    files = [bytearray(chance.randbytes(13)) for _ in range(2)]
    made, data = {}, {}
    for name, (dtype, shape) in stacks.items():
        nbytes = torch.Size(shape).numel() * {"U8": 1, "F32": 4, "BF16": 2}[dtype]
        data[name], extents, at = chance.randbytes(nbytes), [], 0
        while at < nbytes:
            size, number = min(chance.randint(1, 50), nbytes - at), chance.randrange(2)
            files[number] += chance.randbytes(chance.randint(0, 9))
            extents.append(Extent(folder / f"{number}.bin", len(files[number]), size))
            files[number] += data[name][at : at + size]
            at += size
        made[name] = TensorInfo(name, dtype, shape, tuple(extents)), 0
    for number, content in enumerate(files):
        (folder / f"{number}.bin").write_bytes(content)
    return Bank.of("bank", EXPERTS, made), data


def sources(bank: Bank, reading: Reading, copier: MemoryCopier) -> dict[str, Source]:
    room = align(bank.expert_bytes)
    found: dict[str, Source] = {
        "files": FromFiles(bank, reading),
        "host": FromHost(bank, reading, copier, 2, torch.zeros(2 * room, dtype=torch.uint8)),
        "passing": FromHost(bank, reading, copier, 0, torch.zeros(room, dtype=torch.uint8)),
    }
    if libc.is_supported():
        found["page cache"] = FromPageCache(bank, reading, copier, torch.device("cpu"))
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_every_expert_comes_whole(tmp_path_factory: pytest.TempPathFactory, seed: int, bias: bool) -> None:
    chance = random.Random(seed)
    bank, data = lie(tmp_path_factory.mktemp("bank"), chance, bias)
    reader, copier, read = Reader(threads=2), MemoryCopier(), []
    reading = Reading(reader, lambda: False, time.perf_counter, lambda name, nbytes, start: read.append(nbytes))
    try:
        for source in sources(bank, reading, copier).values():
            slots = Slots(bank, torch.zeros(bank.room(4), dtype=torch.uint8), 4)
            for _ in range(4):
                places = dict(zip(chance.sample(range(EXPERTS), 3), chance.sample(range(4), 3), strict=True))
                source.load(list(places.items()), slots, None)
                for stack, part in zip(slots.stacks, bank.parts, strict=True):
                    for expert, slot in places.items():
                        ours = stack.unflatten(0, (4, -1))[slot].reshape(-1).view(torch.uint8).numpy().tobytes()
                        assert ours == data[part.name][expert * part.nbytes : (expert + 1) * part.nbytes]
            source.close()
    finally:
        reader.close()
    assert sum(read) >= 4 * 3 * bank.expert_bytes


def test_what_a_failed_read_leaves_is_read_again(tmp_path: Path) -> None:
    bank, _ = lie(tmp_path, random.Random(1), bias=False)
    reader, stop = Reader(threads=2), [False]
    reading = Reading(reader, lambda: stop[0], time.perf_counter, lambda *_: None)
    slots = Slots(bank, torch.zeros(bank.room(1), dtype=torch.uint8), 1)
    source = FromHost(bank, reading, MemoryCopier(), 2, torch.zeros(2 * align(bank.expert_bytes), dtype=torch.uint8))
    content = {path: path.read_bytes() for path in tmp_path.glob("*.bin")}
    for path in content:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError):
        source.load([(3, 0)], slots, None)
    for path, data in content.items():
        path.write_bytes(data)
    stop[0] = True
    with pytest.raises(GenerationStopped):
        source.load([(3, 0)], slots, None)
    stop[0] = False
    source.load([(3, 0)], slots, None)
    again = Slots(bank, torch.zeros(bank.room(1), dtype=torch.uint8), 1)
    FromFiles(bank, reading).load([(3, 0)], again, None)
    assert torch.equal(slots.memory, again.memory)
    reader.close()
