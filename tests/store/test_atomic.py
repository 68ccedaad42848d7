"""What a process that was killed left of ours goes with whoever meets it next; what others have or write stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cache_command import jobs

from airllm_nb import LoadOptions, plan_model
from airllm_nb.intake.replacements import POINTER, RECORDS
from airllm_nb.progress import silent
from airllm_nb.store.atomic import begin, sweep, write_atomically
from airllm_nb.store.locks import locked
from airllm_nb.store.manifest import Store, StoreMeta, open_store
from airllm_nb.store.writer import write_store

META = StoreMeta("4bit", "bfloat16", "f" * 16)
THEIRS = [
    "my-download.123-456.tmp",
    "notes.json.1-2.tmp",
    "weights.safetensors.1-2.tmp",
    "foo.tmp",
    "notes.1-x.tmp",
    "model.safetensors.tmp",
    "x.tmp.json",
    "1-2.tmp",
]
OURS = ["manifest.json.1-2.tmp", "config.json.99999-140.tmp", "journal.jsonl.3-4.tmp", "tokenizer.json.1-2.tmp",
        "model.safetensors.index.json.5-6.tmp", "chat_template.jinja.1-2.tmp", "merges.txt.1-2.tmp",
        "vocab.json.1-2.tmp", "layer-00001.safetensors.tmp",
        "rest-00002.safetensors.tmp", "carried-00001-00003.safetensors.tmp", "journal.jsonl"]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", jobs(), META)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave(folder: Path, *left: str) -> None:
    for name in left:
        (folder / name).write_bytes(b"{}\n")


def test_a_finished_store_is_left_tidy(store: Store) -> None:
    before = names(store.folder)
    leave(store.folder, *OURS, *THEIRS)
    open_store(store.folder)
    assert names(store.folder) == before | set(THEIRS)
    leave(store.folder, *OURS)
    write_store(store.folder, jobs(), META)
    assert names(store.folder) == before | set(THEIRS)


def test_what_somebody_writes_stays(store: Store) -> None:
    """A shard and the journal of who has the store; a small file of who has that."""
    leave(store.folder, *OURS)
    writer = "import sys, time; from pathlib import Path; from airllm_nb.store.locks import locked\n"
    writer += "from airllm_nb.store.atomic import begin; from airllm_nb.progress import silent\n"
    writer += "folder = Path(sys.argv[1])\nwith locked(folder, silent):\n    begin(folder / 'config.json', 0o600)"
    writer = writer.replace("    begin", "    kept = begin") + "\n    print('ready', flush=True)\n    sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", writer, str(store.folder)], stdin=-1, stdout=-1) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        open_store(store.folder)
        found = names(store.folder)
        assert {name for name in OURS if name.endswith((".safetensors.tmp", ".jsonl"))} <= found
        assert f"config.json.{process.pid}-" in "".join(found) and "manifest.json.1-2.tmp" not in found
        process.kill()
        process.wait()
    open_store(store.folder)
    assert not [name for name in names(store.folder) if name.endswith(".tmp") or name == "journal.jsonl"]


def test_links_and_pipes_that_are_called_so_stay(store: Store, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("precious")
    (store.folder / "config.json.1-2.tmp").symlink_to(tmp_path / "private")
    (store.folder / "layer-00009.safetensors.tmp").symlink_to(tmp_path / "private")
    os.mkfifo(store.folder / "manifest.json.1-2.tmp")
    open_store(store.folder)
    assert {"config.json.1-2.tmp", "layer-00009.safetensors.tmp", "manifest.json.1-2.tmp"} < names(store.folder)
    assert (tmp_path / "private").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(store.folder, "journal.jsonl", "config.json.1-2.tmp")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    assert open_store(store.folder) is not None


def test_a_load_sweeps_the_model_and_the_cache(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(tiny_llama(), tmp_path / "source"))
    cache = tmp_path / "cache"
    shards = tmp_path / "shards"
    theirs = {"my-download.123-456.tmp", "config.json.1-2.tmp", "foo.tmp"}
    left = {cache: "machine.json", cache / RECORDS: f"{'0' * 16}.json", shards: "",
            cache / "adapters": f"x--{'0' * 16}.safetensors",
            shards / "adapters": f"y--{'1' * 16}.safetensors"}  # fmt: skip
    for folder, ours in left.items():
        folder.mkdir(parents=True, exist_ok=True)
        leave(folder, *theirs, *([f"{ours}.1-2.tmp"] if ours else ["machine.json.1-2.tmp"]))
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(cache))
    leave(source, f"{POINTER}.1-2.tmp", "config.json.1-2.tmp", "foo.tmp")
    before = names(source)
    plan_model(source, LoadOptions.create(device="cpu", layer_shards_saving_path=shards))
    assert names(source) == before - {f"{POINTER}.1-2.tmp"}, "a model's folder is its owner's"
    assert {folder: names(folder) for folder in left} == {
        cache: theirs | {RECORDS, "adapters"}, cache / RECORDS: theirs, cache / "adapters": theirs,
        shards: theirs | {"machine.json.1-2.tmp", "adapters"}, shards / "adapters": theirs,
    }  # fmt: skip


def test_a_file_is_whole_though_somebody_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the moment between making it and locking it."""
    import fcntl

    lock, times = fcntl.flock, [3]

    def swept(descriptor: int, how: int) -> None:
        if times[0]:
            times[0] -= 1
            [made] = tmp_path.glob("*.tmp")
            made.unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", swept)
    write_atomically(tmp_path / "a.json", b"whole")
    monkeypatch.undo()
    temporary, file = begin(tmp_path / "b.json", 0o600)
    with file:
        sweep(tmp_path, lambda name: name == "b.json")
        assert temporary.exists()
    sweep(tmp_path, lambda name: name == "b.json")
    assert names(tmp_path) == {"a.json"} and (tmp_path / "a.json").read_bytes() == b"whole"


def test_what_is_planted_in_the_place_of_a_temporary_is_not_written_through(tmp_path: Path) -> None:
    temporary, file = begin(tmp_path / "a.json", 0o600)
    file.close()
    temporary.unlink()
    (tmp_path / "private").write_text("precious")
    temporary.symlink_to(tmp_path / "private")
    write_atomically(tmp_path / "a.json", b"new")
    assert (tmp_path / "private").read_text() == "precious" and not (tmp_path / "a.json").is_symlink()


def test_the_one_that_writes_sweeps_too(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with locked(folder, silent):
        leave(folder, *OURS[:-1], *THEIRS)
        write_store(folder, jobs(), META)
    assert not set(OURS) & names(folder) and set(THEIRS) < names(folder)
