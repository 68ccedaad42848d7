"""Models that several processes load, convert, delete and remove at the same time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_locks import KERNEL, _waiting, held, python, steps, until

from airllm_nb import LoadOptions, convert_model, open_model
from airllm_nb.errors import AirLLMError, BudgetError, StoreError
from airllm_nb.intake.pointer import POINTER
from airllm_nb.progress import silent
from airllm_nb.store.listing import cached_stores, remove_store
from airllm_nb.store.locks import Hold, in_use, locked
from airllm_nb.store.names import LOCK

pytest.importorskip("fcntl")


def options(shards: Path, **how: object) -> LoadOptions:
    return LoadOptions.create(layer_shards_saving_path=shards, device="cpu", **{"compression": "4bit", **how})


@pytest.fixture
def source(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama(eos_token_id=None), tmp_path / "source"))


def test_a_step_on_the_way_is_shared_too(source: Path, tmp_path: Path) -> None:
    """Pickles become a plain store first, which both would write, read and remove."""
    torch.save(
        load_file(source / "model.safetensors"), source / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    (source / "model.safetensors").unlink()
    shards = tmp_path / "shards"
    folder = shards / convert_model(source, options(tmp_path / "named")).name
    with locked(folder, silent):
        kernels = [python("-c", KERNEL, source, shards) for _ in range(2)]
        until(lambda: _waiting(folder) == 2 or any(kernel.poll() is not None for kernel in kernels), 120)
    told = [steps(kernel) for kernel in kernels]
    assert told[0][-1] == told[1][-1] and told[0][-1][0] == "tokens"
    assert sorted(any(step[0] == "convert" for step in one) for one in told) == [False, True]
    assert [store.name for store in cached_stores(shards)] == [folder.name] and len(list(shards.iterdir())) == 1


def test_an_open_model_keeps_its_store(source: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    with open_model(source, options(shards)) as model:
        [store] = cached_stores(shards)
        assert store.is_open and store.origin == str(source)
        with pytest.raises(StoreError, match="in use"):
            remove_store(store.folder)
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert not cached_stores(shards)[0].is_open
    assert remove_store(store.folder) == store.nbytes and not list(shards.iterdir())


def test_a_step_that_another_process_reads_stays(source: Path, tmp_path: Path) -> None:
    torch.save(
        load_file(source / "model.safetensors"), source / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    (source / "model.safetensors").unlink()
    plain = convert_model(source, options(tmp_path / "named", compression=None)).name
    (tmp_path / "shards" / plain).mkdir(parents=True)
    with Hold(tmp_path / "shards" / plain):
        convert_model(source, options(tmp_path / "shards"))
        assert (tmp_path / "shards" / plain / "manifest.json").is_file()


def test_originals_that_somebody_reads_are_not_deleted(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deleting = options(tmp_path / "shards", delete_original=True)
    with held("reads", source):
        convert_model(source, deleting)
        assert (source / "model.safetensors").is_file() and "is read by another process" in caplog.text
    with open_model(source, options(tmp_path / "shards", compression=None)):
        convert_model(source, deleting)
        assert (source / "model.safetensors").is_file()
    convert_model(source, deleting)
    assert not (source / "model.safetensors").exists() and (source / POINTER).is_file()


def test_who_waited_for_a_conversion_that_deleted_the_original_reads(source: Path, tmp_path: Path) -> None:
    """It found the weights, waits, and they have gone when its turn comes."""
    shards = tmp_path / "shards"
    folder = shards / convert_model(source, options(tmp_path / "named")).name
    with locked(folder, silent):
        kernel = python("-c", KERNEL, source, shards)
        until(lambda: _waiting(folder) == 1 or kernel.poll() is not None, 120)
        convert_model(source, options(shards, delete_original=True))
        assert not (source / "model.safetensors").exists()
    told = steps(kernel)
    assert told[-1][0] == "tokens" and not any(step[0] == "convert" for step in told)


def test_a_damaged_store_is_repaired_by_loading_again(source: Path, tmp_path: Path) -> None:
    folder = convert_model(source, options(tmp_path / "shards"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    (folder / "rest.safetensors").unlink()
    assert convert_model(source, options(tmp_path / "shards")) == folder
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert after.keys() == before.keys() and [name for name in after if after[name] != before[name]] == [
        "rest.safetensors"]  # fmt: skip


def test_a_load_that_fails_leaves_no_folder_and_no_hold(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(Exception, match="model"):
        open_model(source, options(tmp_path / "shards"))
    assert not (tmp_path / "shards").exists() or not list((tmp_path / "shards").rglob(LOCK))
    assert in_use(source) == ""


@pytest.mark.parametrize("how", [{"vram_budget": "100KiB"}, {"adapter": "lora"}])
def test_a_refused_load_holds_nothing_while_its_error_is_kept(
    source: Path, tmp_path: Path, how: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As IPython keeps the last one."""
    folder = convert_model(source, options(tmp_path / "shards"))
    if "adapter" in how:

        def refuse(*_: object) -> None:
            raise StoreError("refused")

        how = {}
        monkeypatch.setattr("airllm_nb.model.adapter.attach", refuse)
    with pytest.raises(AirLLMError) as kept:
        open_model(source, options(tmp_path / "shards", **how))
    assert isinstance(kept.value, BudgetError | StoreError) and in_use(folder) == ""
