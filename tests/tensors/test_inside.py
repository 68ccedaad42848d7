"""Names that come with a model lead to files below its folder, and nowhere else."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cache_command import jobs

import airllm_nb
from airllm_nb import LoadOptions
from airllm_nb.checkpoint.hub.repository import Repository
from airllm_nb.errors import CheckpointError, StoreError
from airllm_nb.store.listing import cached_stores
from airllm_nb.store.manifest import StoreMeta, open_store
from airllm_nb.store.writer import Journal, write_store
from airllm_nb.tensors.inside import inside, is_inside

OUTSIDE = ["..", "../x", "a/../../x", "a/..", "/etc/passwd", "//host/x", "C:x", "C:/x", "c:\\x", "..\\x", "a\\x",
           "\\\\h", "", ".", "./", "/", "a\0b", "\ud800/x"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name)[:20])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x").write_text("private")
    with pytest.raises(CheckpointError, match="points outside") as caught:
        inside(folder, name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [None, 1, b"x", ["x"], Path("x")])
def test_what_is_no_name_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(TypeError):
        inside(tmp_path, name)  # type: ignore[arg-type]


def test_names_below_are_files_there(tmp_path: Path) -> None:
    assert inside(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"
    assert inside(tmp_path, "./sub//x..y.bin") == tmp_path / "sub" / "x..y.bin"
    assert inside(Path("model"), "x") == Path("model/x")


def test_links(tmp_path: Path) -> None:
    """The folder may be one, and the file; a folder on the way only if it stays below."""
    folder, private = tmp_path / "model", tmp_path / "private"
    (folder / "sub").mkdir(parents=True)
    private.mkdir()
    (folder / "out").symlink_to(private)
    (folder / "up").symlink_to("..")
    (folder / "same").symlink_to("sub")
    (folder / "circle").symlink_to("circle")
    (folder / "weights").symlink_to(private / "weights")
    (tmp_path / "mine").symlink_to(folder)
    for root in (folder, tmp_path / "mine"):
        for name in ("weights", "same/x", "sub/x"):
            assert inside(root, name) == root / name
        for name in ("out/x", "up/x", "circle/x", "same/../up/x"):
            with pytest.raises(CheckpointError, match="points outside"):
                inside(root, name)


@given(st.text(st.sampled_from("a./\\:\0 C~\n"), max_size=12) | st.text(max_size=12))
def test_what_passes_stays_below(name: str) -> None:
    if is_inside(name):
        below = Path("/models/m")
        assert below in (below / name).parents and ".." not in Path(name).parts


# ---- nobody else makes paths of names --------------------------------------------------------------------------------

# module: what is joined to a folder there that is no constant, and why it may be
JOINS = {
    "checkpoint.companions": {"name"},  # a folder is made for what was found below another
    "checkpoint.lora.files": {"weights", "_choose({file.name for file in entries(folder)}, repo_id)",
                              "_choose({file.name for file in entries(path)}, path)",  # one of two constants
                              "str(StoreName(file.parent.name, ADAPTER, '', key))"},  # a folder's own name
    "checkpoint.rewrite": {"path.relative_to(made)"},  # what we made
    # made of a cleaned name
    "checkpoint.source": {"str(StoreName(source.name, codec_name or 'none', dtype, source.fingerprint[:8]))"},
    "cli.doctor": {"name", "old"},  # /sys
    "intake.containers.safetensors": {"source.wanted[0]", "name", "file"},  # the source is checked; constants
    "intake.find.hub": {"choice.index", "gguf"},  # a constant; what the user named is looked for
    "intake.find.identity": {"choice.index"},  # a constant
    "intake.find.local": {"choice.index", "name"},  # a constant; what the user named
    "intake.pointer": {"key", "name"},  # keys are checked when they are read; what the user named
    "intake.replacements": {"key"},  # compared, not opened
    "store.manifest": {"shard['file']"},  # of a manifest that was checked
    "store.shard": {"job.file"},  # shards are named by numbers
    "store.portions": {"job.file"},  # likewise
    "store.writer": {"file", "job.file", "name"},  # likewise
    "tensors.index": {"shard"},  # a key of a mapping, and in a message
    "tensors.inside": {"name"},  # the one place
}  # fmt: skip
_FOLDER = re.compile(r"_?(folder|path|parent|root|base|where|target|snapshot|made|above|cache\w*|dir|Path)(\(.*\))?")


def joins(source: str) -> set[str]:
    """What is joined to a folder and is no constant."""
    return {
        ast.unparse(node.right)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and not isinstance(node.right, (ast.Constant, ast.JoinedStr))
        and not ast.unparse(node.right).split(".")[-1].isupper()
        and _FOLDER.fullmatch(
            re.sub(r"\.(resolve|absolute|expanduser)\(\)$", "", ast.unparse(node.left)).split(".")[-1]
        )
    } | {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("joinpath", "path.join"))
    }


def test_names_become_paths_in_one_place() -> None:
    package = Path(airllm_nb.__file__).parent
    found = {
        ".".join(path.relative_to(package).with_suffix("").parts): joins(path.read_text("utf-8"))
        for path in package.rglob("*.py")
    }
    assert [(module, names - JOINS.get(module, set())) for module, names in found.items()
            if names - JOINS.get(module, set())] == []  # fmt: skip


@pytest.mark.parametrize("line", ["folder / name", "self._folder / shard['file']", "a.parent / b", "Path(a) / b",
                                  "folder.joinpath(b)", "os.path.join(a, b)", "cache_dir() / name"])  # fmt: skip
def test_another_place_is_found(line: str) -> None:
    assert joins(line) and not joins("folder / 'x'\nfolder / CONFIG\nnbytes / seconds\ninside(folder, name)")


# ---- who reads such names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "out/x.safetensors", "a\\x.safetensors", ""])
def test_a_manifest_names_its_own_shards(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "store"
    write_store(folder, jobs(), StoreMeta("4bit", "bfloat16", "f" * 16))
    (tmp_path / "x.safetensors").write_bytes(b"private")
    (folder / "out").symlink_to(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="is damaged"):
        open_store(folder)
    assert cached_stores(tmp_path)[0].state == "damaged"


def test_a_journal_removes_its_own_shards(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"private")
    (folder / "layer-00000.safetensors").write_bytes(b"of another configuration")
    names = ["../x.safetensors", str(tmp_path / "x.safetensors"), "layer-00000.safetensors"]
    lines = [{"key": "another"}, *({"file": name} for name in names)]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Journal(folder, "mine", {})
    assert (tmp_path / "x.safetensors").exists() and not (folder / "layer-00000.safetensors").exists()


def test_a_listing_of_the_hub_names_files_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["config.json", "../x.gguf", "/x.gguf", "a\\..\\x.gguf", "sub/x.gguf", "C:x.gguf"]
    files = [SimpleNamespace(rfilename=name, size=1, lfs=None, blob_id="") for name in names]
    answer = SimpleNamespace(sha="c0ffee", siblings=files)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: answer)
    found = Repository("org/m", LoadOptions.create())
    assert set(found.sizes) == set(found.contents) == {"config.json", "sub/x.gguf"}
