"""One store, several processes: they convert, wait, read, remove and are killed at the same time."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airllm_nb import LoadOptions, convert_model
from airllm_nb.errors import StoreError
from airllm_nb.progress import Progress, silent
from airllm_nb.store import locks as folders
from airllm_nb.store.atomic import write_atomically
from airllm_nb.store.listing import cached_stores, remove_store
from airllm_nb.store.locks import Hold, exclusively, in_use, locked, vacated
from airllm_nb.store.manifest import StoreMeta, open_store
from airllm_nb.store.names import LOCK, MANIFEST
from airllm_nb.store.shard import ShardJob, plain
from airllm_nb.store.writer import write_store

pytest.importorskip("fcntl")
ROOT = Path(__file__).parents[2]
META = StoreMeta("none", "float32", "test")
# Loads a model as a kernel does, says every step, and answers.
KERNEL = """
import json, sys, torch
from airllm_nb import LoadOptions, open_model
def say(step):
    print(json.dumps([step.stage, step.done, step.total, step.detail]), flush=True)
options = LoadOptions.create(compression="4bit", layer_shards_saving_path=sys.argv[2], device="cpu")
with open_model(sys.argv[1], options, progress=say) as model:
    ids = model.tokenizer("hello", return_tensors="pt")["input_ids"]
    print(json.dumps(["tokens", model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1]:].tolist()]))
"""
HOLDER = """
import sys, time
from pathlib import Path
from airllm_nb.store.locks import Hold, locked
how = {"reads": lambda: Hold(Path(sys.argv[2])), "writes": lambda: locked(Path(sys.argv[2]), print)}[sys.argv[1]]
with how():
    print("held", flush=True)
    sys.stdin.readline()
"""


def python(*arguments: object) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


@contextmanager
def held(how: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that ``reads`` from or ``writes`` into a folder until a line comes, or it is killed."""
    with python("-c", HOLDER, how, folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n", process.communicate()
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def steps(process: subprocess.Popen[str]) -> list[Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def made(folder: Path, **how: Any) -> Path:
    jobs = [ShardJob(name, (plain(name, "U8", (4,), lambda: [b"1234"]),)) for name in "ab"]
    return write_store(folder, jobs, META, **how).folder


def until(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def store_name(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    shards = tmp_path_factory.mktemp("named")
    return convert_model(tiny_llama(eos_token_id=None), LoadOptions.create(
        compression="4bit", layer_shards_saving_path=shards, device="cpu")).name  # fmt: skip


# ---- converting ------------------------------------------------------------------------------------------------------


def test_a_kernel_and_a_shell_convert_at_once_and_one_reads(
    tiny_llama: Callable[..., Path], tmp_path: Path, store_name: str
) -> None:
    source, folder = tiny_llama(eos_token_id=None), tmp_path / store_name
    shell = ("-m", "airllm_nb", "generate", source, "hello", "-n", 5, "--json", "--compression", "4bit",
             "--device", "cpu", "--shards", tmp_path)  # fmt: skip
    with locked(folder, silent):
        kernel, cli = python("-c", KERNEL, source, tmp_path), python(*shell)
        assert kernel.stdout is not None
        while (step := json.loads(kernel.stdout.readline() or '["ended"]'))[0] not in ("wait", "ended"):
            pass
        until(lambda: _waiting(folder) == 2 or cli.poll() is not None, 120)
    # Both are let go at once: one of them writes.
    told = steps(kernel)
    out, err = cli.communicate(timeout=120)
    assert cli.returncode == 0, err
    assert step[0] == "wait" and step[-1] == f"another process converts into {folder}"
    assert told[-1] == ["tokens", json.loads(out)["token_ids"]]
    assert open_store(folder) is not None and not list(folder.glob("*.tmp"))
    assert {path.name for path in tmp_path.iterdir()} == {store_name}
    assert {"config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def _waiting(folder: Path) -> int:
    """Other processes that have the lock's file open."""
    lock, count = (folder / LOCK).stat(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fds = list((process / "fd").iterdir()) if process.name != str(os.getpid()) else []
            count += any(os.path.samestat(lock, fd.stat()) for fd in fds)
        except OSError:
            continue
    return count


def test_who_waits_is_told_how_far_the_other_is(tmp_path: Path) -> None:
    store, seen = tmp_path / "store", []
    size = 100_000

    def slow() -> Iterator[bytes]:
        for _ in range(10):
            time.sleep(0.15)
            yield bytes(size // 10)

    def job(produce: Callable[[], Iterator[bytes]]) -> list[ShardJob]:
        return [ShardJob("a", (plain("a", "U8", (size,), produce),))]

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(write_store, store, job(slow), META)
        until(lambda: (store / LOCK).exists() and in_use(store))
        again = write_store(store, job(slow), META, progress=seen.append)
        assert first.result().shards == again.shards
    waits = [step for step in seen if step.stage == "wait"]
    assert waits == seen and len(waits) > 2
    assert waits[0].done < waits[-1].done and {step.total for step in waits} == {again.nbytes}


def test_a_killed_writer_lets_the_next_one_in(tmp_path: Path) -> None:
    folder, seen = tmp_path / "store", []
    with held("writes", folder) as writer, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(made, folder, progress=seen.append)
        until(lambda: seen)
        assert seen[0].stage == "wait" and not waiting.done()
        writer.kill()
        assert open_store(waiting.result(120)) is not None


def test_ctrl_c_ends_the_waiting_and_leaves_the_lock_to_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with held("writes", folder):
        with python("-c", HOLDER, "writes", folder) as waiting:
            assert waiting.stdout is not None and "stage='wait'" in waiting.stdout.readline()
            waiting.send_signal(signal.SIGINT)
            _, err = waiting.communicate(timeout=120)
            assert err.splitlines()[-1] == "KeyboardInterrupt"
        assert in_use(folder) == "converting"
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_thread_that_has_the_lock_does_not_wait_for_itself(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with locked(tmp_path / "store", silent), locked(link / "store", silent):
        made(link / "store")
        seen: list[Progress] = []
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: locked(tmp_path / "store", seen.append, lambda: bool(seen)).__enter__())
            with pytest.raises(StoreError, match="stopped while waiting"):
                other.result(120)
    assert in_use(tmp_path / "store") == ""


def test_a_lock_under_which_nothing_was_written_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "a" / "store", silent):
        raise KeyError
    assert not (tmp_path / "a" / "store").exists()
    with locked(tmp_path / "kept", silent):
        (tmp_path / "kept" / "shard").touch()
    assert (tmp_path / "kept").is_dir()


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match="layer_shards_saving_path"), locked(folder, silent):
            pass


def test_many_that_lock_and_leave_nothing_never_meet(tmp_path: Path) -> None:
    """Each removes the folder and its lock at the end, while the others wait for it."""
    inside, most, guard = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        with locked(tmp_path / "store", silent):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.002)
            with guard:
                inside -= 1

    polls, folders.POLL_SECONDS = folders.POLL_SECONDS, 0.001
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(60)))
    finally:
        folders.POLL_SECONDS = polls
    assert most == 1 and not (tmp_path / "store").exists()


def test_who_waited_while_the_folder_was_removed_makes_it_again(tmp_path: Path) -> None:
    folder, seen = made(tmp_path / "store"), []
    with ThreadPoolExecutor(1) as pool:
        with vacated(folder):
            waiting = pool.submit(made, folder, progress=seen.append)
            assert open_store(waiting.result(120)) is not None  # finished: needs no lock
            (folder / MANIFEST).unlink()
            waiting = pool.submit(made, folder, progress=seen.append)
            until(lambda: seen)
            shutil.rmtree(folder.rename(tmp_path / "gone"))
        assert open_store(waiting.result(120)) is not None
    assert in_use(folder) == "" and (folder / LOCK).is_file()


# ---- small files -----------------------------------------------------------------------------------------------------


def test_a_small_file_may_be_written_by_many_at_once(tmp_path: Path) -> None:
    texts = [bytes([48 + number]) * 5000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda text: write_atomically(tmp_path / "config.json", text), texts))
            assert (tmp_path / "config.json").read_bytes() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_belongs_beside_the_weights_is_there_before_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "store"

    def broken(into: Path) -> None:
        assert (into / "b.safetensors").is_file() and not (into / MANIFEST).exists()
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"full.*kept"):
        made(folder, beside=broken)
    assert open_store(folder) is None
    kept = (folder / "a.safetensors").stat().st_mtime_ns
    made(folder, beside=lambda into: write_atomically(into / "config.json", b"{}"), origin="org/name")
    assert (folder / "config.json").is_file() and (folder / "a.safetensors").stat().st_mtime_ns == kept
    assert [store.origin for store in cached_stores(tmp_path)] == ["org/name"]


# ---- reading and removing --------------------------------------------------------------------------------------------


def test_what_is_read_is_not_removed_until_its_reader_is_gone(tmp_path: Path) -> None:
    folder = made(tmp_path / "store")
    with held("reads", folder) as reader:
        assert in_use(folder) == "open"
        with Hold(folder):  # readers do not wait for each other
            [store] = cached_stores(tmp_path)
            assert store.is_open and store.state == "finished"
            with pytest.raises(StoreError, match="in use; unload the model"):
                remove_store(store.folder)
        with exclusively(folder) as is_free:
            assert not is_free
        assert open_store(folder) is not None
        reader.kill()
        reader.wait()
        assert in_use(folder) == ""
        assert remove_store(store.folder) == store.nbytes
    assert not list(tmp_path.iterdir())


def test_what_is_converted_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "m--4bit--bfloat16--00000000"
    with held("writes", folder):
        [store] = cached_stores(tmp_path)
        assert store.state == "converting" and not store.is_open
        with pytest.raises(StoreError, match="being converted by another process"):
            remove_store(store.folder)
    assert remove_store(folder) == 0 and not list(tmp_path.iterdir())


def test_a_hold_ends_when_it_is_closed_or_forgotten(tmp_path: Path) -> None:
    both = [made(tmp_path / name) for name in ("x", "y")]
    first, second = Hold(*both), Hold(both[0])
    first.close()
    first.close()
    assert [in_use(folder) for folder in both] == ["open", ""]
    del second
    gc.collect()
    assert in_use(both[0]) == ""


def test_a_removed_folder_cannot_be_held_and_nothing_stays_held(tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    with pytest.raises(StoreError, match="was removed by another process"):
        Hold(folder, tmp_path / "y")
    assert in_use(folder) == ""


def test_a_folder_that_cannot_be_written_can_be_held(tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    (folder / LOCK).unlink()
    folder.chmod(0o555)
    try:
        with Hold(folder):
            assert in_use(folder) == "open" and not (folder / LOCK).exists()
    finally:
        folder.chmod(0o755)


def test_a_folder_that_goes_while_it_is_opened_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = made(tmp_path / "x"), os.open

    def removed_before(path: Path, *args: Any, **kwargs: Any) -> int:
        monkeypatch.undo()
        remove_store(folder)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", removed_before)
    with pytest.raises(StoreError, match="was removed by another process"), Hold(folder):
        pass
    assert not folder.exists()


def test_readers_and_removers_race_and_a_reader_always_has_the_whole(tmp_path: Path) -> None:
    """A reader that got its hold finds every file until it lets go; one that did not is told."""
    folder, stop, read, told = tmp_path / "store", threading.Event(), [], []

    def reader() -> None:
        while not stop.is_set():
            try:
                with Hold(folder):
                    before = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".tmp"))
                    if MANIFEST in before:
                        store = open_store(folder)
                        assert store is not None
                        store.verify()
                        read.append(1)
            except StoreError as error:
                assert "remove" in str(error), error
                told.append(1)

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(reader) for _ in range(2)]
        for _ in range(25):
            made(folder)
            time.sleep(0.005)
            for store in cached_stores(tmp_path):
                with_reader = 0
                while store.folder.exists() and with_reader < 2000:
                    try:
                        remove_store(store.folder)
                    except StoreError:
                        with_reader += 1
        stop.set()
        for one in readers:
            one.result(120)
    assert read and told


def test_a_folder_below_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "not" / "mounted")
    words = "cannot be made: what should be above it is not there"
    with pytest.raises(StoreError, match=words), locked(tmp_path / "link" / "store", silent):
        pass
