"""How far a reader walks: the files, functions and moves between files that one road through the package takes.

A move is a call from a function of one file into a function of another one, or the return from it is not counted. Three
roads are traced on a tiny random Llama: opening a plain folder, opening it compressed for the first time, and one
streamed token.

    .venv/bin/python tools/moves.py
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).parents[1] / "airllm_nb"


class Walk:
    """Counts while it is entered; threads that are started meanwhile are followed too."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.functions: set[tuple[str, int]] = set()
        self.moves = 0

    def __enter__(self) -> Walk:
        threading.setprofile(self._look)
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _look(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not (file := frame.f_code.co_filename).startswith(str(PACKAGE)):
            return
        self.files.add(file)
        self.functions.add((file, frame.f_code.co_firstlineno))
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(str(PACKAGE)):
            caller = caller.f_back
        self.moves += caller is not None and caller.f_code.co_filename != file

    def __str__(self) -> str:
        return f"{len(self.files):4} files {len(self.functions):5} functions {self.moves:6} moves between files"


def walk(what: str, road: Callable[[], Any]) -> Any:
    with Walk() as walked:
        result = road()
    print(f"{what:32}{walked}")
    return result


def tiny_llama(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=260, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    import torch

    from airllm_nb import AutoModel

    with tempfile.TemporaryDirectory() as place:
        folder, ids = tiny_llama(Path(place) / "model"), torch.tensor([[1, 17, 42]])
        # One unit at a time on a rehearsed device, so that every step of streaming is on the road.
        options = {"device": "cpu", "vram_budget": "3MiB", "ram_budget": 0, "dtype": "bfloat16"}
        with AutoModel.from_pretrained(folder, **options):
            pass  # imports, and what is found out once for a machine
        model = walk("opening a plain folder", lambda: AutoModel.from_pretrained(folder, **options))
        with model:
            model(ids)
            walk("one streamed token", lambda: model(ids[:, :1]))
        store = {**options, "compression": "4bit", "layer_shards_saving_path": str(Path(place) / "stores")}
        walk("a first opening in 4-bit", lambda: AutoModel.from_pretrained(folder, **store)).close()


if __name__ == "__main__":
    main()
