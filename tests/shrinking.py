"""Run in a process that may die: weight files are cut short while a model computes on them."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch

from airllm_nb import AutoModel
from airllm_nb.errors import AirLLMError, CheckpointError

IDS = torch.arange(2, 50)[None]
# How long the shortest of the waits before a cut is; the longest is a hundred times that.
MOMENT = 0.002


def rounds(model: Path, count: int, seed: int, **options: Any) -> list[str]:
    """What was said in each of ``count`` generations in the middle of which a file of the model was cut somewhere.

    Every round opens the model, whose tokens must be the same each time, and puts its files back at the end.
    """
    chance, said, expected = random.Random(seed), [], None
    for _ in range(count):
        with AutoModel.from_pretrained(model, device="cpu", **options) as opened:
            tokens = opened.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            expected = tokens if expected is None else expected
            assert torch.equal(tokens, expected), "what was lost before does not matter any more"
            said.append(_cut_while_it_runs(opened, chance))
            with contextlib.suppress(CheckpointError):
                opened.generate(IDS, max_new_tokens=1)
                raise AssertionError("the model whose file was cut went on")
    return said


def _cut_while_it_runs(opened: Any, chance: random.Random) -> str:
    files = {path: path.read_bytes() for path in _weights(opened)}
    # The largest more often; a page at the end of a file is zeros without a fault, and noticed by the size.
    (cut,) = chance.choices([*files], [len(data) for data in files.values()])
    size, wait = chance.randrange(len(files[cut])), MOMENT * 100 ** chance.random()
    threading.Thread(target=lambda: (time.sleep(wait), os.truncate(cut, size))).start()
    try:
        while True:
            opened.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    except AirLLMError as error:
        assert isinstance(error, CheckpointError), repr(error)
        assert cut.name in str(error) and "\n" not in str(error), str(error)
        return str(error)
    finally:
        for path, data in files.items():
            path.write_bytes(data)


def _weights(opened: Any) -> list[Path]:
    return sorted({extent.path for unit in opened._prepared.units for part in unit.stream.pieces
                   for extent in [part.extent]})  # fmt: skip


def copy(folder: Path, to: Path) -> Path:
    """A model that may be damaged."""
    return Path(shutil.copytree(folder, to))
