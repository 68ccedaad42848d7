"""Straight from download to 4bit: one weight file at a time on the disk, whatever interrupts it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from conftest import _save_shards
from safetensors.torch import load_file

from airllm_nb import AutoModel
from airllm_nb.checkpoint.hub import remote
from airllm_nb.encoding.formats import get_encoding
from airllm_nb.store.jobs import encode_jobs
from airllm_nb.store.manifest import open_store
from airllm_nb.store.portions import WeightFile, bytes_needed, plan_portions
from airllm_nb.tensors.index import read_index

BLOCK = 32 << 10
SHARDS = 6
# Config, tokenizer, journal and what the Hub's library notes beside a download; the weights are megabytes.
SMALL = 160 << 10
# The heads of what a .bin file holds.
PER_FILE = 4 << 10
# What of one parameter, merged of tensors in several files, is in the earlier ones: the experts of a layer at most.
CARRIED = {"llama": 0, "bins": 0, "mixtral": 8 * 3 * 128 * 256 * 2}


class _Counting(hub_server._Handler):
    """Sends in blocks, and counts the bytes of weight files that went out; slower where the hub has a ``pause``."""

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        if name in self.hub.refused and self.command == "GET" and not self.headers.get("Range"):
            return self._fail(404, "")
        return super()._file(repo_id, revision, name)

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        if self.command != "GET" or not self.path.endswith((".safetensors", ".bin")):
            return super()._send(status, data, headers, cut)
        super()._send(status, data, headers, 0)
        self.close_connection = cut is not None
        for start in range(0, len(data[:cut]), BLOCK):
            block = data[:cut][start : start + BLOCK]
            try:
                self.wfile.write(block)
            except OSError:  # whoever asked was killed
                self.close_connection = True
                return None
            self.hub.weight_bytes += len(block)
            time.sleep(self.hub.pause)
        return None


class Loader:
    """Loads from the hub in killable processes, whose cache and stores are in a folder of the test's own."""

    def __init__(self, hub: hub_server.Hub, home: Path, *models: Path):
        self.hub, self.home = hub, home
        self.environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home / "hf"),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1].joinpath("piecewise_child.py")), *map(str, models)],
            env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, model: str, **command: Any) -> dict[str, Any]:
        command = self.command(model, **command)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def command(self, model: str, **command: Any) -> dict[str, Any]:
        stores = self.stores(model)
        options = {"compression": "4bit", "layer_shards_saving_path": str(stores), "delete_original": True,
                   "device": "cpu"} | command.pop("options", {})  # fmt: skip
        watch = [str(stores), str(self.snapshot(model).parents[1])]
        return {"model": model, "options": options, "watch": watch} | command

    def stores(self, model: str) -> Path:
        return self.home / "stores" / model.replace("/", "--")

    def snapshot(self, model: str) -> Path:
        return self.home / "hf" / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / hub_server.COMMIT

    def blobs(self, model: str) -> set[int]:
        """The sizes of the large files that the Hub's cache has."""
        folder = self.snapshot(model).parents[1] / "blobs"
        return {path.stat().st_size for path in folder.iterdir() if path.stat().st_size > SMALL}

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(120)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    patch = pytest.MonkeyPatch()
    patch.setattr(hub_server, "_Handler", _Counting)
    with hub_server.serve() as hub:
        hub.weight_bytes, hub.pause, hub.refused = 0, 0.0, set()  # type: ignore[attr-defined]
        yield hub
    patch.undo()


@pytest.fixture(scope="module")
def loader(
    hub: hub_server.Hub, llama: Path, mixtral: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loader]:
    loader = Loader(hub, tmp_path_factory.mktemp("piecewise"), llama, mixtral)
    yield loader
    loader.close()


@pytest.fixture(scope="module")
def llama(tiny_llama: Callable[..., Path]) -> Path:
    """4 MB in six files, whose borders cut through layers."""
    return tiny_llama(shards=SHARDS, hidden_size=256, intermediate_size=512, num_hidden_layers=3, dtype="bfloat16")


@pytest.fixture(scope="module")
def bins(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in as many files as torch saves them."""
    folder, home = tmp_path_factory.mktemp("bins"), {}
    for at, path in enumerate(sorted(llama.glob("*.safetensors")), 1):
        weights = load_file(path)
        home |= dict.fromkeys(weights, name := f"pytorch_model-{at:05d}-of-{SHARDS:05d}.bin")
        torch.save(weights, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    for path in llama.glob("*"):
        if "safetensors" not in path.name:
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every expert has tensors of its own, so that a merged parameter lies in two files or three."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_local_experts": 8, "vocab_size": 260}  # fmt: skip
    folder, whole = tmp_path_factory.mktemp("mixtral"), tmp_path_factory.mktemp("whole")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MixtralForCausalLM(MixtralConfig(**sizes)).to(torch.bfloat16).save_pretrained(whole)
    (whole / "config.json").rename(folder / "config.json")
    state = load_file(whole / "model.safetensors")
    assert any("experts.3.w1" in name for name in state)
    stand_in = type("Model", (), {"config": MixtralConfig(**sizes), "state_dict": lambda _: state})()
    _save_shards(stand_in, folder, 5)
    return folder


@pytest.fixture
def serve(hub: hub_server.Hub, request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Puts a folder on the hub under a name of the test's own, so that neither cache nor store is another's."""

    def add(folder: Path) -> str:
        name = f"org/{request.node.name.replace('[', '-').replace(']', '')}-{len(hub.repositories)}"
        hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        hub.weight_bytes, hub.pause = 0, 0.0  # type: ignore[attr-defined]
        return name

    return add


@pytest.fixture(scope="module")
def usual(hub: hub_server.Hub, loader: Loader, llama: Path, mixtral: Path) -> dict[str, Path]:
    """The stores that the usual way writes."""
    made = {}
    for kind, folder in {"llama": llama, "mixtral": mixtral}.items():
        hub.repositories[f"org/usual-{kind}"] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        answer = loader(f"org/usual-{kind}", options={"delete_original": False})
        made[kind] = Path(answer["folder"])
        assert loader.blobs(f"org/usual-{kind}"), "a download that is wanted stays"
    return made | {"bins": made["llama"]}


def files(folder: Path) -> dict[str, int]:
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return {path.name: path.stat().st_size for path in sorted(weights)}


def tensors(store: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, info in read_store(store).items():
        data = b"".join(e.path.read_bytes()[e.offset : e.offset + e.nbytes] for e in info.extents)
        found[name] = (info.dtype, info.shape, data)
    return found


def read_store(folder: Path) -> Any:
    store = open_store(folder)
    assert store is not None
    store.verify()
    return store.index


def assert_whole(answer: dict[str, Any], usual_store: Path) -> Path:
    """The store that was written is the usual one, and nothing else is left beside it."""
    assert "error" not in answer and "killed" not in answer, answer
    folder = Path(answer["folder"])
    assert tensors(folder) == tensors(usual_store)
    shards = {Path(name).name for name in open_store(folder).files}  # type: ignore[union-attr]
    left = {path.name for path in folder.iterdir()} - shards
    beside = {path.name for path in usual_store.iterdir() if path.suffix != ".safetensors"}
    assert left == beside
    return folder


def tokens(folder: Path) -> list[int]:
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        return model.generate(torch.tensor([[5, 17, 99]]), max_new_tokens=8, do_sample=False)[0].tolist()


# ---- what is read when -----------------------------------------------------------------------------------------------


def planned(folder: Path, target: Path) -> tuple[Any, list[Any]]:
    index = read_index(folder)
    weights = [WeightFile(path, target / path.name, path.stat().st_size, True) for path in index.files]
    by_layer = functools.partial(encode_jobs, codec=get_encoding(None), compressed=[], dtype=torch.bfloat16)
    return index, plan_portions(index, weights, target, by_layer)


def test_a_layer_that_two_files_hold_becomes_two_shards(llama: Path, tmp_path: Path) -> None:
    index, stages = planned(llama, tmp_path)
    shards = [[job.name for job in stage.jobs] for stage in stages]
    every = [name for names in shards for name in names]
    assert len(stages) == SHARDS and len(every) == len(set(every))
    assert "layer-00000-00001" in shards[0] and "layer-00000-00002" in shards[1] and "rest-00001" in shards[0]
    for stage in stages:
        names = {item.name for job in stage.jobs for item in job.items}
        assert names == {name for name, info in index.items() if info.extents[0].path == stage.file.named}
        assert not stage.carried and not stage.used


def test_the_disk_that_is_needed(llama: Path, tmp_path: Path) -> None:
    _, stages = planned(llama, tmp_path)
    store, sizes = sum(job.nbytes for stage in stages for job in stage.jobs), files(llama)
    need = bytes_needed(stages, tmp_path, lambda job: False)
    assert store < need <= store + max(sizes.values())
    last = stages[-1]
    rest = bytes_needed(stages, tmp_path, lambda job: job not in last.jobs)
    assert rest == sum(job.nbytes for job in last.jobs) + last.file.nbytes
    assert bytes_needed(stages, tmp_path, lambda job: True) == 0
    last.file.path.write_bytes(bytes(last.file.nbytes))  # killed before it was deleted
    assert bytes_needed(stages, tmp_path, lambda job: job not in last.jobs) == sum(job.nbytes for job in last.jobs)


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bins"])
def test_each_file_is_encoded_and_deleted_before_the_next(
    kind: str, usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    name = serve(folder)
    answer = loader(name)
    store, sizes = assert_whole(answer, usual[kind]), files(folder)
    assert loader.blobs(name) == set() and not files(loader.snapshot(name))
    peak, written = answer["peak"], sum(files(store).values())
    assert written < peak <= written + max(sizes.values()) + CARRIED[kind] + SMALL
    assert peak < written + sum(sizes.values()), "the test could not fail"
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))
    most = headers or sum(min(size, 2 * remote.BLOCK) + PER_FILE for size in sizes.values())
    assert sum(sizes.values()) + headers <= hub.weight_bytes <= sum(sizes.values()) + most
    assert tokens(store) == tokens(usual[kind])
    stages = [report[0] for report in answer["reports"] if report[0] in ("download", "convert", "verify")]
    turns = [stage for at, stage in enumerate(stages) if at == 0 or stages[at - 1] != stage]
    assert turns == ["download", "convert", "verify"] * len(sizes)
    for stage in ("download", "convert"):
        done = [(report[1], report[2]) for report in answer["reports"] if report[0] == stage]
        assert done == sorted(done) and done[-1][0] == done[-1][1]
    again = loader(name)
    assert again["folder"] == str(store) and hub.weight_bytes <= sum(sizes.values()) + 2 * most


# ---- interrupted -----------------------------------------------------------------------------------------------------

KILLS = 16


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_killed_at_many_moments_it_goes_on(
    kind: str, usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, request: pytest.FixtureRequest
) -> None:
    """One conversion, killed again and again, each time a little further from where it went on."""
    folder = request.getfixturevalue(kind)
    name, sizes = serve(folder), files(folder)
    largest, kills, most, answer = max(sizes.values()), 0, 0, {}
    every = loader(serve(folder))["steps"]
    assert every > 10 * KILLS
    hub.weight_bytes = 0
    while "folder" not in answer:
        answer = loader(name, kill_at=every // KILLS + 5 * kills)
        assert "error" not in answer, answer
        most, kills = max(most, answer["peak"]), kills + ("killed" in answer)
    store = assert_whole(answer, usual[kind])
    assert kills >= 4
    assert most <= sum(files(store).values()) + largest + CARRIED[kind] + SMALL
    assert sum(sizes.values()) < hub.weight_bytes <= sum(sizes.values()) + kills * (largest + SMALL)


def test_killed_at_any_moment_it_is_completed(
    usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, llama: Path
) -> None:
    """A fresh conversion for every moment, from the first file that is opened to the last that is removed."""
    sizes = files(llama)
    every = loader(serve(llama))["steps"]
    left, kills = set(), 0
    for kill_at in range(5, every, every // KILLS):
        name = serve(llama)
        kills += "killed" in loader(name, kill_at=kill_at)  # threads make a step more or less: the last may be none
        unfinished = {path.name for path in loader.stores(name).glob("*/*.safetensors")}
        left.add(len(unfinished))
        answer = loader(name)
        assert_whole(answer, usual["llama"])
        assert hub.weight_bytes <= sum(sizes.values()) + max(sizes.values()) + SMALL
    assert kills >= KILLS - 1 and len(left) > SHARDS, "the moments are spread over the whole way"


def test_killed_while_a_file_arrives(usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, llama: Path) -> None:
    name = serve(llama)
    hub.pause = 0.02
    first, second = list(files(llama).values())[:2]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loader, name, pid_file=str(loader.home / "pid"))
        deadline = time.monotonic() + 60
        while hub.weight_bytes < first + second // 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        part = list(loader.stores(name).rglob("*.incomplete"))
        os.kill(int((loader.home / "pid").read_text()), signal.SIGKILL)
        assert running.result(timeout=120).get("killed")
    assert hub.weight_bytes < first + second and part, "it was not killed in the middle of the second file"
    hub.pause = 0.0
    assert loader(name, kill_stage="convert").get("killed")
    assert not list(loader.stores(name).rglob("*.incomplete")), "each kill would leave a part of a file"
    answer = loader(name)
    assert_whole(answer, usual["llama"])
    assert hub.weight_bytes <= sum(files(llama).values()) + second + SMALL


def test_a_damaged_shard_is_seen_before_its_source_is_deleted(
    usual: dict[str, Path], serve: Any, loader: Loader, llama: Path
) -> None:
    name = serve(llama)
    assert loader(name, kill_stage="verify").get("killed")
    (folder,) = loader.stores(name).iterdir()
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    answer = loader(name)
    assert answer["error"] == "StoreError" and shard.name in answer["text"] and not shard.exists()
    assert (folder / "download" / "model-00001-of-00006.safetensors").is_file()
    assert_whole(loader(name), usual["llama"])


def test_a_shard_that_is_lost_later_is_written_again(
    usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, llama: Path
) -> None:
    name = serve(llama)
    folder, before = Path(loader(name)["folder"]), hub.weight_bytes
    (folder / "layer-00000-00002.safetensors").unlink()
    assert_whole(loader(name), usual["llama"])
    assert hub.weight_bytes - before <= files(llama)["model-00002-of-00006.safetensors"] + SMALL


def test_a_full_disk_says_so_and_what_is_finished_stays(
    usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, llama: Path
) -> None:
    every = loader(serve(llama))["steps"]
    texts = set()
    for at in (0.35, 0.5, 0.65, 0.8):
        name = serve(llama)
        answer = loader(name, full_at=int(at * every))
        assert answer["error"] == "StoreError" and "full" in answer["text"] and "\n" not in answer["text"], answer
        texts.add(answer["text"].replace(name.split("/")[1], ""))
        done = hub.weight_bytes
        assert_whole(loader(name), usual["llama"])
        assert hub.weight_bytes < done + sum(files(llama).values()), "it began anew"


def test_a_server_that_fails(usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, llama: Path) -> None:
    name, sizes = serve(llama), files(llama)
    hub.cut["model-00003-of-00006.safetensors"] = 100_000  # the library goes on by itself
    assert_whole(loader(name), usual["llama"])
    name = serve(llama)
    hub.refused.add("model-00004-of-00006.safetensors")
    answer = loader(name)
    assert answer["error"] == "SourceError" and "answers 404" in answer["text"], answer
    hub.refused.clear()
    assert_whole(loader(name), usual["llama"])
    assert hub.weight_bytes <= sum(sizes.values()) + SMALL


def test_two_at_once(usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, llama: Path) -> None:
    name = serve(llama)
    assert_whole(loader(name, times=2), usual["llama"])
    assert hub.weight_bytes <= sum(files(llama).values()) + SMALL


# ---- when ------------------------------------------------------------------------------------------------------------


def test_too_little_disk_for_both(usual: dict[str, Path], serve: Any, loader: Loader, llama: Path) -> None:
    keep, sizes = {"delete_original": False}, files(llama)
    download, store = sum(sizes.values()), sum(files(usual["llama"]).values())
    overhead = 4 << 20
    both = download + store + overhead
    name = serve(llama)
    answer = loader(name, options=keep, free=both + SMALL)
    assert loader.blobs(name) == set(sizes.values()) and Path(answer["folder"]).is_dir()
    name = serve(llama)
    assert_whole(loader(name, options=keep, free=both - SMALL), usual["llama"])
    assert loader.blobs(name) == set()
    name = serve(llama)
    answer = loader(name, options=keep, free=overhead + store // 2)
    assert answer["error"] == "StoreError" and "the store" in answer["text"] and "the largest" in answer["text"]
    assert name in answer["text"] and not list(loader.stores(name).glob("*"))


def test_a_file_that_was_here_before(usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, llama: Path) -> None:
    """It is read where it is; deleted only where that was asked for, and never what another revision has too."""
    sizes = files(llama)
    for delete in (True, False):
        name = serve(llama)
        snapshot = loader.snapshot(name)
        blobs, other = snapshot.parents[1] / "blobs", snapshot.with_name("other")
        for folder in (blobs, snapshot, other):
            folder.mkdir(parents=True)
        for shard in list(sizes)[1:3]:
            (blobs / shard).write_bytes((llama / shard).read_bytes())
            (snapshot / shard).symlink_to(blobs / shard)
        shared, alone = list(sizes)[1:3]
        (other / shared).symlink_to(blobs / shared)
        options, free = {"delete_original": delete}, None if delete else 6 << 20
        answer = loader(name, options=options, free=free)
        assert_whole(answer, usual["llama"])
        assert hub.weight_bytes <= sum(sizes.values()) - sizes[shared] - sizes[alone] + SMALL
        assert (blobs / shared).is_file() and (other / shared).is_file()
        assert (blobs / alone).is_file() != delete
        assert (snapshot / shared).is_symlink() != delete


def test_a_gated_repository(usual: dict[str, Path], serve: Any, hub: Any, loader: Loader, llama: Path) -> None:
    name = serve(llama)
    hub.gated.add(name)
    assert "is gated" in loader(name)["text"]
    assert_whole(loader(name, options={"hf_token": "granted"}), usual["llama"])
