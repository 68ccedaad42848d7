"""``.bin`` files that are read where they lie: nothing is rewritten, and answers are those of the resident model."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from airllm_nb import AutoModel, LoadOptions, convert_model, plan_model
from airllm_nb.checkpoint.bin.in_place import pickle_index
from airllm_nb.errors import CheckpointError


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama in two .bin files."""
    target = Path(shutil.copytree(tiny_llama(), tmp_path / "model"))
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    home = {name: f"pytorch_model-0000{1 + at % 2}-of-00002.bin" for at, name in enumerate(weights)}
    for file in set(home.values()):
        torch.save({name: weight for name, weight in weights.items() if home[name] == file}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return target


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def data(file: Path, name: str) -> bytes:
    index = pickle_index((file,), 8)
    assert index is not None
    (extent,) = index[name].extents
    return extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]


def test_it_streams_from_the_files_themselves(folder: Path, cache: Path) -> None:
    expected = tiny_models.run(tiny_models.resident(folder))
    with tiny_models.streamed(folder) as model:
        tokens, logits = tiny_models.run(model)
        weights = [binding.weight for unit in model._prepared.units for binding in unit.bindings]
        assert {extent.path.suffix for weight in weights for extent in weight.info.extents} == {".bin"}
    assert torch.equal(tokens, expected[0]) and torch.equal(logits, expected[1])
    assert not cache.exists() or not list(cache.rglob("*.safetensors"))


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    base, file = torch.arange(24.0).reshape(4, 6), tmp_path / "x.bin"
    tensors = {
        "a": base, "tied": base, "rows": base[1:3], "scalar": torch.tensor(3.0), "none": torch.empty(0, 3),
        "bf16": torch.randn(3, 5).to(torch.bfloat16), "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "integers": torch.arange(7), "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    for whole in (tensors, {"state_dict": tensors, "epoch": 3}):
        torch.save(whole, file)
        index = pickle_index((file,), 8)
        assert index is not None and index.keys() == tensors.keys()
        for name, tensor in tensors.items():
            flat = tensor.detach().contiguous().reshape(-1)
            assert index[name].shape == tuple(tensor.shape)
            assert data(file, name) == (flat.view(torch.uint8).numpy().tobytes() if len(flat) else b"")


@pytest.mark.parametrize("why", ["old format", "transposed", "compressed", "zipped anew", "negative", "wide"])
def test_what_cannot_be_read_in_place_is_rewritten(folder: Path, cache: Path, why: str) -> None:
    expected = tiny_models.run(tiny_models.resident(folder))
    first, second = sorted(folder.glob("*.bin"))
    weights = torch.load(first, weights_only=True)
    if why == "old format":
        torch.save(weights, first, _use_new_zipfile_serialization=False)
    elif why == "transposed":
        name = next(name for name, weight in weights.items() if weight.dim() == 2)
        torch.save(weights | {name: weights[name].T.contiguous().T}, first)
    elif why == "negative":
        name = next(name for name, weight in weights.items() if weight.dim() == 2)
        torch.save(weights | {name: torch._neg_view(-weights[name])}, first)
    elif why in ("compressed", "zipped anew"):
        with zipfile.ZipFile(first) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        how = zipfile.ZIP_DEFLATED if why == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(first, "w", how) as archive:
            for name, record in records.items():
                archive.writestr(name, record)
    itemsize = 2 if why == "wide" else 4
    assert pickle_index((first, second), itemsize) is None
    if why == "wide":
        with AutoModel.from_pretrained(folder, device="cpu", dtype="bfloat16"):
            assert list(cache.rglob("layer*.safetensors"))
    else:
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            tokens, logits = tiny_models.run(model)
        assert torch.equal(tokens, expected[0]) and torch.equal(logits, expected[1])
        assert list(cache.rglob("layer*.safetensors"))


@pytest.mark.parametrize("legacy", [False, True])
def test_the_last_file_of_an_index_gives_what_several_hold(folder: Path, cache: Path, legacy: bool) -> None:
    first, second = sorted(folder.glob("*.bin"))
    weights = {name: -weight for name, weight in torch.load(first, weights_only=True).items()}
    whole = weights | torch.load(second, weights_only=True)
    torch.save(whole, second, _use_new_zipfile_serialization=not legacy)
    expected = tiny_models.run(tiny_models.resident(folder))
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        tokens, logits = tiny_models.run(model)
    assert torch.equal(tokens, expected[0]) and torch.equal(logits, expected[1])
    (folder / "pytorch_model.bin.index.json").unlink()
    shutil.rmtree(cache, ignore_errors=True)
    with pytest.raises(CheckpointError, match="is also in"):
        AutoModel.from_pretrained(folder, device="cpu").close()


def test_a_tensor_that_nobody_needs_may_be_of_any_kind(folder: Path) -> None:
    expected = tiny_models.run(tiny_models.resident(folder))
    first = min(folder.glob("*.bin"))
    weights = torch.load(first, weights_only=True)
    for odd in (torch.zeros(3, dtype=torch.complex128), torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.uint16)):
        torch.save(weights | {"left_over": odd}, first)
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            tokens, logits = tiny_models.run(model)
        assert torch.equal(tokens, expected[0]) and torch.equal(logits, expected[1])
    needed = next(name for name, weight in weights.items() if weight.dim() == 2)
    torch.save(weights | {needed: weights[needed].to(torch.complex128)}, first)
    with pytest.raises(CheckpointError, match=rf"{needed}.* is torch.complex128"):
        AutoModel.from_pretrained(folder, device="cpu").close()


def test_it_is_encoded_without_a_plain_copy_on_the_way(folder: Path, cache: Path) -> None:
    seen: set[str] = set()

    def look(_: object) -> None:
        seen.update(path.name for path in cache.iterdir()) if cache.is_dir() else None

    options = LoadOptions.create(compression="4bit", device="cpu")
    store = convert_model(folder, options, progress=look)
    assert seen == {store.name}
    assert (store / "config.json").is_file() and not list(store.glob("*.bin"))


def test_a_plan_knows_its_sizes(folder: Path) -> None:
    plan = plan_model(folder, LoadOptions.create(device="cpu"))
    matrices = [weight for file in folder.glob("*.bin") for weight in torch.load(file).values() if weight.dim() == 2]
    assert plan.fit.sizes_from == "files" and not plan.fit.spaces
    assert plan.fit.weights == sum(weight.nbytes for weight in matrices)


def test_damaged_archives_are_no_traceback(folder: Path, tmp_path: Path) -> None:
    file = next(folder.glob("*.bin"))
    whole = file.read_bytes()
    directory = whole.rindex(b"PK\x01\x02")
    for at, value in ((directory + 8, 1), (directory + 6, 99), (directory, 0), (directory + 42, 255)):
        file.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        with suppress(CheckpointError), AutoModel.from_pretrained(folder, device="cpu"):
            pass
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/byteorder", bytes(1 << 28))
    tracemalloc.start()
    assert pickle_index((file,), 4) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 24, "a quarter of a gigabyte was not unpacked"
    tracemalloc.stop()


def test_a_file_that_is_cut_short(folder: Path) -> None:
    file = next(folder.glob("*.bin"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"), AutoModel.from_pretrained(folder, device="cpu"):
        pass
