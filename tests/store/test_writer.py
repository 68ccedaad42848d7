"""The store: killed, starved, raced and damaged on purpose; opened by the reference safetensors library."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from airllm_nb import AutoModel
from airllm_nb.checkpoint.originals import delete_original
from airllm_nb.encoding.formats import get_encoding
from airllm_nb.errors import CheckpointError, StoreError
from airllm_nb.intake.find.local import fingerprint_of
from airllm_nb.store import jobs as rows
from airllm_nb.store import shard as shards
from airllm_nb.store import writer as stores
from airllm_nb.store.jobs import encode_jobs
from airllm_nb.store.manifest import StoreMeta, open_store
from airllm_nb.store.names import shard_name
from airllm_nb.store.shard import ALIGNMENT, PAD, PAGE, ShardJob, plain
from airllm_nb.store.writer import write_store
from airllm_nb.tensors.index import Extent, TensorInfo, read_header, read_index

WORKER = Path(__file__).parents[1].joinpath("store_worker.py")
META = StoreMeta("none", "float32", "test")


def make_checkpoint(folder: Path, layers: int = 4, size: int = 512) -> Path:
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    tensors = {"model.embed_tokens.weight": torch.randn(100, size).bfloat16(), "model.norm.weight": torch.ones(size)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.mlp.up_proj.weight"] = torch.randn(2 * size, size).bfloat16()
        tensors[f"{prefix}.mlp.down_proj.weight"] = torch.randn(size, 2 * size).bfloat16()
        tensors[f"{prefix}.attn.q_proj.weight"] = torch.randn(33, 100).bfloat16()
        tensors[f"{prefix}.norm.weight"] = torch.randn(size)
    save_file(tensors, folder / "model.safetensors")
    return folder


def convert(source: Path, target: Path, codec: str = "8bit", **options):
    index = read_index(source)
    compressed = [name for name in index if "_proj" in name]
    jobs = encode_jobs(index, get_encoding(codec), compressed, torch.bfloat16)
    return write_store(target, jobs, StoreMeta(codec, "bfloat16", fingerprint_of(source, index.files)), **options)


def worker(*arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[1])}
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir() if not path.name.startswith(".")}  # fmt: skip


def jobs_of(**tensors: torch.Tensor) -> list[ShardJob]:
    names = {torch.float32: "F32", torch.uint8: "U8"}
    return [
        ShardJob(f"shard-{n}", (plain(name, names[t.dtype], t.shape, lambda t=t: [t]),))
        for n, (name, t) in enumerate(tensors.items())
    ]


# --- the files


@pytest.mark.parametrize("codec", ["none", "4bit", "8bit"])
def test_shards_open_with_the_reference_library(tmp_path, codec):
    source = make_checkpoint(tmp_path / "source")
    store = convert(source, tmp_path / "store", codec)
    assert [path.stem for path in store.files] == [*(f"layer-0000{n}" for n in range(4)), "rest"]
    found = {}
    for path in store.files:
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if not name.startswith(PAD)}  # noqa: SIM118
        offsets = [info.extents[0].offset for name, info in read_header(path).items() if not name.startswith(PAD)]
        assert min(offsets) % PAGE == 0 and all(offset % ALIGNMENT == 0 for offset in offsets)
    assert set(found) == set(store.index)
    encoder, original = get_encoding(codec), read_index(source)
    parameters = json.loads((store.folder / "manifest.json").read_text())["parameters"]
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in original:
            tensor = file.get_tensor(name)
            used = encoder if "_proj" in name else get_encoding(None)
            encoded = used.encode(tensor)
            for part in (part["attribute"] for part in parameters[name]["parts"]):
                stored = found[name if part == "weight" else name.replace("weight", part)]
                assert torch.equal(stored, encoded[part]) and stored.dtype == encoded[part].dtype
    store.verify()
    assert open_store(tmp_path / "store").meta == store.meta


def test_chunks_and_several_extents_give_the_same_bytes(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "source")
    whole = convert(source, tmp_path / "whole", "4bit")
    monkeypatch.setattr(rows, "HOST_VALUES", 1 << 16)
    assert sums(convert(source, tmp_path / "chunks", "4bit").folder) == sums(whole.folder)
    index = read_index(source)
    name = "model.layers.0.mlp.up_proj.weight"
    path, start, size = index[name].extents[0].path, index[name].extents[0].offset, index[name].nbytes
    split = tuple(Extent(path, start + at, size // 4) for at in range(0, size, size // 4))
    pieces = {**index, name: TensorInfo(name, "BF16", index[name].shape, split)}
    jobs = encode_jobs(pieces, get_encoding("4bit"), [n for n in index if "_proj" in n], torch.bfloat16)
    assert sums(write_store(tmp_path / "split", jobs, whole.meta).folder) == sums(whole.folder)


def test_matrices_are_cast_and_vectors_and_kept_ones_are_not(tmp_path):
    save_file({"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4), "k.weight": torch.randn(4, 4),
               "n.count": torch.arange(4).view(2, 2)}, tmp_path / "model.safetensors")  # fmt: skip
    jobs = encode_jobs(read_index(tmp_path), get_encoding(None), [], torch.float16, keep=["k.weight"])
    index = write_store(tmp_path / "store", jobs, META).index
    assert {name: info.dtype for name, info in index.items()} == {
        "a.weight": "F16", "a.bias": "F32", "k.weight": "F32", "n.count": "I64"}  # fmt: skip


def test_shard_names():
    assert shard_name("model.layers.12.mlp.up_proj.weight") == "layer-00012"
    assert shard_name("transformer.h.3.attn.weight") == "layer-00003"
    assert shard_name("lm_head.weight") == "rest"


def test_a_source_that_ends_early_is_named(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    index = read_index(source)
    jobs = encode_jobs(index, get_encoding("8bit"), [], torch.bfloat16)
    os.truncate(source / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte .*[Dd]ownload it again"):
        write_store(tmp_path / "store", jobs, META)
    assert open_store(tmp_path / "store") is None
    short = plain("a", "F32", (4,), lambda: [b"1234"])
    with pytest.raises(StoreError, match="should take 16 bytes"):
        write_store(tmp_path / "short", [ShardJob("s", (short,))], META)
    with pytest.raises(StoreError, match="more bytes"):
        write_store(tmp_path / "long", [ShardJob("s", (plain("a", "U8", (2,), lambda: [b"12", b"3"]),))], META)


# --- interruptions


def test_killed_at_any_moment_it_completes_with_the_same_bytes(tmp_path):
    source = make_checkpoint(tmp_path / "source", layers=6)
    expected = sums(convert(source, tmp_path / "whole", "8bit").folder)
    target, kills = tmp_path / "store", 0
    for moment in range(1, 60):
        process = worker(source, target, "8bit", 0.02)
        # Progressive moments: the n-th start is killed at its n-th step or a little later.
        for seen, _ in enumerate(process.stdout):
            if seen > 1 + moment % 5:
                time.sleep(0.003 * (moment % 7))
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        process.stderr.close()
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
        if kills >= 9:
            break
    assert kills >= 8
    assert sums(convert(source, target, "8bit").folder) == expected


def test_finished_shards_are_kept(tmp_path, monkeypatch):
    source, steps = make_checkpoint(tmp_path / "source", layers=12), []
    stop = lambda: len(list((tmp_path / "store").glob("*.safetensors"))) > 1  # noqa: E731
    with pytest.raises(StoreError, match="start it again"):
        convert(source, tmp_path / "store", should_stop=stop)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*.safetensors")}
    # What was being synced then is finished, too.
    assert 2 <= len(before) <= 2 + 2 * shards.AT_ONCE and open_store(tmp_path / "store") is None
    written = []
    original = shards.write_shard
    monkeypatch.setattr(shards, "write_shard", lambda path, *rest: written.append(path.name) or original(path, *rest))
    store = convert(source, tmp_path / "store", progress=steps.append)
    assert len(written) == 13 - len(before) and not set(written) & set(before)
    after = {path.name: path.stat().st_mtime_ns for path in store.files}
    assert all(after[name] == before[name] for name in before)
    assert steps[-1].done == steps[-1].total == store.nbytes and steps[0].done > 0
    assert convert(source, tmp_path / "store").meta == store.meta and len(written) == 13 - len(before)


def test_ctrl_c_leaves_no_temporary_file_and_can_go_on(tmp_path):
    source = make_checkpoint(tmp_path / "source")

    def interrupt(progress):
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "store", progress=interrupt)
    assert not list((tmp_path / "store").glob("*.tmp"))
    assert sums(convert(source, tmp_path / "store").folder) == sums(convert(source, tmp_path / "whole").folder)


def test_a_torn_journal_line_and_another_configuration(tmp_path):
    source, target = make_checkpoint(tmp_path / "source"), tmp_path / "store"
    stop = lambda: len(list(target.glob("*.safetensors"))) > 1  # noqa: E731
    with pytest.raises(StoreError):
        convert(source, target, "8bit", should_stop=stop)
    with (target / "journal.jsonl").open("ab") as file:
        file.write(b'{"file": "layer-0000')
    with pytest.raises(StoreError):
        convert(source, target, "4bit", should_stop=stop)
    assert sums(convert(source, target, "4bit").folder) == sums(convert(source, tmp_path / "whole", "4bit").folder)
    with pytest.raises(StoreError, match="other options"):
        convert(source, target, "8bit")


def test_a_full_disk(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10 << 20})())
        with pytest.raises(StoreError, match=r"needs .*MiB more.*10\.0 MiB free.*layer_shards_saving_path"):
            write_store(tmp_path / "none", jobs_of(a=torch.zeros(3 << 20)), META)
        assert not (tmp_path / "none").exists()
    original = shards._Sink.put

    def put(self, data):
        if any((tmp_path / "store").glob("*.safetensors")):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards._Sink, "put", put)
        with pytest.raises(StoreError, match=r"full.*kept"):
            convert(source, tmp_path / "store")
    assert not list((tmp_path / "store").glob("*.tmp")) and list((tmp_path / "store").glob("*.safetensors"))
    assert sums(convert(source, tmp_path / "store").folder) == sums(convert(source, tmp_path / "whole").folder)


def test_two_processes_write_one_store(tmp_path):
    source, target = make_checkpoint(tmp_path / "source"), tmp_path / "store"
    processes = [worker(source, target, "8bit", 0.02) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted("wait" in out for out, _ in outputs) == [False, True]
    assert sums(target) == sums(convert(source, tmp_path / "whole").folder)


def test_the_lock_is_waited_for_and_stop_is_heard(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "store").mkdir()
    seen, stop, jobs = [], threading.Event(), jobs_of(a=torch.zeros(4))
    with (tmp_path / "store" / ".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.5, stop.set).start()
        with pytest.raises(StoreError, match="waiting"):
            write_store(tmp_path / "store", jobs, META, progress=seen.append, should_stop=stop.is_set)
    assert seen and seen[0].stage == "wait"
    write_store(tmp_path / "store", jobs, META)


def test_a_signal_ends_it_soon(tmp_path):
    source, target = make_checkpoint(tmp_path / "source", layers=12), tmp_path / "store"
    process = worker(source, target, "8bit", 0.02)
    for _ in range(40):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in error.splitlines()[-1]
    assert not list(target.glob("*.tmp")) and list(target.glob("*.safetensors"))
    recorded = [json.loads(line).get("file") for line in (target / "journal.jsonl").read_text().splitlines()[1:]]
    assert sorted(recorded) == sorted(path.name for path in target.glob("*.safetensors"))


# --- several shards at once


def job(name: str, produce, concurrent: bool = True) -> ShardJob:
    """A shard of four bytes."""
    return ShardJob(name, (plain(name, "U8", (4,), produce),), concurrent=concurrent)


def test_shards_are_written_at_once_and_recorded_in_order(tmp_path, monkeypatch):
    met, last_is_there, recorded = threading.Barrier(2), threading.Event(), []

    def first():
        met.wait(120)
        assert last_is_there.wait(120)
        yield b"1234"

    def second():
        met.wait(120)
        yield b"5678"

    original = shards.write_shard

    def write_shard(path, *rest):
        result = original(path, *rest)
        if path.stem == "b":
            last_is_there.set()
        return result

    monkeypatch.setattr(shards, "write_shard", write_shard)
    add = stores.Journal.add
    monkeypatch.setattr(
        stores.Journal, "add", lambda self, record: recorded.append(record["file"]) or add(self, record)
    )
    store = write_store(tmp_path / "store", [job("a", first), job("b", second)], META)
    assert recorded == ["a.safetensors", "b.safetensors"]
    store.verify()


def test_sources_of_one_thread_are_asked_one_after_the_other(tmp_path):
    inside = threading.Lock()

    def alone():
        assert inside.acquire(blocking=False)
        time.sleep(0.02)
        yield b"1234"
        inside.release()

    jobs = [job("abcd"[n], alone, concurrent=n != 2) for n in range(4)]
    write_store(tmp_path / "store", jobs, META).verify()


def test_an_error_ends_the_others_and_keeps_what_is_finished(tmp_path):
    target, threads = tmp_path / "store", set(threading.enumerate())

    def endless():
        while True:
            time.sleep(0.01)
            yield b"1"

    def damaged():
        while not (target / "b.safetensors").exists():
            time.sleep(0.01)
        raise CheckpointError("a file is damaged")
        yield

    long = ShardJob("a", (plain("a", "U8", (1 << 30,), endless),), concurrent=True)
    with pytest.raises(CheckpointError, match="damaged"):
        write_store(target, [long, job("b", lambda: [b"1234"]), job("c", damaged), job("d", endless)], META)
    assert set(threading.enumerate()) <= threads
    assert [path.name for path in target.glob("*.safetensors*")] == ["b.safetensors"]
    assert '"b.safetensors"' in (target / "journal.jsonl").read_text()


@pytest.mark.parametrize("codec", ["none", "4bit"])
def test_no_thread_is_left_and_torch_keeps_its_number(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(rows, "HOST_VALUES", 1 << 16)
    source, threads, before = make_checkpoint(tmp_path / "source"), set(threading.enumerate()), torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def interrupt(progress):
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    try:
        for progress in (interrupt, lambda _: None):
            with contextlib.suppress(KeyboardInterrupt):
                convert(source, tmp_path / "store", codec, progress=progress)
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert set(threading.enumerate()) <= threads
            assert torch.get_num_threads() == 2 and seen.pop() == 2
    finally:
        torch.set_num_threads(before)


# --- rows


@pytest.mark.parametrize("offset", [0, 8, 13, 4096])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_come_in_order_wherever_they_lie(tmp_path, monkeypatch, offset, device):
    """The way to read for a GPU needs none: the work here is done on the host."""
    monkeypatch.setattr(rows, "HOST_VALUES", 30_000)
    monkeypatch.setattr(rows, "DEVICE_VALUES", 30_000)
    expected, extents, at = torch.randn(401, 100).bfloat16(), [], offset
    path = tmp_path / "data"
    with path.open("wb") as file:
        for part in expected.split(150):
            # Holes between the extents, so that their places in a page differ.
            file.seek(at)
            file.write(part.view(torch.uint8).numpy().tobytes())
            extents.append(Extent(path, at, part.nbytes))
            at += part.nbytes + 1000
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    info = TensorInfo("a", "BF16", (401, 100), tuple(extents))
    workers = rows.RowWorkers(torch.device(device))
    for _ in range(2):
        chunks = list(workers.map(info, 7, lambda chunk: chunk.clone()))
        assert torch.equal(torch.cat(chunks), expected)
        assert len(chunks) == 2 and all(chunk.shape[0] % 7 == 0 for chunk in chunks[:-1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_that_are_not_there(tmp_path, device):
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    workers = rows.RowWorkers(torch.device(device))
    for file, nbytes, message in ((path, 800, "fewer than its shape"), (path, 2000, r"data ends at byte 1,000"),
                                  (tmp_path / "gone", 2000, "gone cannot be opened")):  # fmt: skip
        info = TensorInfo("a", "F32", (50, 10), (Extent(file, 0, nbytes),))
        with pytest.raises(CheckpointError, match=message):
            list(workers.map(info, 1, lambda chunk: chunk.clone()))
    assert not list(workers.map(TensorInfo("a", "F32", (0, 10), ()), 1, lambda chunk: chunk.clone()))


def test_a_source_that_gives_too_much_leaves_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "HOST_VALUES", 1)
    path, threads = tmp_path / "data", set(threading.enumerate())
    path.write_bytes(bytes(4000))
    workers, info = rows.RowWorkers(torch.device("cpu")), TensorInfo("a", "U8", (40, 100), (Extent(path, 0, 4000),))
    with pytest.raises(StoreError, match="should take 4 bytes") as error:
        write_store(tmp_path / "store", [job("a", lambda: workers.map(info, 1, torch.clone))], META)
    # Its traceback holds the frames of the threads that it passed through.
    assert error.tb is not None and set(threading.enumerate()) <= threads


# --- damage


def test_damage_is_found_and_repaired(tmp_path):
    source, target = make_checkpoint(tmp_path / "source"), tmp_path / "store"
    assert open_store(target) is None
    expected = sums(convert(source, target).folder)
    victim = target / "layer-00002.safetensors"
    with victim.open("r+b") as file:
        file.seek(PAGE + 100)
        file.write(b"\xff\x00\xff")
    store = open_store(target)
    with pytest.raises(StoreError, match="layer-00002"):
        store.verify()
    victim.unlink()
    with pytest.raises(StoreError, match="missing"):
        open_store(target)
    assert sums(convert(source, target).folder) == expected
    os.truncate(victim, 1000)
    with pytest.raises(StoreError, match="1,000 bytes"):
        open_store(target)
    assert sums(convert(source, target).folder) == expected
    (target / "manifest.json").write_text('{"format": 1, "sha')
    with pytest.raises(StoreError, match="damaged"):
        open_store(target)
    assert sums(convert(source, target).folder) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x", "version": 1}', "", '{"shards": 3}'])
def test_another_programs_manifest_is_left_aside(tmp_path, tiny_llama, text):
    folder = shutil.copytree(tiny_llama(), tmp_path / "model")
    (folder / "manifest.json").write_text(text)
    assert open_store(folder) is None
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert model(torch.tensor([[5, 9]])).logits.shape == (1, 2, 260)


def test_a_newer_format_is_left_alone(tmp_path):
    source, target = make_checkpoint(tmp_path / "source"), tmp_path / "store"
    convert(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    for action in (lambda: open_store(target), lambda: convert(source, target)):
        with pytest.raises(StoreError, match="newer version"):
            action()
    (target / "manifest.json").write_text(json.dumps({**manifest, "shards": [{"file": "../x", "bytes": 1}]}))
    with pytest.raises(StoreError, match="damaged"):
        open_store(target)


def test_fingerprint_sees_content(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(1 << 20))
    first = fingerprint_of(tmp_path, [path])
    assert fingerprint_of(tmp_path, [path]) == first
    path.write_bytes(bytes((1 << 20) - 1) + b"x")
    assert fingerprint_of(tmp_path, [path]) != first


# --- deleting the original


def hub_cache(root: Path) -> tuple[Path, Path, Path]:
    repository = root / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blob, outside = repository / "blobs" / "0123", root / "precious.bin"
    blob.write_bytes(b"blob")
    outside.write_bytes(b"precious")
    inside_link, outside_link = snapshot / "model.safetensors", snapshot / "other.safetensors"
    inside_link.symlink_to("../../blobs/0123")
    outside_link.symlink_to(outside)
    return inside_link, outside_link, blob


def test_delete_original_follows_links_only_inside_the_repository(tmp_path):
    store = write_store(tmp_path / "store", jobs_of(a=torch.zeros(4)), META)
    inside, outside, blob = hub_cache(tmp_path / "hub")
    plain_file, other = tmp_path / "model.bin", tmp_path / "config.json"
    plain_file.write_bytes(b"1")
    other.write_bytes(b"2")
    assert delete_original(store, [inside], tmp_path / "elsewhere") == []
    deleted = delete_original(store, [inside, outside, plain_file, store.files[0]], tmp_path / "hub")
    assert deleted == [inside, blob, plain_file]
    assert not inside.is_symlink() and not blob.exists() and not plain_file.exists()
    assert outside.is_symlink() and outside.read_bytes() == b"precious" and other.exists()
    store.verify()


def test_delete_original_leaves_what_another_revision_has_too(tmp_path):
    store = write_store(tmp_path / "store", jobs_of(a=torch.zeros(4)), META)
    inside, _, blob = hub_cache(tmp_path / "hub")
    newer = inside.parents[1] / "newer" / inside.name
    newer.parent.mkdir()
    newer.symlink_to(blob)
    assert delete_original(store, [inside], tmp_path / "hub") == [inside]
    assert newer.read_bytes() and not inside.is_symlink()
    assert delete_original(store, [newer], tmp_path / "hub") == [newer, blob]


def test_delete_original_deletes_nothing_when_the_store_is_damaged(tmp_path):
    store = write_store(tmp_path / "store", jobs_of(a=torch.zeros(4)), META)
    data = bytearray(store.files[0].read_bytes())
    data[PAGE] ^= 1
    store.files[0].write_bytes(data)
    precious = tmp_path / "model.safetensors"
    precious.write_bytes(b"1")
    with pytest.raises(StoreError, match="sha256"):
        delete_original(store, [precious])
    assert precious.exists()


# --- memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("codec", ["4bit", "8bit"])
def test_conversion_takes_little_memory(tmp_path, codec):
    source = tmp_path / "source"
    source.mkdir()
    noise = (torch.randn(4096, 4096) * 0.02).bfloat16()
    for part in range(4):
        tensors = {f"model.layers.{part}.mlp.{name}_proj.weight": noise.roll(part, 0) for name in ("up", "down")}
        save_file(tensors, source / f"model-{part}.safetensors")
    process = worker(source, tmp_path / "store", codec)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert int(out.splitlines()[-1].split()[1]) < 120 << 20
