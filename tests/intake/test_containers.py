"""What each kind of weight files says of itself: what is read in place, and what is written before a model runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from gguf_files import tiny_llama_gguf
from safetensors.torch import load_file

from airllm_nb.checkpoint.hub.headers import Headers
from airllm_nb.checkpoint.source import Format
from airllm_nb.config import LoadOptions
from airllm_nb.intake.containers.container import Container, ToWrite
from airllm_nb.intake.containers.table import CONTAINERS, container_of
from airllm_nb.intake.find.resolve import resolve
from airllm_nb.progress import silent


def opened(path: Path) -> Container:
    options = LoadOptions.create(device="cpu")
    source = resolve(path, options)
    return container_of(source, Headers(source, options, silent))


def binary(folder: Path, made: Path) -> Path:
    made.mkdir()
    (made / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / "model.safetensors"), made / "pytorch_model.bin")
    return made


def test_every_format_has_a_container() -> None:
    assert set(CONTAINERS) == set(get_args(Format))


def test_safetensors_are_read_in_place(tiny_llama: Callable[..., Path]) -> None:
    found = opened(tiny_llama())
    assert found.to_write(torch.bfloat16, encoded=False) == ToWrite()
    assert found.to_write(torch.bfloat16, encoded=True) == ToWrite(encoded=True)
    assert found.packed_as == "" and found.stored_dtype() == torch.float32


@pytest.mark.parametrize(("dtype", "whole"), [(torch.float32, False), (torch.bfloat16, True)])
def test_wide_pickles_are_rewritten(
    tiny_llama: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, whole: bool
) -> None:
    found = opened(binary(tiny_llama(), tmp_path / "bin"))
    for encoded in (False, True):
        assert found.to_write(dtype, encoded) == ToWrite(whole, (), encoded)
    folder = tmp_path / "store"
    found.rewrite(folder, (), {}, dtype, silent)
    assert json.loads((folder / "manifest.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_blocks_of_gguf_stay_unless_they_are_compressed(tmp_path: Path) -> None:
    found = opened(tiny_llama_gguf(tmp_path / "tiny.gguf"))
    once = found.to_write(torch.float32, encoded=False).once
    assert once and all("norm" in name for name in once)
    assert found.to_write(torch.float32, encoded=True) == ToWrite(whole=True, encoded=True)
    assert found.packed_as == "GGUF" and found.repacks
