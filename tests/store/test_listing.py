"""Stores of repositories on the Hub that are found again: by what is in the files, and without the Hub."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from test_cache_command import jobs
from test_piecewise import Loader

from airllm_nb import LoadOptions
from airllm_nb.intake.find.identity import by_commit, by_contents, stored
from airllm_nb.store.manifest import StoreMeta
from airllm_nb.store.writer import write_store

SHA = {"a": "a" * 64, "b": "b" * 64, "config.json": "c" * 40}
LATER = "f" * 40


# ---- what is the same ------------------------------------------------------------------------------------------------


def test_the_contents_of_weights_and_config_are_what_counts() -> None:
    same = by_contents("org/m", SHA, ("a", "b"))
    assert same and by_contents("org/m", SHA | {"README.md": "1" * 40}, ("a", "b")) == same
    others = [("org/n", SHA), ("org/m", SHA | {"a": "d" * 64}), ("org/m", SHA | {"config.json": "d" * 40})]
    assert same not in {by_contents(repo_id, contents, ("a", "b")) for repo_id, contents in others}
    # Without a sum of its own a file may be another at another commit.
    assert by_contents("org/m", SHA | {"a": "0" * 40}, ("a", "b")) == by_contents("org/m", SHA, ("a", "x")) == ""


def test_a_store_without_its_weights_is_found_by_its_repository(tmp_path: Path) -> None:
    def made(codec: str, dtype: str, source: str, **how: Any) -> str:
        folder = tmp_path / f"m--{codec}--{dtype}--{source[:8]}"
        beside = lambda folder: (folder / "config.json").write_text("{}")  # noqa: E731
        return write_store(folder, jobs(), StoreMeta(codec, dtype, source), beside=beside, **how).folder.name

    def found(repo_id: str = "org/m", gguf: str | None = None, **how: Any) -> str | None:
        given = {"compression": "4bit", "layer_shards_saving_path": tmp_path} | how
        store = stored(repo_id, gguf, LoadOptions.create(**given))
        return store and store.name

    old = by_commit("org/m", LATER, ["model.safetensors"])
    one = made("4bit", "bfloat16", "1" * 16, origin="org/m", revision="c1")
    made("4bit", "bfloat16", "2" * 16, origin="org/other")
    made("none", "bfloat16", "3" * 16, origin="org/m")
    assert found() == found(revision="c1") == found(dtype="bfloat16") == found(gguf="x/m.gguf") == one
    assert found(revision="c2") is found(dtype="float16") is found(compression="8bit") is found(gguf="n.gguf") is None
    assert found(compression=None) is found("org/nothing") is None
    two = made("4bit", "bfloat16", old, origin="org/m")
    assert found(revision=LATER) == two and found(revision="c1") == one
    (tmp_path / one / "rest.safetensors").unlink()
    assert found() == two


# ---- through a load --------------------------------------------------------------------------------------------------


class _Honest(hub_server._Handler):
    """Lists sums and sends them as the names of contents, as the real Hub; answers nothing while it is ``dead``."""

    def _answer(self) -> None:
        if self.hub.dead:
            self.close_connection = True
            return
        super()._answer()

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        if self.path.startswith("/api/") and b'"siblings"' in data and self.hub.sums:
            said = json.loads(data)
            files = self.hub.repositories[said["id"]]
            for file in said["siblings"]:
                content = files[file["rfilename"]]
                file["blobId"] = hashlib.sha256(content).hexdigest()
                if file["rfilename"].endswith(".safetensors"):
                    file["lfs"] = {"size": len(content), "sha256": file["blobId"], "pointerSize": 130}
            data = json.dumps(said).encode()
        super()._send(status, data, headers, cut)


@pytest.fixture(scope="module")
def loader(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    patch = pytest.MonkeyPatch()
    patch.setattr(hub_server, "_Handler", _Honest)
    patch.setattr(hub_server, "_etag", lambda data: hashlib.sha256(data).hexdigest())
    with hub_server.serve() as hub:
        hub.sums, hub.dead = True, False  # type: ignore[attr-defined]
        loader = Loader(hub, tmp_path_factory.mktemp("stores"), tiny_llama(dtype="bfloat16"))
        yield loader
        loader.close()
    patch.undo()


@pytest.fixture
def publish(loader: Loader, tiny_llama: Callable[..., Path], request: pytest.FixtureRequest) -> Callable[..., str]:
    """``publish(shards=2)``: a repository of the test's own."""

    def add(shards: int = 1) -> str:
        name = f"org/{request.node.name.replace('[', '-').replace(']', '')}"
        folder = tiny_llama(dtype="bfloat16", shards=shards)
        loader.hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return name

    return add


def stages(answer: dict[str, Any]) -> set[str]:
    assert "error" not in answer, answer
    return {report[0] for report in answer["reports"]}


@pytest.mark.parametrize("delete", [True, False])
def test_a_commit_to_the_readme_keeps_the_store(
    loader: Loader, publish: Callable[..., str], monkeypatch: pytest.MonkeyPatch, delete: bool
) -> None:
    name = publish(shards=2)
    files, how = loader.hub.repositories[name], {"delete_original": delete}
    first = loader(name, options=how)
    assert "convert" in stages(first) and loader(name, options=how)["folder"] == first["folder"]
    monkeypatch.setattr(hub_server, "COMMIT", LATER)
    files["README.md"] = b"one more word"
    before = len(loader.hub.sent)
    again = loader(name, options=how)
    assert again["folder"] == first["folder"] and "convert" not in stages(again)
    headers = sum(nbytes for file, _, nbytes in loader.hub.sent[before:] if file.endswith(".safetensors"))
    assert headers < len(files["model-00001-of-00002.safetensors"]) / 4
    assert loader(name, options=how | {"local_files_only": True})["folder"] == first["folder"]
    monkeypatch.setattr(hub_server, "COMMIT", "e" * 40)
    files["config.json"] += b" "
    other = loader(name, options=how)
    assert other["folder"] != first["folder"] and "convert" in stages(other)


def test_a_deletion_that_was_cut_short_is_finished(loader: Loader, publish: Callable[..., str]) -> None:
    name = publish(shards=2)
    first = loader(name, options={"delete_original": False})
    cached = loader.snapshot(name) / "model-00001-of-00002.safetensors"
    cached.resolve().unlink()
    cached.unlink()
    assert loader(name)["folder"] == first["folder"]
    assert not list(loader.snapshot(name).glob("*.safetensors")) and max(loader.blobs(name), default=0) == 0


def test_a_store_of_an_earlier_version_is_found(
    loader: Loader, publish: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprint was made of the commit."""
    name = publish()
    with monkeypatch.context() as patch:
        patch.setattr(loader.hub, "sums", False)
        first = loader(name, options={"delete_original": False})
    assert "convert" in stages(first)
    again = loader(name)
    assert again["folder"] == first["folder"] and "convert" not in stages(again)
    assert not loader.snapshot(name).joinpath("model.safetensors").exists(), "deleted, as was asked"
    assert "convert" not in stages(loader(name))


@pytest.mark.parametrize("shards", [1, 2])
def test_without_the_hub_a_store_stands_for_its_repository(
    loader: Loader, publish: Callable[..., str], shards: int
) -> None:
    name, alone = publish(shards), {"local_files_only": True}
    first = loader(name)
    assert not list(loader.snapshot(name).glob("*.safetensors"))
    assert loader(name, options=alone)["folder"] == first["folder"]
    loader.hub.dead = True  # type: ignore[attr-defined]
    try:
        assert loader(name)["folder"] == first["folder"]
        for how in ({"compression": "8bit"}, {"dtype": "float16"}, {"revision": LATER}):
            refused = loader(name, options={"delete_original": False} | alone | how)
            assert refused["error"] in ("SourceError", "CheckpointError"), refused
        shutil.rmtree(loader.snapshot(name).parents[1])
        assert loader(name)["folder"] == loader(name, options=alone)["folder"] == first["folder"]
        assert "not in the local cache" in loader(f"{name}-typo", options=alone)["text"]
    finally:
        loader.hub.dead = False  # type: ignore[attr-defined]
