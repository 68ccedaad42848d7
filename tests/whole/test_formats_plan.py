"""Packed checkpoints that are on a Hub only: planned as the downloaded folder is, without a byte of a weight."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hub_server
import packed_bnb
import pytest
from gguf_files import tiny_llama_gguf
from safetensors.torch import load_file, save_file
from test_formats import CASES_BY_NAME, Case
from test_preview import _environment as environment
from test_preview import content, header_bytes

from airllm_nb.checkpoint.hub.gguf_header import FIRST
from airllm_nb.config import format_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

# One fresh process whose Hub and cache are the test's own. Each model is planned three times: with all the memory that
# it can use, with little VRAM, and with little RAM too. Bandwidths are given, as measured ones differ each time.
PLANS = """
import json, sys
from airllm_nb import LoadOptions
from airllm_nb.engine import preview
from airllm_nb.errors import AirLLMError
from airllm_nb.model import skeleton
from airllm_nb.plan.residency import Machine
from airllm_nb.plan.experts import staging
from airllm_nb.stream.ring import align, host_room

preview.measure = lambda prepared: Machine(True, disk=1e9, link=1e10, memory=1e10)
skeleton.cut_units.__defaults__ = (12_000,)

def plans(name):
    options = LoadOptions.create(vram_budget="64MiB", ram_budget="64MiB", max_seq_len=32)
    try:
        view = preview.Preview(name, options)
        ample = view.plan()
        largest = max(unit.nbytes for unit in ample.units if unit.kind not in ("embedding", "experts"))
        banks = [unit.experts for unit in ample.units if unit.experts]
        vram = ample.needs.total + align(largest) + staging(banks, 0)[1]
        ram = host_room(largest) + max([align(bank.nbytes) for bank in banks], default=0)
        return [described(plan) for plan in (ample, view.plan(vram), view.plan(vram, ram))]
    except AirLLMError as error:
        return f"{type(error).__name__}: {error}"

def described(plan):
    units = [[unit.name, unit.nbytes, unit.kind, tier] for unit, tier in zip(plan.units, plan.tiers)]
    return plan.as_dict() | {"units": units, "text": str(plan)}

print(json.dumps([plans(name) for name in sys.argv[1:]]))
"""
LOAD = """
import json, sys, torch
from airllm_nb import LoadOptions, open_model
for name in sys.argv[1:]:
    with open_model(name, LoadOptions.create(dtype="float32", max_seq_len=32)) as model:
        made = model.generate(torch.tensor([[5, 9, 17]]), max_new_tokens=4, do_sample=False)
        print(json.dumps({"compression": model.status()["compression"], "tokens": made[0].tolist()}))
"""


def child(code: str, hub: hub_server.Hub, home: Path, *names: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, names)], env=environment(hub, home), capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


class Answers(NamedTuple):
    hub: hub_server.Hub
    home: Path
    paths: dict[str, Path]
    there: dict[str, Any]
    here: dict[str, Any]
    whole: Any  # of the bare model, from a server that knows no ranges


LARGE, BARE = "a GGUF file longer than the first request", "a model without its head"


@pytest.fixture(scope="module")
def answers(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    """Every format planned on a Hub and in its folder."""
    base, home = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("hub-home")
    makers = {name: functools.partial(_made, case, tiny_llama()) for name, case in CASES_BY_NAME.items()}
    paths = {}
    for number, (name, make) in enumerate((makers | {LARGE: _large, BARE: _bare}).items()):
        (folder := base / str(number)).mkdir()
        paths[name] = make(folder)
    with hub_server.serve() as hub:
        for name, path in paths.items():
            hub.repositories[repo_id(name)] = content(path if path.is_dir() else path.parent)
        whole = dict(hub.repositories[repo_id(BARE)])
        whole["whole.safetensors"] = whole.pop("model.safetensors")
        hub.repositories["org/whole"] = whole
        hub.without_ranges.add("org/whole")
        made = json.loads(child(PLANS, hub, home, *map(repo_id, paths), *paths.values(), "org/whole"))
        there, here = made[: len(paths)], made[len(paths) : -1]
        yield Answers(hub, home, paths, dict(zip(paths, there, strict=True)), dict(zip(paths, here, strict=True)),
                      made[-1])  # fmt: skip
    shutil.rmtree(base)


def _made(case: Case, source: Path, folder: Path) -> Path:
    return case.make(folder, source)


def _large(folder: Path) -> Path:
    return tiny_llama_gguf(folder / "large.gguf", kind="Q4_K", hidden=1024, inner=2816, words=260)


def _bare(folder: Path) -> Path:
    """A checkpoint as the bare model's ``save_pretrained`` writes it: its names are those of no language model."""
    path = packed_bnb.make(folder, tie_word_embeddings=True)
    file = path / "model.safetensors"
    tensors = {name.removeprefix("model."): value for name, value in load_file(file).items() if "lm_head" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def repo_id(name: str) -> str:
    return "org/" + re.sub(r"\W+", "-", name).strip("-")


def weight_files(path: Path) -> list[Path]:
    return list(path.glob("*.safetensors")) if path.is_dir() else [path]


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_the_plan_is_that_of_the_downloaded_folder(answers: Answers, name: str) -> None:
    assert not isinstance(answers.there[name], str), answers.there[name]
    for there, here in zip(answers.there[name], answers.here[name], strict=True):
        assert there.keys() == here.keys()
        for key in there.keys() - {"fit", "text"}:
            assert there[key] == here[key], key
        assert (there["fit"]["sizes_from"], here["fit"]["sizes_from"]) == ("headers", "files")
        for key in ("weights", "from_disk", "ram", "vram"):
            assert there["fit"][key] == here["fit"][key], key
        assert there["fit"]["compression"] == here["fit"]["compression"] == CASES_BY_NAME[name].packed_as
        assert f"packed    {CASES_BY_NAME[name].packed_as}\n" in there["text"]
    for tier, plan in zip(("gpu", "ram", "disk"), answers.there[name], strict=True):
        assert tier in {where for *_, kind, where in plan["units"] if kind != "embedding"}


def test_what_is_planned_is_what_lies_there(answers: Answers) -> None:
    """Bytes of the units and of what is always resident: the packed ones, not those of the unpacked matrices."""
    for name in CASES_BY_NAME:
        stored = sum(file.stat().st_size for file in weight_files(answers.paths[name]))
        plan = answers.there[name][0]
        assert 0.8 * stored < sum(nbytes for _, nbytes, *_ in plan["units"]) + plan["small_bytes"] < 1.1 * stored, name


def test_not_a_byte_of_a_weight_is_sent(answers: Answers) -> None:
    folders = [path for path in answers.paths.values() if path.is_dir()]
    sent = [count for file, _, count in answers.hub.sent if file == "model.safetensors"]
    # Two requests a file, though it was planned under several budgets.
    assert len(sent) == 2 * len([file for folder in folders for file in weight_files(folder)])
    assert sum(sent) == sum(sum(header_bytes(folder).values()) for folder in folders)
    assert not [*answers.home.rglob("*.safetensors"), *answers.home.rglob("*.gguf")], "nothing was downloaded"


def test_of_a_gguf_file_only_its_beginning_is_sent(answers: Answers) -> None:
    assert answers.paths[LARGE].stat().st_size > 5 * FIRST
    assert [plan["units"] for plan in answers.there[LARGE]] == [plan["units"] for plan in answers.here[LARGE]]
    assert [entry for entry in answers.hub.sent if entry[0] == "large.gguf"] == [("large.gguf", 0, FIRST)]


def test_the_download_is_named_with_the_room_for_it(answers: Answers) -> None:
    for name in CASES_BY_NAME:
        path = answers.paths[name]
        there, here = (plans[name][0] for plans in (answers.there, answers.here))
        size = sum(file.stat().st_size for file in weight_files(path))
        download, *rest = there["fit"]["spaces"]
        assert (download["what"], download["nbytes"], download["fits"]) == ("download", size, True), name
        assert f"disk      {format_bytes(size)} to download to {download['folder']}, " in there["text"]
        # Of a GGUF file the vectors are written once; nothing else is.
        assert [space["what"] for space in rest] == (["store"] if path.suffix == ".gguf" else []), name
        assert [space["nbytes"] for space in rest] == [space["nbytes"] for space in here["fit"]["spaces"]]
        assert sum(space["nbytes"] for space in rest) < size / 10


# ---- what headers do not say -----------------------------------------------------------------------------------------


def test_where_shapes_stay_unknown_the_config_must_do(answers: Answers) -> None:
    bare, whole, here = answers.there[BARE][0], answers.whole[0], answers.here[BARE][0]
    assert bare["fit"]["why"].startswith("the shape of layers.")
    assert whole["fit"]["why"].startswith("the server sends whole files only; ")
    for plan in (bare, whole):
        fit = plan["fit"]
        assert fit["sizes_from"] == "config" and fit["compression"] is None
        assert fit["weights"] > here["fit"]["weights"]
        assert fit["why"].endswith("they are those of unpacked weights, and the checkpoint's are packed (bitsandbytes)")
        assert f"sizes     from the config alone: {fit['why']}" in plan["text"]
        assert fit["spaces"][0]["nbytes"] == sum(file.stat().st_size for file in weight_files(answers.paths[BARE]))


def test_neither_is_refused_before_it_is_here(answers: Answers) -> None:
    """The shapes of 4-bit weights under names that are not native are in the files alone."""
    names = ["bitsandbytes 4-bit, each expert apart (Mixtral)", BARE]
    said = child(LOAD, answers.hub, answers.home, *map(repo_id, names), *(answers.paths[name] for name in names))
    *there, experts, bare = [json.loads(line) for line in said.splitlines()]
    assert there == [experts, bare]
    assert experts["compression"] == bare["compression"] == "bitsandbytes: nf4"
