"""What is copied beside weights: regular files of the model's own folder, for no more people than could read them."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from airllm_nb import LoadOptions, convert_model
from airllm_nb.checkpoint import companions as at_rest
from airllm_nb.checkpoint.companions import copy_companions
from airllm_nb.errors import CheckpointError
from airllm_nb.intake.replacements import POINTER

PRIVATE = b'{"secret": 1}'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "x.json").write_bytes(PRIVATE)
    return folder


def copied(source: Path) -> dict[str, bytes]:
    target = source.parent / "store"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    copy_companions(source, target)
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def test_regular_files_of_the_folder_alone(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (source / "chat_template.jinja").write_text("x")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("y")
    (source / "vocab.json").symlink_to("tokenizer.json")  # of the folder itself
    (source / POINTER).write_text("{}")
    (source / "manifest.json").write_text("{}")
    (source / "script.py").write_text("z")
    good = {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "vocab.json",
    }
    assert set(copied(source)) == good
    (source / "notes.json").symlink_to(tmp_path / "private" / "x.json")
    (source / "up.json").symlink_to("../private/x.json")
    (source / "gone.json").symlink_to("/nowhere")
    (source / "self.json").symlink_to("self.json")
    (source / "folder.json").mkdir()
    (source / "device.json").symlink_to("/dev/zero")
    os.mkfifo(source / "pipe.json")
    (source / "additional_chat_templates" / "out.jinja").symlink_to(tmp_path / "private" / "x.json")
    found = copied(source)
    assert set(found) == good and PRIVATE not in found.values()
    assert "notes.json is a link to" in caplog.text and "out.jinja is a link to" in caplog.text


def test_a_linked_folder_of_templates_is_not_entered(source: Path, tmp_path: Path) -> None:
    (tmp_path / "private" / "x.jinja").write_bytes(PRIVATE)
    (source / "additional_chat_templates").symlink_to(tmp_path / "private")
    assert set(copied(source)) == {"config.json", "tokenizer.json"}


def test_a_snapshot_of_the_hub_is_copied_from_its_own_blobs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--o--m" / "blobs", tmp_path / "models--o--m" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "x.json").write_bytes(PRIVATE)
    for name, text in (("config.json", "{}"), ("tokenizer.json", "[]")):
        (blobs / name[:3]).write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/{name[:3]}")
    (snapshot / "notes.json").symlink_to("../../../x.json")
    (blobs / "hop").symlink_to("../../x.json")
    (snapshot / "hop.json").symlink_to("../../blobs/hop")
    assert copied(snapshot) == {"config.json": b"{}", "tokenizer.json": b"[]"}


def test_a_linked_config_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    (source / "config.json").symlink_to(tmp_path / "private" / "x.json")
    with pytest.raises(CheckpointError, match=r"config\.json is a link to .*x\.json.*; put the file itself there"):
        copied(source)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o400, 0o666, 0o4755])
def test_a_copy_is_open_to_no_more(source: Path, mode: int) -> None:
    (source / "tokenizer.json").chmod(mode)
    before = os.umask(0o022)
    try:
        copied(source)
    finally:
        os.umask(before)
    made = stat.S_IMODE((source.parent / "store" / "tokenizer.json").stat().st_mode)
    assert made == mode & 0o777 & ~0o022


@pytest.mark.parametrize(("mode", "open_to"), [(0o600, 0o700), (0o640, 0o750), (0o644, 0o755)])
@pytest.mark.parametrize("shards", [1, 2])
def test_who_may_not_read_the_weights_may_not_read_the_store(
    tiny_llama: Callable[..., Path], tmp_path: Path, mode: int, open_to: int, shards: int
) -> None:
    source = Path(shutil.copytree(tiny_llama(shards=shards), tmp_path / "source"))
    for file in source.glob("*.safetensors"):
        file.chmod(0o644)
    file.chmod(mode)
    before = os.umask(0o022)
    try:
        options = LoadOptions.create(compression="8bit", layer_shards_saving_path=tmp_path / "stores", device="cpu")
        store = convert_model(source, options)
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.stat().st_mode) == open_to


def test_what_is_too_large_for_a_config_is_not_copied(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(at_rest, "MOST_BYTES", 1000)
    (source / "training_data.json").write_bytes(b" " * 1001)
    assert "training_data.json" not in copied(source) and "training_data.json has" in caplog.text


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_stores_of_any_source_hold_nothing_linked(tiny_llama: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    source = Path(shutil.copytree(tiny_llama(dtype="bfloat16"), tmp_path / "source"))
    if kind == "bin":
        import torch
        from safetensors.torch import load_file

        weights = source / "model.safetensors"
        torch.save(load_file(weights), source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        weights.unlink()
    (tmp_path / "private.json").write_bytes(PRIVATE)
    (source / "notes.json").symlink_to(tmp_path / "private.json")
    os.mkfifo(source / "pipe.json")
    (source / "generation_config.json").write_text("{}")
    (source / "generation_config.json").chmod(0o600)
    how = {"device": "cpu", "compression": "4bit", "layer_shards_saving_path": tmp_path / "stores"}
    store = convert_model(source, LoadOptions.create(**how))
    assert not list((tmp_path / "stores").rglob("notes.json")) and not list((tmp_path / "stores").rglob("pipe.json"))
    assert stat.S_IMODE((store / "generation_config.json").stat().st_mode) == 0o600
    for name in ("config.json",):
        (source / name).rename(tmp_path / name)
        (source / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a link to"):
        convert_model(source, LoadOptions.create(**how | {"compression": "8bit"}))
    assert not list((tmp_path / "stores").glob("*8bit*")), "before anything is written"
