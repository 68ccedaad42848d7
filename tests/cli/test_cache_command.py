"""``airllm-nb cache``: what is a store and what is not, and that nothing else is ever removed."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airllm_nb.cli import main
from airllm_nb.errors import SourceError, StoreError
from airllm_nb.intake.find.identity import by_commit, by_contents, fingerprints_at
from airllm_nb.intake.pointer import POINTER, original_of
from airllm_nb.progress import silent
from airllm_nb.store.locks import Hold, locked
from airllm_nb.store.manifest import StoreMeta
from airllm_nb.store.names import LOCK, MANIFEST
from airllm_nb.store.shard import ShardJob, plain
from airllm_nb.store.writer import write_store

ROOT = Path(__file__).parents[2]
ONE, TWO = "llama--4bit--bfloat16--00000001", "llama--8bit--float16--00000002"


def environment() -> dict[str, str]:
    """Of a shell, with the cache folder of the test."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def jobs(produce: Callable[[], Any] = lambda: [bytes(5000)]) -> list[ShardJob]:
    return [ShardJob(name, (plain(name, "U8", (5000,), produce),)) for name in ("layer-00000", "rest")]


def finished(base: Path, name: str, source: str = "f" * 16, **how: Any) -> Path:
    _, codec, dtype, _ = name.split("--")
    return write_store(base / name, jobs(), StoreMeta(codec, dtype, source), **how).folder


def checkpoint(folder: Path) -> tuple[Path, str]:
    """A folder with a config and two weight files, and its fingerprint."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(bytes(100))
    [fingerprint] = fingerprints_at(str(folder))
    return folder, fingerprint


def unfinished(base: Path, name: str) -> Path:
    def broken() -> Any:
        yield bytes(100)
        raise StoreError("cut short")

    with pytest.raises(StoreError, match="cut short"):
        write_store(base / name, [*jobs()[:1], *jobs(broken)[1:]], StoreMeta("4bit", "bfloat16", "x"))
    return base / name


def picture(folder: Path) -> dict[str, str]:
    """Every file below by its content, every link by its target."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def others(base: Path, outside: Path) -> None:
    """What may lie beside stores and is none: downloads, checkpoints, a web extension, links, look-alikes."""
    blobs, snapshot = base / "models--org--llama" / "blobs", base / "models--org--llama" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_bytes(bytes(100))
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (base / "extension").mkdir()
    (base / "extension" / MANIFEST).write_text('{"name": "x", "version": "1", "manifest_version": 3}')
    (base / "mine").mkdir()
    (base / "mine" / "model.safetensors").write_bytes(bytes(100))
    (base / "samples").mkdir()
    (base / "samples" / LOCK).touch()
    (base / "samples" / "model.gguf").write_bytes(bytes(100))
    (base / "look--4bit--bfloat16--0000abcd").mkdir()  # no lock of ours
    (base / "look--4bit--bfloat16--0000abcd" / "notes.txt").write_text("mine")
    (base / "photos.0a1b2c3d.removing").mkdir()
    (base / "photos.0a1b2c3d.removing" / "cat.jpg").write_bytes(b"cat")
    (base / "machine.json").write_text("{}")
    finished(outside, "away--4bit--bfloat16--00000009")
    (base / "linked--4bit--bfloat16--00000009").symlink_to(outside / "away--4bit--bfloat16--00000009")
    (base / "to-outside").symlink_to(outside)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, not made yet."""
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cli(capsys: Any) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["cache", *map(str, arguments)])
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capsys.readouterr()

    return run


def listed(cli: Callable[..., Any], *arguments: object) -> dict[str, dict[str, Any]]:
    code, out, err = cli("--json", *arguments)
    assert (code, err) == (0, "")
    return {store["name"]: store for store in json.loads(out)["stores"]}


def names(base: Path) -> set[str]:
    return {path.name for path in base.iterdir()}


# ---- list ------------------------------------------------------------------------------------------------------------


def test_a_cache_that_is_not_there_is_empty(cli: Callable[..., Any], base: Path) -> None:
    code, out, err = cli()
    assert (code, err) == (0, "") and out.startswith(f"no stores in {base}, ") and out.endswith("free there\n")
    assert cli("remove", "--all", "--yes") == (0, "there is nothing to remove\n", "")
    assert not base.exists()
    code, out, err = cli("--shards", base)
    assert (code, out) == (1, "") and "check the path" in err


def test_every_fact_of_a_store(cli: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    source, known = checkpoint(tmp_path / "source")
    one = finished(base, ONE, known, origin=str(source), beside=lambda f: (f / "config.json").write_text("{}"))
    finished(base, TWO, origin="org/name")
    unfinished(base, "qwen--4bit--bfloat16--00000003")
    damaged = finished(base, "phi--4bit--bfloat16--00000004")
    (damaged / "rest.safetensors").unlink()
    bare = base / "gone--normalised--float32--00000005"
    bare.mkdir()
    (bare / LOCK).touch()
    others(base, tmp_path / "outside")
    found = listed(cli)
    assert {name: store["state"] for name, store in found.items()} == {
        ONE: "finished", TWO: "finished", "qwen--4bit--bfloat16--00000003": "unfinished",
        "phi--4bit--bfloat16--00000004": "damaged", bare.name: "unfinished"}  # fmt: skip
    assert found[ONE]["bytes"] == sum(path.stat().st_size for path in one.rglob("*")) and not found[ONE]["in_use"]
    assert (found[ONE]["model"], found[ONE]["codec"], found[ONE]["dtype"]) == ("llama", "4bit", "bfloat16")
    assert (found[ONE]["origin"], found[ONE]["origin_is_here"]) == (str(source), True)
    assert (found[TWO]["origin"], found[TWO]["origin_is_here"]) == ("org/name", False)
    assert (found[ONE]["only_copy"], found[TWO]["only_copy"]) == (False, True)
    assert found[bare.name]["codec"] == "normalised" and found[bare.name]["origin_is_here"] is None
    code, out, _ = cli()
    lines = out.splitlines()
    assert code == 0 and len(lines) == 7 and lines[-1].startswith("5 stores (") and str(base) in lines[-1]
    row = next(line for line in lines if line.startswith(TWO))
    assert "8bit" in row and "float16" in row and "KiB" in row
    assert row.endswith("org/name (not here any more: the only copy)")
    total = json.loads(cli("list", "--json")[1])
    assert total["bytes"] == sum(store["bytes"] for store in found.values()) and total["free_bytes"] > 0


def test_who_uses_a_store_and_when_it_was_used_last(cli: Callable[..., Any], base: Path) -> None:
    one, two = finished(base, ONE), finished(base, TWO)
    for folder in (one, two):
        for path in folder.iterdir():
            os.utime(path, (1_000_000_000, 1_000_000_000))
    before = listed(cli)
    assert {store["last_used"][:4] for store in before.values()} == {"2001"}
    assert listed(cli) == before  # looking is no use
    with Hold(one), locked(base / "new--4bit--float16--0000000a", silent):
        found = listed(cli)
        assert [found[name]["in_use"] for name in sorted(found)] == [True, False, True]
        assert found["new--4bit--float16--0000000a"]["state"] == "converting"
        assert "finished, in use" in cli()[1]
    after = listed(cli)
    assert after[ONE]["last_used"] > "2020" and after[TWO] == before[TWO] and not after[ONE]["in_use"]


def test_synthetic_checkpoints_are_listed_and_removed(
    cli: Callable[..., Any], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airllm_nb.bench.measure import synthetic_model

    monkeypatch.setattr("airllm_nb.bench.measure.cache_dir", lambda: base)
    whole, packed = (synthetic_model("small", 1, compression) for compression in (None, "8bit"))
    found = listed(cli)
    assert {name: store["state"] for name, store in found.items()} == {
        f"synthetic/{folder.name}": "finished" for folder in (whole, packed)
    }
    assert cli("remove", f"synthetic/{whole.name}", "-y")[0] == 0
    assert not whole.exists() and packed.is_dir()
    next(packed.glob("*.safetensors")).unlink()
    assert listed(cli)[f"synthetic/{packed.name}"]["state"] == "damaged"


def test_it_starts_without_torch(base: Path) -> None:
    finished(base, ONE, origin="org/name")
    source = "import sys, airllm_nb.cli as c; c.main(['cache', '--json']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment(),
                          check=True)  # fmt: skip
    assert done.stdout.endswith("False\n") and ONE in done.stdout


# ---- remove ----------------------------------------------------------------------------------------------------------


def test_only_stores_are_removed(cli: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    others(base, tmp_path / "outside")
    before, outside = picture(base), picture(tmp_path / "outside")
    one = finished(base, ONE)
    (one / "link").symlink_to(tmp_path / "outside")
    unfinished(base, TWO)
    code, out, err = cli("remove", "--all", "--yes")
    assert (code, err) == (0, "") and out.count("removed ") == 2
    assert picture(base) == before and picture(tmp_path / "outside") == outside
    for name in ("mine", "extension", "models--org--llama", "samples", "linked--4bit--bfloat16--00000009", "to-outside",
                 "..", ".", "../outside", str(tmp_path / "outside"), "look--4bit--bfloat16--0000abcd"):  # fmt: skip
        code, out, err = cli("remove", name, "--yes")
        assert (code, out, err.count("\n")) == (1, "", 1) and "there is no store" in err
    assert picture(base) == before and picture(tmp_path / "outside") == outside


def test_names_models_and_what_is_unfinished(cli: Callable[..., Any], base: Path) -> None:
    unfinished(base, "qwen--4bit--bfloat16--00000003")
    finished(base, "phi--4bit--bfloat16--00000004")
    finished(base, ONE)
    with locked(base / "new--4bit--float16--0000000a", silent):
        code, out, _ = cli("remove", "--unfinished", "-y", "--json")
        assert code == 0 and list(json.loads(out)["removed"]) == ["qwen--4bit--bfloat16--00000003"]
    assert names(base) == {ONE, "phi--4bit--bfloat16--00000004"}
    finished(base, TWO)
    assert cli("remove", TWO, "-y")[0] == 0 and names(base) == {ONE, "phi--4bit--bfloat16--00000004"}
    finished(base, TWO)
    code, out, _ = cli("remove", "llama", "-y", "--json")
    document = json.loads(out)
    assert code == 0 and set(document["removed"]) == {ONE, TWO} and document["refused"] == {}
    assert document["bytes"] == sum(document["removed"].values()) > 20_000
    assert names(base) == {"phi--4bit--bfloat16--00000004"}
    code, _, err = cli("remove", "pih", "-y")
    assert code == 1 and "did you mean phi?" in err


def test_another_folder_is_named_with_shards(cli: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    finished(base, ONE)
    finished(tmp_path / "big disk", TWO)
    assert set(listed(cli, "--shards", tmp_path / "big disk")) == {TWO}
    assert cli("--shards", tmp_path / "big disk", "remove", ONE, "-y")[0] == 1
    assert cli("remove", TWO, "-y", "--shards", tmp_path / "big disk")[0] == 0
    assert names(tmp_path / "big disk") == set() and names(base) == {ONE}


@pytest.mark.parametrize("origin", ["/" + "x" * 300, "x" * 300, "a/" + "y" * 300, "/a/" + "z" * 5000, "/a\0b", "a\0b"],
                         ids=lambda origin: ascii(origin[:3]) + str(len(origin)))  # fmt: skip
@pytest.mark.parametrize("codec", ["4bit", "normalised"])
def test_an_origin_that_no_file_can_have_is_not_here(
    cli: Callable[..., Any], base: Path, origin: str, codec: str
) -> None:
    name = f"llama--{codec}--bfloat16--00000001"
    finished(base, name, origin=f"{origin}.gguf" if codec == "normalised" else origin)
    assert listed(cli)[name]["origin_is_here"] is False
    assert cli()[0] == 0
    if codec == "normalised":
        with pytest.raises(SourceError):
            original_of(base / name, base)


def test_what_is_in_use_stays_and_the_rest_goes(cli: Callable[..., Any], base: Path) -> None:
    one = finished(base, ONE)
    finished(base, TWO)
    with Hold(one), locked(base / "new--4bit--float16--0000000a", silent):
        code, out, err = cli("remove", "--all", "--yes")
        assert code == 1 and out.startswith(f"removed {TWO}") and out.count("\n") == 1
        assert err.count("\n") == 2 and "in use; unload the model" in err and "being converted" in err
        assert names(base) == {ONE, "new--4bit--float16--0000000a"}
    assert cli("remove", "--all", "--yes")[0] == 0 and names(base) == set()


@pytest.mark.parametrize("arguments", [(), ("--all", "llama"), ("--all", "--unfinished"), ("x", "--unfinished")])
def test_what_is_meant_must_be_said_once(cli: Callable[..., Any], base: Path, arguments: tuple[str, ...]) -> None:
    finished(base, ONE)
    code, out, err = cli("remove", *arguments, "--yes")
    assert (code, out, err.count("\n")) == (2, "", 1) and "NAME …, --unfinished" in err
    assert names(base) == {ONE}


def test_nobody_to_ask(base: Path) -> None:
    finished(base, ONE)
    done = subprocess.run([sys.executable, "-m", "airllm_nb", "cache", "remove", "--all"], env=environment(),
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and "add --yes" in done.stderr and done.stderr.count("\n") == 1
    assert names(base) == {ONE}


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, set()), ("\n", 1, {ONE}), ("no\n", 1, {ONE})])
def test_somebody_is_asked(base: Path, answer: str, code: int, left: set[str]) -> None:
    folder = finished(base, ONE, origin="/nowhere/llama")
    keyboard, terminal = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "airllm_nb", "cache", "remove", ONE], env=environment(), stdin=terminal,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            os.write(keyboard, answer.encode())
            _, err = process.communicate(timeout=120)
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert process.returncode == code and names(base) == left
    assert str(folder) in err and "KiB" in err and "remove 1 store (" in err
    assert "the only copy of /nowhere/llama on this machine" in err


def test_a_removal_that_is_killed_is_completed_by_the_next(cli: Callable[..., Any], base: Path) -> None:
    finished(base, TWO)
    for _ in range(20):  # it may be faster
        folder = finished(base, ONE)
        for number in range(8_000):
            (folder / f"{number}.safetensors").touch()
        with subprocess.Popen([sys.executable, "-m", "airllm_nb", "cache", "remove", ONE, "-y"], env=environment(),
                              stdout=subprocess.DEVNULL) as process:  # fmt: skip
            while folder.exists() and process.poll() is None:
                time.sleep(0.001)
            process.kill()
        if process.returncode == -signal.SIGKILL and not folder.exists():
            break
    assert not folder.exists() and len(names(base)) == 2
    [grave] = names(base) - {TWO}
    found = listed(cli)
    assert found[grave]["state"] == "half removed" and (found[grave]["model"], found[grave]["codec"]) == (
        "llama", "4bit")  # fmt: skip
    assert not (base / grave / MANIFEST).exists() or folder.name in grave
    shutil.copytree(base / grave, base / "copy")
    # Any removal completes it, and so does asking for it alone.
    assert cli("remove", TWO, "-y")[0] == 0 and names(base) == {"copy"}
    (base / "copy").rename(base / grave)
    assert cli("remove", "--unfinished", "-y")[0] == 0 and names(base) == set()


def test_what_the_disk_refuses_is_said(cli: Callable[..., Any], base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = finished(base, ONE), finished(base, TWO)
    unlink = Path.unlink

    def refused(path: Path, *given: Any) -> None:
        if path.name == "rest.safetensors" and ONE in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        code, out, err = cli("remove", "--all", "--yes")
    assert code == 1 and TWO in out and err.count("\n") == 1 and "Permission denied" in err and ".removing" in err
    assert not one.exists() and not two.exists()
    [grave] = names(base)
    assert sorted(names(base / grave)) == [LOCK, "rest.safetensors"]
    assert cli("remove", "--all", "--yes")[0] == 0 and names(base) == set()


@pytest.mark.parametrize("arguments", [(), ("list",), ("remove",)])
def test_help(cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    code, out, err = cli(*arguments, "--help")
    assert (code, err) == (0, "") and out.startswith("usage: airllm-nb cache") and "--json" in out and "--shards" in out


@pytest.mark.parametrize(
    ("remedy", "arguments"), [("did you mean --yes?", ("remove", "x", "--yse")), ("invalid choice", ("rmeove",))]
)
def test_a_mistake_is_one_line(cli: Callable[..., Any], remedy: str, arguments: tuple[str, ...]) -> None:
    code, out, err = cli(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and remedy in err


# ---- the only copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "is_here"),
    [("config a b", True), ("config a", None), ("config a airllm_nb_store", False), ("config", False), ("", False)],
)
def test_a_folder_is_here_while_its_weights_are(
    cli: Callable[..., Any], base: Path, tmp_path: Path, left: str, is_here: bool | None
) -> None:
    source, known = checkpoint(tmp_path / "source")
    finished(base, ONE, known, origin=str(source))
    (source / POINTER).write_text("{}")
    for path in source.iterdir():
        if path.stem not in left.split():
            path.unlink()
    facts = listed(cli)[ONE]
    assert (facts["origin_is_here"], facts["only_copy"]) == (is_here, is_here is False)


def test_other_weights_in_the_place_of_the_original_say_nothing(
    cli: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    source, known = checkpoint(tmp_path / "source")
    finished(base, ONE, known, origin=str(source))
    (source / "a.safetensors").write_bytes(bytes(101))
    assert (listed(cli)[ONE]["origin_is_here"], listed(cli)[ONE]["only_copy"]) == (None, False)


def test_a_repository_is_here_while_its_weights_are(
    cli: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    files = {"config.json": "c" * 40, "model.safetensors": "d" * 64}
    for name, blob in files.items():
        (blobs / blob).write_text("{}")
        (snapshot / name).symlink_to(blobs / blob)
    finished(base, ONE, by_contents("org/name", files, ["model.safetensors"]), origin="org/name")
    finished(base, TWO, by_commit("org/name", "c0ffee", ["model.safetensors"]), origin="org/name")
    assert [store["origin_is_here"] for store in listed(cli).values()] == [True, True]
    for path in (snapshot / "model.safetensors", blobs / files["model.safetensors"]):
        path.unlink()
    assert [store["only_copy"] for store in listed(cli).values()] == [True, True]


def test_the_only_copy_is_not_removed_unless_it_is_named(cli: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    source, known = checkpoint(tmp_path / "source")
    finished(base, ONE, known, origin=str(source))
    finished(base, TWO, origin="/nowhere/llama")
    finished(base, "old--4bit--bfloat16--00000003")  # of an earlier version, which noted no origin
    beside_gguf(base, "/nowhere/llama.gguf")
    code, out, err = cli("remove", "--all", "--yes")
    assert code == 1 and out.count("removed ") == 3 and names(base) == {TWO}
    assert err == f"airllm-nb: {TWO} is the only copy of /nowhere/llama on this machine; name it to remove it\n"
    assert json.loads(cli("remove", "--all", "--yes", "--json")[1])["refused"].keys() == {TWO}
    assert cli("remove", "/nowhere/llama", "--yes")[0] == 0 and names(base) == set()


def test_a_name_of_several_models_is_refused(cli: Callable[..., Any], base: Path) -> None:
    finished(base, ONE, origin="/a/llama")
    finished(base, TWO, origin="/b/llama")
    unfinished(base, "llama--4bit--float16--00000003")
    code, out, err = cli("remove", "llama", "--yes")
    assert (code, out, err.count("\n")) == (1, "", 1) and "of 2 models" in err and "/a/llama, /b/llama" in err
    assert len(names(base)) == 3
    assert cli("remove", "/a/llama", "--yes")[0] == 0 and ONE not in names(base) and TWO in names(base)
    finished(base, ONE)
    code, _, err = cli("remove", "llama", "--yes")
    assert code == 1 and f"/b/llama, {ONE}" in err
    assert cli("remove", TWO, "--yes")[0] == 0
    assert cli("remove", "llama", "--yes")[0] == 0 and names(base) == set()


# ---- what is no store of a whole model -------------------------------------------------------------------------------


def beside_gguf(base: Path, origin: str, number: int = 1) -> Path:
    """What is written beside a GGUF file: its name says so, its manifest has no codec."""
    folder = base / f"tiny--normalised--bfloat16--{number:08x}"
    return write_store(folder, jobs(), StoreMeta("none", "bfloat16", "f" * 16), origin=origin).folder


def snapshot_of(tmp_path: Path, repo: str, file: str) -> Path:
    """A file in the Hub's cache."""
    path = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / "c0ffee" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    return path


def test_what_lies_beside_a_file_of_the_hub_has_its_name(cli: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    file = snapshot_of(tmp_path, "org/tiny-GGUF", "tiny.gguf")
    ours = beside_gguf(base, str(file))
    finished(base, "gone--none--float32--00000005", origin="/nowhere/gone")
    found = listed(cli)
    assert (found[ours.name]["holds"], found[ours.name]["origin"]) == ("beside GGUF", "org/tiny-GGUF:tiny.gguf")
    assert found[ours.name]["origin_is_here"] is True
    assert found["gone--none--float32--00000005"]["holds"] == "plain"
    row = next(line for line in cli()[1].splitlines() if line.startswith("tiny--"))
    assert "beside GGUF" in row and row.endswith("org/tiny-GGUF:tiny.gguf") and "normalised  " not in row


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("", "holds only what was written beside a checkpoint; name that checkpoint"),
        ("models--org--tiny/snapshots/c0ffee/x.gguf", "written beside org/tiny:x.gguf; name that file"),
    ],
)
def test_what_lies_beside_a_model_that_has_gone_is_none(base: Path, tmp_path: Path, file: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        original_of(beside_gguf(base, str(tmp_path / file) if file else ""))


@pytest.mark.parametrize("name", ["org/tiny-GGUF", "org/tiny-GGUF:tiny.gguf", "snapshot"])
def test_what_from_says_removes_it(cli: Callable[..., Any], base: Path, tmp_path: Path, name: str) -> None:
    file = snapshot_of(tmp_path, "org/tiny-GGUF", "tiny.gguf")
    beside_gguf(base, str(file))
    finished(base, ONE, origin="org/tiny")
    assert cli("remove", file if name == "snapshot" else name, "-y")[0] == 0
    assert names(base) == {ONE} and file.is_file()


def test_the_path_or_the_id_that_stores_were_made_from(
    cli: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    finished(base, ONE, origin=str(source))
    finished(base, TWO, origin="org/name")
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("remove", "org/nam", "-y")
    assert code == 1 and "did you mean org/name?" in err
    assert cli("remove", "org/name", "-y")[0] == 0 and names(base) == {ONE}
    assert cli("remove", "./source", "-y")[0] == 0 and names(base) == set() and source.is_dir()


def test_copies_of_adapters_are_listed_and_removed(cli: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    import torch

    from airllm_nb.checkpoint.lora.files import find_adapter, read_tensors
    from airllm_nb.config import LoadOptions

    adapter, options = tmp_path / "my-lora", LoadOptions()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    torch.save({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 4)}, adapter / "adapter_model.bin")
    read_tensors(find_adapter(adapter, options), options, silent, weights=True)
    [copy] = (base / "adapters").iterdir()
    others = {"mine--0123456789abcdef.safetensors": b"not of ours", "notes.txt": b"mine"}
    for name, data in others.items():
        (copy.parent / name).write_bytes(data)
    (copy.parent / "link--0123456789abcdef.safetensors").symlink_to(copy)
    found = listed(cli)
    assert set(found) == {f"adapters/{copy.name}"}
    facts = found[f"adapters/{copy.name}"]
    assert (facts["model"], facts["holds"], facts["state"]) == ("my-lora", "adapter", "finished")
    assert facts["bytes"] == copy.stat().st_size
    with Hold(copy.parent):
        code, _, err = cli("remove", "my-lora", "-y")
        assert code == 1 and "in use" in err and copy.is_file()
    for name in others:
        assert cli("remove", f"adapters/{name}", "-y")[0] == 1
    assert cli("remove", "my-lora", "-y")[0] == 0
    assert names(copy.parent) == {*others, "link--0123456789abcdef.safetensors"}
    assert (adapter / "adapter_model.bin").is_file()
