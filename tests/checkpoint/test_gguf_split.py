"""GGUF files in several parts: one model, whichever part is named, and one line for a part that is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import dequantised_gguf, tiny_llama_gguf, tiny_qwen2moe_gguf

from airllm_nb import AutoModel
from airllm_nb.checkpoint.gguf.header import read_gguf
from airllm_nb.checkpoint.gguf.split import part_names, whole_name
from airllm_nb.checkpoint.gguf.weights import GGUFWeights, gguf_config
from airllm_nb.config import LoadOptions
from airllm_nb.errors import CheckpointError
from airllm_nb.intake.find.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 9, 3, 40, 41, 7]])


def split(folder: Path, limit: int = 8, **options: object) -> list[Path]:
    tiny_llama_gguf(folder / "m-Q8_0.gguf", limit=limit, **options)
    return sorted(folder.glob("*.gguf"))


def test_the_parts_of_a_name() -> None:
    names = part_names("q8/m-Q8_0-00002-of-00003.gguf")
    assert names == tuple(f"q8/m-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3))
    assert {whole_name(name) for name in names} == {"q8/m-Q8_0.gguf"}
    for name in ("m.gguf", "m-00001-of-00001.gguf", "m-1-of-2.gguf"):
        assert part_names(name) == (name,)


@pytest.mark.parametrize("make", [tiny_llama_gguf, tiny_qwen2moe_gguf])
@pytest.mark.parametrize("small_first", [False, True], ids=["", "first without tensors"])
def test_parts_are_one_model(tmp_path: Path, make: Callable[..., Path], small_first: bool) -> None:
    """The head is not in the first part, where transformers looks for it."""
    whole = make(tmp_path / "whole.gguf")
    (tmp_path / "parts").mkdir()
    make(tmp_path / "parts" / "m.gguf", limit=8, small_first=small_first)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    joined, file = read_gguf(parts[0]), read_gguf(whole)
    assert joined.tensors.keys() == file.tensors.keys()
    assert {tensor.path for tensor in joined.tensors.values()} == set(parts[small_first:])
    weights, wanted = (GGUFWeights(each, gguf_config(each), "float32") for each in (joined, file))
    assert list(weights) == list(wanted) and "lm_head.weight" in weights
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("named", ["the first", "another", "all", "the folder"])
def test_any_part_names_all(tmp_path: Path, named: str) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = split(folder)
    name = {"the first": parts[0], "another": parts[1], "all": f"{folder}:m-Q8_0.gguf", "the folder": folder}[named]
    source = resolve(name, LoadOptions())
    assert source.files == tuple(parts) and source.gguf_file == parts[0]
    assert source.nbytes == sum(part.stat().st_size for part in parts)


def test_a_split_model_answers_as_the_whole_one(tmp_path: Path) -> None:
    expected = dequantised_gguf(tiny_llama_gguf(tmp_path / "whole.gguf"))
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = split(folder)
    with torch.inference_mode():
        wanted = expected(IDS).logits
    for budget in ({}, {"vram_budget": "40MiB"}):
        with AutoModel.from_pretrained(
            parts[0], dtype="float32", layer_shards_saving_path=tmp_path / "shards", **budget
        ) as model:
            torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
            assert {piece.extent.path for unit in model._prepared.units for piece in unit.stream.pieces} <= set(parts)


def test_what_is_one_of_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00001.gguf"
    tiny_llama_gguf(path)
    assert resolve(path, LoadOptions()).files == resolve(tmp_path, LoadOptions()).files == (path,)
    assert read_gguf(path).tensors


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    for name in (parts[0], parts[2], tmp_path, f"{tmp_path}:m-Q8_0.gguf"):
        with pytest.raises(CheckpointError, match=rf"of which {parts[1].name} is missing .1 in all.*"):
            resolve(name, LoadOptions())
    with pytest.raises(CheckpointError, match=rf"one of {len(parts)} parts, of which {parts[1].name} is missing"):
        read_gguf(parts[0])


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    parts = split(tmp_path)
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=rf"one of {len(parts)} parts and is not named as one; give it back its"):
        read_gguf(tmp_path / "renamed.gguf")
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match=rf"{parts[1].name} is .*does not say that it is part 2 of {len(parts)}"):
        read_gguf(parts[0])


def test_a_part_of_another_model_is_noticed(tmp_path: Path) -> None:
    parts = split(tmp_path)
    (tmp_path / "other").mkdir()
    other = split(tmp_path / "other", tied=True)
    assert len(other) == len(parts)
    shutil.copy(other[2], parts[2])
    with pytest.raises(CheckpointError, match=r"parts hold \d+ different tensors and not 21"):
        read_gguf(parts[0])
