"""``.bin`` checkpoints: the same weights as safetensors, and nothing that a pickle asks for is ever called."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from airllm_nb.checkpoint.bin.in_place import pickle_index
from airllm_nb.checkpoint.bin.pickles import PickledWeights, convert_pickles, load_pickle
from airllm_nb.config import LoadOptions
from airllm_nb.errors import CheckpointError
from airllm_nb.intake.find.resolve import resolve
from airllm_nb.progress import Progress
from airllm_nb.tensors.index import read_index

OPTIONS = LoadOptions()


@pytest.fixture
def bin_folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama with its weights in two .bin files."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(), folder)
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        path.unlink()
    names = list(weights)
    half = {name: f"pytorch_model-0000{1 + (i >= len(names) // 2)}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(half.values()):
        torch.save({name: weights[name] for name in names if half[name] == file}, folder / file)
    text = json.dumps({"metadata": {}, "weight_map": half})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    return folder


def test_the_store_is_a_checkpoint_of_the_same_weights(bin_folder: Path, tmp_path: Path) -> None:
    source = resolve(bin_folder, OPTIONS)
    reports: list[Progress] = []
    folder = convert_pickles(source, tmp_path / "store", progress=reports.append)
    ours = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(bin_folder).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert AutoTokenizer.from_pretrained(folder)("ab") == AutoTokenizer.from_pretrained(bin_folder)("ab")
    assert set(read_index(folder)) == set(PickledWeights(source.files))
    assert reports[-1].done == reports[-1].total > 0


def test_a_finished_store_is_not_written_again(bin_folder: Path, tmp_path: Path) -> None:
    source = resolve(bin_folder, OPTIONS)
    folder = convert_pickles(source, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for file in source.files:
        file.write_bytes(b"no longer needed")
    convert_pickles(source, folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_matrices_are_cast_and_vectors_are_not(bin_folder: Path, tmp_path: Path) -> None:
    index = read_index(convert_pickles(resolve(bin_folder, OPTIONS), tmp_path / "store", "bfloat16"))
    assert {(len(info.shape), info.dtype) for info in index.values()} == {(2, "BF16"), (1, "F32")}


def test_views_of_one_storage_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    torch.save(
        {"a": base, "tied": base, "t": base.T, "rows": base[1:3], "scalar": torch.tensor(3.0)}, tmp_path / "x.bin"
    )
    weights = PickledWeights((tmp_path / "x.bin",))
    assert weights.specs["t"].shape == (6, 4) and torch.equal(weights["t"], base.T)
    assert torch.equal(weights["tied"], base) and torch.equal(weights["rows"], base[1:3])
    assert weights["scalar"] == 3 and weights.specs["scalar"].nbytes == 4


@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_of_torch_save(tmp_path: Path, legacy: bool) -> None:
    tensors = {"w": torch.randn(3, 5, dtype=torch.bfloat16), "i": torch.arange(4)}
    torch.save({"state_dict": tensors}, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    loaded = load_pickle(tmp_path / "x.bin")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


class _Evil:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    file, proof = tmp_path / "pytorch_model.bin", tmp_path / "executed"
    evil = {"w": torch.zeros(2), "x": _Evil(f"touch {proof}")}
    if how == "bare pickle":
        file.write_bytes(pickle.dumps(_Evil(f"touch {proof}"), protocol=2))
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=rf"{file} wants to call (posix|nt)\.system.*safetensors") as caught:
        load_pickle(file)
    assert not proof.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 10, 500, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float, legacy: bool) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.randn(64, 64)}, file, _use_new_zipfile_serialization=not legacy)
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=rf"{file} is truncated or damaged") as caught:
        load_pickle(file)
    assert "\n" not in str(caught.value)


def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_pickle(tmp_path / "x.bin")
    torch.save({"w": torch.zeros(2).to_sparse()}, tmp_path / "y.bin")
    with pytest.raises(CheckpointError, match="cannot hold"):
        PickledWeights((tmp_path / "y.bin",))


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        torch.save({"w": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"'w' is also in a\.bin"):
        PickledWeights((tmp_path / "a.bin", tmp_path / "b.bin"))


@pytest.mark.parametrize("by", [-8, 8, -4096, 4096])
def test_a_record_of_another_length_than_its_storage_is_refused(tmp_path: Path, by: int) -> None:
    """Of a file that is mapped torch would take what lies behind it."""
    whole, file = tmp_path / "whole.bin", tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(4096.0), "b": torch.ones(4096)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w") as target:
        for record in source.infolist():
            data = source.read(record)
            if record.filename.endswith("/data/0"):
                data = data[:by] if by < 0 else data + bytes(by)
            target.writestr(record.filename, data)
    assert pickle_index((file,), 8) is None
    with pytest.raises(CheckpointError, match="record size"):
        load_pickle(file)
