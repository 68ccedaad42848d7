"""Plans of models that are on a Hub only: from config and headers, without a byte of a weight."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hub_server
import pytest

from airllm_nb.cli import main
from airllm_nb.config import LoadOptions, format_bytes
from airllm_nb.engine.facade import plan_model
from airllm_nb.engine.fit import Fit, FittedPlan, Space
from airllm_nb.engine.preview import Preview
from airllm_nb.intake import prepare
from airllm_nb.model import slices
from airllm_nb.model import units as units_module
from airllm_nb.notebook.cards import plan_card
from airllm_nb.tensors.index import read_index

GOLDEN = Path(__file__).parents[1] / "golden"
BUDGETS = {"vram_budget": "400KiB", "ram_budget": "300KiB", "max_seq_len": 32}

# Each call is [name, options]; one fresh process, whose Hub and cache are the test's own. "free" is what disks have.
CALLS = """
import json, shutil, sys, types
from airllm_nb import LoadOptions, plan_model
from airllm_nb.errors import AirLLMError

usage = shutil.disk_usage

def plan(name, options):
    seen, free = [], options.pop("free", None)
    shutil.disk_usage = usage if free is None else lambda _: types.SimpleNamespace(free=free)
    try:
        made = plan_model(name, LoadOptions.create(**options), progress=seen.append)
    except AirLLMError as error:
        return {"error": type(error).__name__, "text": str(error)}
    units = [[unit.name, unit.nbytes, tier] for unit, tier in zip(made.units, made.tiers)]
    headers = [report.done for report in seen if report.stage == "headers"]
    return made.as_dict() | {"units": units, "text": str(made), "headers": headers}

print(json.dumps([plan(*call) for call in json.loads(sys.argv[1])]))
"""


def planned(environment: dict[str, str], *calls: tuple[str | Path, dict[str, Any]]) -> list[dict[str, Any]]:
    given = json.dumps([[str(name), BUDGETS | options] for name, options in calls])
    done = subprocess.run(
        [sys.executable, "-c", CALLS, given], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header_bytes(folder: Path) -> dict[str, int]:
    """What may be read of each weight file: its header and the 8 bytes that say how long it is."""
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            sizes[path.name] = 8 + int.from_bytes(file.read(8), "little")
    return sizes


@pytest.fixture(scope="module")
def folders(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose files say more than their configs: by name, as a folder here and as ``org/name`` there."""
    base = tmp_path_factory.mktemp("checkpoints")

    def changed(name: str, folder: Path, **config: Any) -> Path:
        target = shutil.copytree(folder, base / name)
        said = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(
            json.dumps({key: value for key, value in said.items() if value is not None})
        )
        return target

    found = {
        "plain": tiny_llama(),
        "sharded": tiny_llama(shards=3, tied=True),
        "float32": changed("float32", tiny_llama(), dtype="bfloat16"),
        "unsaid": changed("unsaid", tiny_llama(dtype="float16"), dtype=None, torch_dtype=None),
        "mixtral": _mixtral(base / "mixtral"),
    }
    for name in ("chatglm", "baichuan2_7b"):
        found[name] = _as_safetensors(GOLDEN / name / "checkpoint", base / name)
    return found


def _mixtral(folder: Path) -> Path:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 64}  # fmt: skip
    MixtralForCausalLM(MixtralConfig(**sizes)).to(torch.float16).save_pretrained(folder)
    assert any("experts.3.w1" in name for name in read_index(folder)), "each expert has tensors of its own"
    return folder


def _as_safetensors(source: Path, folder: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.bin*", "*.safetensors*"))
    state: dict[str, torch.Tensor] = {}
    for file in [*source.glob("*.safetensors"), *source.glob("pytorch_model*.bin")]:
        state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


class Answers(NamedTuple):
    hub: hub_server.Hub
    there: dict[str, dict[str, Any]]
    here: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    """Every checkpoint planned on a Hub and in its folder."""
    with hub_server.serve() as hub:
        hub.repositories.update({f"org/{name}": content(folder) for name, folder in folders.items()})
        environment = _environment(hub, tmp_path_factory.mktemp("hub-home"))
        both = planned(environment, *[(f"org/{name}", {}) for name in folders], *[(f, {}) for f in folders.values()])
        yield Answers(
            hub, dict(zip(folders, both, strict=False)), dict(zip(folders, both[len(folders) :], strict=True))
        )


def _environment(hub: hub_server.Hub, home: Path) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}


NAMES = ("plain", "sharded", "float32", "unsaid", "mixtral", "chatglm", "baichuan2_7b")


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_that_of_the_downloaded_folder(answers: Answers, name: str) -> None:
    there, here = answers.there[name], answers.here[name]
    assert "error" not in there, there
    for key in ("units", "tiers", "device_bytes", "arena_bytes", "ring_bytes", "kv_cache_bytes", "activation_bytes",
                "scratch_bytes", "small_bytes"):  # fmt: skip
        assert there[key] == here[key], key
    assert len(there["units"]) > 1
    assert there["fit"]["sizes_from"] == "headers" and here["fit"]["sizes_from"] == "files"


def test_not_a_byte_of_a_weight_is_sent(answers: Answers, folders: dict[str, Path]) -> None:
    bound = {name: max(sizes) for name, sizes in _by_file(folders).items()}
    asked = [entry for entry in answers.hub.sent if entry[0].endswith(".safetensors")]
    assert asked
    assert all(first + count <= bound[name] for name, first, count in asked)
    # Two requests a file, and together the headers, each once.
    total = sum(sum(header_bytes(folder).values()) for folder in folders.values())
    assert sum(count for _, _, count in asked) == total
    weights = sum(path.stat().st_size for folder in folders.values() for path in folder.glob("*.safetensors"))
    assert total < weights / 10


def _by_file(folders: dict[str, Path]) -> dict[str, list[int]]:
    sizes: dict[str, list[int]] = {}
    for folder in folders.values():
        for name, size in header_bytes(folder).items():
            sizes.setdefault(name, []).append(size)
    return sizes


def test_stored_sizes_count_not_those_of_the_config(answers: Answers) -> None:
    """A bfloat16 config over float32 weights: what streams is twice what the config says."""
    float32, plain = answers.there["float32"], answers.there["plain"]
    assert [unit[1] for unit in float32["units"]] == [unit[1] for unit in plain["units"]]
    assert float32["kv_cache_bytes"] * 2 == plain["kv_cache_bytes"], "and computes in bfloat16"
    assert answers.there["unsaid"]["kv_cache_bytes"] == float32["kv_cache_bytes"], "the headers say float16"


def test_progress_counts_the_files(answers: Answers) -> None:
    assert answers.there["sharded"]["headers"] == [0, 1, 2, 3]
    assert answers.here["sharded"]["headers"] == []


def test_the_download_is_named_with_the_room_for_it(answers: Answers, folders: dict[str, Path]) -> None:
    size = sum(path.stat().st_size for path in folders["sharded"].glob("*.safetensors"))
    there, here = answers.there["sharded"], answers.here["sharded"]
    (space,) = there["fit"]["spaces"]
    assert space["what"] == "download" and space["nbytes"] == size and space["fits"] and there["fit"]["disk"]
    assert f"disk      {format_bytes(size)} to download to {space['folder']}, " in there["text"]
    assert "sizes     from the headers" in there["text"] and "assumed   a disk of" in there["text"]
    assert here["fit"]["spaces"] == [] and "disk yes, all is here" in here["text"] and "assumed" not in here["text"]
    assert there["text"].splitlines()[-1].startswith("predicted")


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serve() as hub:
        yield hub


def test_without_headers_the_config_must_do(hub: hub_server.Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    files = content(folders["sharded"])
    hub.repositories["org/whole"] = hub.repositories["org/cached"] = files
    hub.without_ranges.add("org/whole")
    small = {name: data for name, data in files.items() if "safetensors" not in name}
    hub.repositories["org/bin"] = small | {"pytorch_model.bin": b"p" * 4000}
    damaged = dict(content(folders["plain"]))
    damaged["model.safetensors"] = b"\xff" * 8 + damaged["model.safetensors"][8:]
    hub.repositories["org/damaged"] = damaged
    hub.repositories["org/closed"] = files
    environment = _environment(hub, tmp_path)
    whole, binary, broken, _, token, packed = planned(
        environment, ("org/whole", {}), ("org/bin", {}), ("org/damaged", {}), ("org/cached", {}),
        ("org/closed", {"hf_token": "granted"}), ("org/closed", {"compression": "8bit"}),
    )  # fmt: skip
    assert whole["fit"]["sizes_from"] == binary["fit"]["sizes_from"] == "config"
    assert "sizes     from the config alone: the server sends whole files only" in whole["text"]
    assert "sizes     from the config alone: pytorch_model.bin is rewritten once" in binary["text"]
    (download, store) = binary["fit"]["spaces"]
    assert (download["nbytes"], store["what"], store["beside"]) == (4000, "store", 4000)
    assert broken["error"] == "CheckpointError" and "model.safetensors is truncated or damaged" in broken["text"]
    assert token["fit"]["sizes_from"] == "headers" and "Bearer granted" in hub.tokens
    assert [space["what"] for space in packed["fit"]["spaces"]] == ["download", "store"]
    assert packed["fit"]["spaces"][1]["nbytes"] < packed["fit"]["spaces"][0]["nbytes"]
    (offline,) = planned(environment | {"HF_HUB_OFFLINE": "1"}, ("org/cached", {}))
    assert offline["fit"]["sizes_from"] == "config" and "the Hub is not asked" in offline["text"]
    assert offline["units"] == whole["units"]
    # Each repository's headers were asked for once, however many plans were made of it.
    assert len([1 for _, first, count in hub.sent if (first, count) == (0, 8)]) == 1 + 3 + 3


def test_bin_files_tell_what_they_hold(hub: hub_server.Hub, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """By both ends of each file and the head of each tensor: megabytes of weights stay where they are."""
    import torch
    from safetensors.torch import load_file

    plain = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    folder = Path(shutil.copytree(plain, tmp_path / "bins", ignore=shutil.ignore_patterns("*.safetensors*")))
    torch.save(load_file(plain / "model.safetensors"), folder / "pytorch_model.bin")
    nbytes = (folder / "pytorch_model.bin").stat().st_size
    hub.repositories["org/bins"] = content(folder)
    environment = _environment(hub, tmp_path)
    budgets: dict[str, Any] = {"vram_budget": "16MiB", "ram_budget": "16MiB"}
    there, cast, packed, here = planned(
        environment, ("org/bins", budgets), ("org/bins", budgets | {"dtype": "bfloat16"}),
        ("org/bins", budgets | {"compression": "8bit", "delete_original": True}), (folder, budgets),
    )  # fmt: skip
    assert (there["fit"]["sizes_from"], here["fit"]["sizes_from"]) == ("headers", "files")
    assert there["units"] == here["units"] and [space["what"] for space in there["fit"]["spaces"]] == ["download"]
    assert cast["fit"]["sizes_from"] == "config" and "rewritten once, as bfloat16" in cast["text"]
    assert [space["what"] for space in cast["fit"]["spaces"]] == ["download", "store"]
    assert [space["what"] for space in packed["fit"]["spaces"]] == ["piecewise"]
    asked = [count for name, _, count in hub.sent if name == "pytorch_model.bin"]
    assert len(asked) < 80 and sum(asked) < 600_000 < nbytes // 4


def test_a_hub_that_falters_is_asked_again(hub: hub_server.Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    files = content(folders["plain"])
    hub.repositories.update({"org/cut": files, "org/down": files, "org/refused": files})
    hub.broken.update({"org/down": 503, "org/refused": 404})
    hub.cut["model.safetensors"] = 4
    cut, down, refused = planned(
        _environment(hub, tmp_path), *[(f"org/{name}", {}) for name in ("cut", "down", "refused")]
    )
    assert cut["fit"]["sizes_from"] == "headers"
    for answer in (down, refused):
        assert answer["fit"]["sizes_from"] == "config" and "the Hub does not give its headers" in answer["text"]
    asked = [line.split("/")[2] for line in hub.requests if line.endswith("model.safetensors")]
    assert asked == ["cut"] * 3 + ["down"] * 3 + ["refused"]


def test_a_layout_that_cannot_be_streamed_is_refused_before_the_download(
    hub: hub_server.Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    files = dict(content(folders["mixtral"]))
    header = files["model.safetensors"]
    length = int.from_bytes(header[:8], "little")
    said = json.loads(header[8 : 8 + length])
    name = next(name for name in said if "experts.1.w1" in name)
    said[name]["dtype"], said[name]["shape"][0] = "F32", said[name]["shape"][0] // 2
    packed = json.dumps(said).encode()
    files["model.safetensors"] = len(packed).to_bytes(8, "little") + packed + header[8 + length :]
    hub.repositories["org/odd"] = files
    code = "import sys; from airllm_nb import open_model; open_model('org/odd')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(hub, tmp_path), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert "UnsupportedModelError" in done.stderr and "cannot be streamed in place" in done.stderr, done.stderr
    assert sum(count for name, _, count in hub.sent if name == "model.safetensors") == 8 + len(packed)


# ---- the verdict -----------------------------------------------------------------------------------------------------


def test_a_space_says_whether_it_fits() -> None:
    folder, gib = Path("/cache"), 1 << 30
    assert str(Space("download", gib, folder, 2 * gib)) == "1.0 GiB to download to /cache, 2.0 GiB free: fits"
    full = Space("download", 3 * gib, folder, 2 * gib)
    assert full.fits is False and "does not fit; set HF_HOME to a folder on a larger disk" in str(full)
    beside = Space("store", gib, folder, 2 * gib, beside=3 * gib // 2)
    assert beside.fits is False and "beside those 1.5 GiB" in str(beside) and "layer_shards_saving_path" in str(beside)
    unknown = Space("store", gib, folder, None)
    assert unknown.fits is None and "not known" in str(unknown)
    verdicts = [Fit(spaces, 1, None, 0, "files").disk for spaces in ((), (unknown,), (unknown, full))]
    assert verdicts == [True, None, False]


@pytest.mark.parametrize(
    ("vram", "ram", "verdict", "said"),
    [
        ("64MiB", "64MiB", (True, True), "RAM yes | VRAM yes"),
        ("400KiB", "64MiB", (False, True), "RAM yes | VRAM in part: "),
        ("400KiB", "300KiB", (False, False), "RAM in part: every token reads "),
        (None, "64MiB", (None, True), "disk yes, all is here | RAM yes"),
    ],
)
def test_the_plan_says_what_memory_holds(
    tiny_llama: Callable[..., Path], vram: str | None, ram: str, verdict: tuple[bool | None, bool], said: str
) -> None:
    plan = plan_model(tiny_llama(), LoadOptions.create(vram_budget=vram, ram_budget=ram, max_seq_len=32, device="cpu"))
    assert isinstance(plan, FittedPlan)
    assert (plan.fit.vram, plan.fit.ram) == verdict and said in str(plan)
    assert plan.fit.disk is True and json.loads(json.dumps(plan.as_dict()))["fit"]["ram"] is verdict[1]


@pytest.mark.parametrize(("tied", "compression"), [(False, None), (True, None), (True, "4bit")])
def test_another_budget_builds_nothing_twice(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tied: bool, compression: str | None
) -> None:
    """Large matrices are sliced by the budget: the same model is cut anew, there and back."""
    monkeypatch.setattr(slices, "UNIT_BYTES", 4096)
    monkeypatch.setattr(units_module.cut_units, "__defaults__", (4096,))
    folder, budgets = tiny_llama(tied=tied, hidden_size=256, intermediate_size=640), [8 << 20, 2 << 20, 8 << 20]
    options = LoadOptions.create(device="cpu", vram_budget=8 << 20, max_seq_len=16, compression=compression)
    fresh = [
        Preview(folder, dataclasses.replace(options, vram_budget=budget, ram_budget=budget)).plan()
        for budget in budgets[:2]
    ]
    preview = Preview(folder, options)
    monkeypatch.setattr(prepare, "build", None)
    again = [preview.plan(budget, budget) for budget in budgets]
    units = [[(unit.name, unit.nbytes) for unit in plan.units] for plan in [*fresh, *again]]
    assert units[0] == units[2] == units[4] != units[1] == units[3]
    assert again[1].needs == fresh[1].needs


def test_a_store_must_fit_its_disk(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LoadOptions.create(compression="8bit", layer_shards_saving_path=tmp_path / "not" / "yet", device="cpu")
    plan = plan_model(tiny_llama(), options)
    (space,) = plan.fit.spaces
    assert space.what == "store" and space.fits and 0 < space.nbytes < plan.fit.weights * 2
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    full = plan_model(tiny_llama(), options)
    assert full.fit.disk is False and "1000 B free: does not fit" in str(full)
    rows = plan_card("tiny", full).rows
    assert any(label == "disk" and "set --shards to a folder on a larger disk" in value for label, value in rows)
    assert any(label == "fits" and value.startswith("disk no") for label, value in rows)


def test_a_store_that_fits_file_by_file_fits(answers: Answers, folders: dict[str, Path], tmp_path: Path) -> None:
    """The verdict is that of the way which loading goes."""
    environment = _environment(answers.hub, tmp_path)
    options = {"compression": "8bit", "layer_shards_saving_path": str(tmp_path / "store")}
    calls: list[dict[str, Any]] = [{}, {"delete_original": True}]
    ample, asked = planned(environment, *[("org/sharded", options | call) for call in calls])
    download, store = (space["nbytes"] for space in ample["fit"]["spaces"])
    (space,) = asked["fit"]["spaces"]
    one = max(path.stat().st_size for path in folders["sharded"].glob("*.safetensors"))
    assert space["what"] == "piecewise" and store < space["nbytes"] and one < download
    frees = [space["nbytes"] + download, space["nbytes"], space["nbytes"] - 1]
    every = planned(environment, *[("org/sharded", options | {"free": free}) for free in frees])
    assert [[space["what"] for space in plan["fit"]["spaces"]] for plan in every] == [
        ["download", "store"], ["piecewise"], ["piecewise"]
    ]  # fmt: skip
    assert [plan["fit"]["disk"] for plan in every] == [True, True, False]
    assert "each weight file deleted before the next is downloaded" in every[1]["text"]
    assert "fits      disk yes" in every[1]["text"] and "set layer_shards_saving_path to" in every[2]["text"]
    assert not list(tmp_path.glob("store*"))


def test_a_disk_that_nobody_knows_is_not_believed(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kaggle's root folder shows the host's terabytes."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    options = LoadOptions.create(compression="8bit", layer_shards_saving_path="/no/such/folder", device="cpu")
    plan = plan_model(tiny_llama(), options)
    assert plan.fit.disk is None and plan.fit.spaces[0].free is None
    assert "how much is free there is not known" in str(plan) and "disk not known" in str(plan)


def test_the_command_says_it_too(tiny_llama: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    asked = ["plan", str(tiny_llama()), "--compression", "8bit", "--shards", str(tmp_path), "--device", "cpu"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert f"to write once to {tmp_path}, " in text and "fits      disk yes | RAM yes" in text
    assert main([*asked, "--json"]) == 0
    (space,) = json.loads(capsys.readouterr().out)["fit"]["spaces"]
    assert space["folder"] == str(tmp_path) and space["fits"] is True and not list(tmp_path.iterdir())
