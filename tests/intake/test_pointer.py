"""Weights that a store took the place of: what is deleted, what points to the store, and when that is believed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest

from airllm_nb import LoadOptions, convert_model, disk
from airllm_nb.checkpoint import originals
from airllm_nb.config import cache_dir
from airllm_nb.errors import FileError, OptionError, SourceError, StoreError
from airllm_nb.intake import replacements
from airllm_nb.intake.pointer import POINTER, opened_store
from airllm_nb.intake.prepare import prepare
from airllm_nb.intake.replacements import RECORDS
from airllm_nb.store.listing import cached_stores, remove_store
from airllm_nb.store.locks import Hold

PLAIN = LoadOptions.create(device="cpu")


def options(shards: Path | str, **how: Any) -> LoadOptions:
    return LoadOptions.create(**{"layer_shards_saving_path": shards, "device": "cpu", "compression": "4bit",
                                 "delete_original": True} | how)  # fmt: skip


def opened(model: Path | str, how: LoadOptions = PLAIN) -> Path:
    """The folder whose weights are read."""
    prepared = prepare(model, how)
    prepared.held.close()
    return prepared.folder


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama(shards=4, dtype="bfloat16"), tmp_path / "source"))


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``interrupted(load, after=2)``: Ctrl-C comes when two files are deleted."""

    def call(load: Callable[[], Any], after: int) -> None:
        left, remove = [after], originals.remove

        def deleted(path: Path, *given: Any) -> list[Path]:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return remove(path, *given)

        with monkeypatch.context() as patch:
            patch.setattr(originals, "remove", deleted)
            with pytest.raises(KeyboardInterrupt):
                load()

    return call


# ---- a deletion that is cut short ------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_deletion_that_is_cut_short_is_finished_by_the_next_load(
    source: Path, tmp_path: Path, interrupted: Callable[..., None], after: int
) -> None:
    before = weights(source)
    interrupted(lambda: convert_model(source, options(tmp_path / "shards")), after)
    assert weights(source) == before[after:]
    [store] = cached_stores(tmp_path / "shards")
    if not after:  # nothing is lost yet: the checkpoint is still the model
        assert opened(source) == source and weights(source) == before
        assert opened(source, options(tmp_path / "shards")) == store.folder
    assert opened(source) == store.folder and weights(source) == []
    assert opened(source) == store.folder


def test_what_is_only_looked_at_deletes_nothing(source: Path, tmp_path: Path, interrupted: Callable[..., None]) -> None:
    interrupted(lambda: convert_model(source, options(tmp_path / "shards")), 1)
    left = weights(source)
    assert opened_store(source, PLAIN, finish=False) is not None and weights(source) == left
    with Hold(source):
        assert opened_store(source, PLAIN) is not None and weights(source) == left


def test_a_damaged_store_costs_no_more_of_the_original(
    source: Path, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    interrupted(lambda: convert_model(source, options(tmp_path / "shards")), 2)
    left = weights(source)
    [store] = cached_stores(tmp_path / "shards")
    shard = max(store.folder.glob("*.safetensors"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(StoreError, match="not what was written"):
        opened(source)
    assert weights(source) == left
    shard.unlink()
    with pytest.raises(SourceError, match=r"were deleted once .* is damaged: .* download the model again"):
        opened(source)


def test_what_the_disk_refuses_to_delete_is_no_reason_not_to_load(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: Path, *_: Any) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(originals, "remove", refused)
        store = convert_model(source, options(tmp_path / "shards"))
    assert "Permission denied" in caplog.text and len(weights(source)) == 4
    assert opened(source, options(tmp_path / "shards")) == store and weights(source) == []


def test_what_the_disk_refused_is_deleted_when_it_is_asked_for_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not before: every attempt reads the whole store."""
    remove = originals.remove

    def refused(path: Path, *rest: Any) -> list[Path]:
        if len(weights(source)) == 2:
            raise PermissionError(13, "Permission denied", str(path))
        return remove(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(originals, "remove", refused)
        store = convert_model(source, options(tmp_path / "shards"))
    assert len(weights(source)) == 2
    with monkeypatch.context() as patch:
        patch.setattr("airllm_nb.store.manifest.Store.verify", lambda *_: pytest.fail("read as a whole"))
        assert opened(source, PLAIN) == store
    assert len(weights(source)) == 2
    assert opened(source, options(tmp_path / "shards")) == store and weights(source) == []


# ---- where the store is ----------------------------------------------------------------------------------------------


def test_a_relative_folder_is_found_from_elsewhere(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = convert_model("source", options("shards"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert opened(source) == tmp_path / "shards" / store.name


def test_a_store_that_was_removed_is_named(source: Path, tmp_path: Path) -> None:
    store = convert_model(source, options(tmp_path / "shards"))
    remove_store(store)
    with pytest.raises(SourceError, match=rf"{store}, is not there any more; bring it back, or download the model"):
        opened(source)


def test_another_compression_needs_the_original(source: Path, tmp_path: Path) -> None:
    convert_model(source, options(tmp_path / "shards"))
    with pytest.raises(OptionError, match=r"leave the option out, or load the original, whose weights .* were deleted"):
        opened(source, options(tmp_path / "shards", compression="8bit"))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stores": []}', '{"stores": {".": {"files": {}}}}', '"store"'])
def test_a_damaged_pointer_is_named(source: Path, tmp_path: Path, damage: str) -> None:
    kept = shutil.copytree(source, tmp_path / "kept")
    convert_model(source, options(tmp_path / "shards"))
    (source / POINTER).write_text(damage)
    with pytest.raises(SourceError, match=rf"{POINTER}.* is damaged .*; delete it and name the store") as caught:
        opened(source)
    assert "\n" not in str(caught.value)
    shutil.copytree(kept, source, dirs_exist_ok=True)
    assert opened(source) == source
    convert_model(source, options(tmp_path / "shards"))
    assert opened(source).parent == tmp_path / "shards"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("which", ["the pointer", "the record", "both"])
def test_what_the_system_refuses_to_read_is_not_damaged(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, which: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Deleted by such advice, what says where the store is would be gone."""
    how = options(tmp_path / "stores")
    folder = opened(source, how)
    read = replacements.read_json

    def refused(path: Path, **given: Any) -> Any:
        if which == "both" or (path.name == POINTER) == (which == "the pointer"):
            raise disk.refused(OSError(code, os.strerror(code)), path)
        return read(path, **given)

    monkeypatch.setattr(replacements, "read_json", refused)
    if which == "the record":  # the pointer is vouched for by the store
        assert opened(source, how) == folder
        assert os.strerror(code) in caplog.text
    else:
        with pytest.raises(FileError, match=f"{POINTER} cannot be read .{os.strerror(code)}"):
            opened(source, how)
    assert "damaged" not in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path / "cache"))
    assert opened(source, how) == folder


def test_a_pointer_without_files_is_damaged(source: Path, tmp_path: Path) -> None:
    """Whoever wrote it: the remedy is to name the store; weights that are brought back count."""
    kept = shutil.copytree(source, tmp_path / "kept")
    store = convert_model(source, options(tmp_path / "shards"))
    (source / POINTER).write_text(json.dumps({"store": str(store)}))
    with pytest.raises(SourceError, match=f"{POINTER}.* is damaged .*name the store itself"):
        opened(source)
    assert opened(store) == store
    shutil.copy(kept / weights(kept)[0], source)
    with pytest.raises(Exception, match="is missing"):
        opened(source)


# ---- what it replaces ------------------------------------------------------------------------------------------------


def test_weights_that_arrived_since_win(source: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(source, tmp_path / "kept"))
    (source / "training_args.bin").write_bytes(b"no weights")
    (source / "consolidated.safetensors").write_bytes(b"the same in another layout")
    store = convert_model(source, options(tmp_path / "shards"))
    assert opened(source) == store
    for name in weights(kept):  # as a download brings them, one after the other
        shutil.copyfile(kept / name, source / name)
        left = weights(source)
        if len(left) < 5:
            with pytest.raises(Exception, match="is missing"):
                opened(source)
        assert weights(source) == left
    assert opened(source) == source


def test_pickles_that_arrived_since_win(source: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    state = {name: tensor for file in weights(source) for name, tensor in load_file(source / file).items()}
    convert_model(source, options(tmp_path / "shards"))
    torch.save(state, source / "pytorch_model.bin")
    assert prepare(source, PLAIN, weights=False).source.format == "bin"


def test_leftovers_of_a_deletion_that_came_back_otherwise_stay(
    source: Path, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    """Somebody begins to download again what is left of the files."""
    interrupted(lambda: convert_model(source, options(tmp_path / "shards")), 2)
    left = weights(source)
    os.utime(source / left[0], (1, 1))
    with pytest.raises(Exception, match="is missing"):
        opened(source)
    assert weights(source) == left


def test_parts_are_replaced_by_any_name(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    gguf_files.tiny_llama_gguf(downloads / "m-Q8_0.gguf", limit=8)
    parts = sorted(downloads.glob("*.gguf"))
    store = convert_model(parts[0], options(tmp_path / "shards"))
    assert len(parts) > 2 and not list(downloads.glob("*.gguf"))
    for name in (
        downloads,
        *parts,
        downloads / "m-Q8_0.gguf",
        f"{downloads}:m-Q8_0.gguf",
        f"{downloads}:{parts[1].name}",
    ):
        assert opened(name) == store, name


def test_a_gguf_file_is_replaced_for_itself_alone(tmp_path: Path) -> None:
    downloads, shards = tmp_path / "downloads", tmp_path / "shards"
    downloads.mkdir()
    alpha, beta = (gguf_files.tiny_llama_gguf(downloads / name) for name in ("alpha.gguf", "beta.gguf"))
    again = Path(shutil.copy(alpha, tmp_path))
    store = convert_model(alpha, options(shards))
    assert not alpha.exists() and beta.exists()
    moved = beta.rename(tmp_path / "beta.gguf")
    assert opened(downloads) == store
    # Killed after the last deletion: what is written at the end is of this file still.
    [known] = (cache_dir() / RECORDS).glob("*.json")
    known.write_text(known.read_text().replace('"deleting": false', '"deleting": true'))
    assert opened(downloads) == store and list(json.loads(known.read_text())["stores"]) == ["alpha.gguf"]
    assert '"deleting": false' in known.read_text() == (downloads / POINTER).read_text()
    moved.rename(beta)
    assert opened(alpha) == opened(f"{downloads}:alpha.gguf") == store
    assert prepare(downloads, PLAIN, weights=False).source.gguf_file == beta
    assert prepare(beta, PLAIN, weights=False).source.gguf_file == beta
    with pytest.raises(SourceError, match="there is no file"):
        opened(downloads / "gamma.gguf")
    other = convert_model(beta, options(shards))
    assert other != store and (opened(alpha), opened(beta)) == (store, other)
    with pytest.raises(SourceError, match=r"2 GGUF files that were there; name one of .*alpha\.gguf, .*beta\.gguf"):
        opened(downloads)
    shutil.copyfile(again, alpha)
    assert prepare(alpha, PLAIN, weights=False).source.gguf_file == alpha
    assert prepare(downloads, PLAIN, weights=False).source.gguf_file == alpha


# ---- a folder that somebody else made --------------------------------------------------------------------------------


@pytest.fixture
def hostile(source: Path, tmp_path: Path) -> Path:
    """A model without weights, and a genuine store beside it."""
    folder = tmp_path / "hostile"
    shutil.copytree(source, folder)
    convert_model(folder, options(folder / "evil", delete_original=False))
    next((folder / "evil").glob("*--4bit--*")).rename(folder / "evil" / "store")
    for name in weights(folder):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("whose", ["absolute", "../", "from the working directory", "a linked sub-folder", "its own"])
def test_a_pointer_that_came_with_a_model_deletes_and_opens_nothing(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    monkeypatch.chdir(hostile if whose == "from the working directory" else tmp_path)
    (tmp_path / "private").mkdir()
    (hostile / "sub").symlink_to(tmp_path / "private")
    where, name = {
        "absolute": (tmp_path / "victim", str(tmp_path / "victim")),
        "../": (tmp_path / "victim", "../victim"),
        "from the working directory": (hostile / "victim", "victim"),
        "a linked sub-folder": (tmp_path / "private" / "victim", "sub/victim"),
        "its own": (hostile / "config.json", "config.json"),
    }[whose]
    if not where.exists():
        where.write_text("precious")
    another = Path(shutil.copytree(hostile / "evil" / "store", tmp_path / "cache" / "mine--4bit--bfloat16--00000001"))
    manifest = (another / "manifest.json").read_text()
    (another / "manifest.json").write_text(manifest.replace(str(hostile), "/models/another"))
    found = where.stat()
    files = {"model.safetensors": None, name: [found.st_size, found.st_mtime_ns, found.st_ino]}
    for store in ("evil/store", str(hostile / "evil" / "store"), "evil\0store", str(another), str(where)):
        said = {"folder": str(hostile), "stores": {".": {"store": store, "files": files, "deleting": True}}}
        (hostile / POINTER).write_text(json.dumps(said))
        for how in (PLAIN, options(tmp_path / "shards")):
            with pytest.raises(SourceError, match=r"no record|is damaged") as caught:
                opened(hostile, how)
            assert "\n" not in str(caught.value) and where.stat() == found
    assert opened(hostile / "evil" / "store") == hostile / "evil" / "store"


def test_weights_are_loaded_whatever_a_pointer_says(hostile: Path, source: Path) -> None:
    for name in weights(source):
        shutil.copyfile(source / name, hostile / name)
    one = {"store": str(hostile / "evil/store"), "files": dict.fromkeys(weights(source)), "deleting": True}
    for text in (json.dumps({"stores": {".": one}}), json.dumps({"store": "evil/store"}), "[" * 100_000, "1e999"):
        (hostile / POINTER).write_text(text)
        assert opened(hostile) == hostile and weights(hostile) == weights(source)


def test_a_pointer_is_believed_in_the_folder_that_the_store_was_made_of(source: Path, tmp_path: Path) -> None:
    """Without a record: only what lies where stores of ours are, and nothing is deleted."""
    store = convert_model(source, options(tmp_path / "shards"))
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    with pytest.raises(SourceError, match="no record of that; name that store itself"):
        opened(moved)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(SourceError, match="no record of that"):
        opened(source)
    assert opened(source, LoadOptions.create(device="cpu", layer_shards_saving_path=tmp_path / "shards")) == store
    with pytest.raises(SourceError, match="no record of that"):
        opened(moved, LoadOptions.create(device="cpu", layer_shards_saving_path=tmp_path / "shards"))


def test_a_file_in_the_place_of_one_that_was_to_be_deleted_stays(
    source: Path, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    """Brought back by a copy that keeps the times: another file all the same."""
    kept = Path(shutil.copytree(source, tmp_path / "kept"))
    interrupted(lambda: convert_model(source, options(tmp_path / "shards")), 2)
    back, *rest = weights(source)
    (source / back).unlink()
    (source / "filler").write_bytes(b"takes the number that is free again")
    shutil.copy2(kept / back, source / back)
    opened(source)
    assert weights(source) == [back] and rest


def test_a_plan_deletes_nothing(source: Path, tmp_path: Path) -> None:
    """Not even where the store is finished."""
    before, how = weights(source), options(tmp_path / "shards")
    convert_model(source, options(tmp_path / "shards", delete_original=False))
    prepare(source, how, weights=False).held.close()
    assert weights(source) == before
    opened(source, how)
    assert weights(source) == []


def test_weights_that_changed_since_stay(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the store was written: what it holds is not what is there."""
    import airllm_nb.intake.written as stores

    write, before = stores.write, weights(source)

    def changed(*given: Any) -> Any:
        found = write(*given)
        os.utime(source / before[0], (1, 1))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "write", changed)
        convert_model(source, options(tmp_path / "shards"))
    assert weights(source) == before and not (source / POINTER).exists() and "were changed since" in caplog.text


def test_a_deletion_never_follows_a_link(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weight files that a user linked into the folder are read, and stay; so does what they point to."""
    linked, elsewhere = weights(source)[1], tmp_path / "elsewhere"
    (source / linked).rename(elsewhere)
    (source / linked).symlink_to(elsewhere)
    store = convert_model(source, options(tmp_path / "shards"))
    assert weights(source) == [linked] and elsewhere.is_file() and "links out of a model's folder" in caplog.text
    assert opened(source) == opened(source, options(tmp_path / "shards")) == store
    assert weights(source) == [linked] and elsewhere.is_file()


def test_what_cannot_be_recorded_is_not_deleted(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = weights(source)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / RECORDS).write_text("in the way")
    convert_model(source, options(tmp_path / "shards"))
    assert weights(source) == before and "cannot be deleted" in caplog.text


# ---- shards in a sub-folder ------------------------------------------------------------------------------------------


def test_shards_of_a_sub_folder_are_replaced_too(
    source: Path, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    (source / "sub").mkdir()
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"sub/model-'))
    for name in weights(source):
        (source / name).rename(source / "sub" / name)
    before = weights(source / "sub")
    assert opened(source) == source and len(before) == 4
    interrupted(lambda: convert_model(source, options(tmp_path / "shards")), 2)
    assert weights(source / "sub") == before[2:]
    store = opened(source)
    assert store.parent == tmp_path / "shards" and weights(source / "sub") == []
    (tmp_path / "elsewhere").mkdir()
    (source / "sub").rmdir()
    (source / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="is damaged"):  # its files would be elsewhere now
        opened(source)
