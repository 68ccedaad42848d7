"""Of several formats and GGUF files the one that suits a machine is taken, says why, and is all that is downloaded."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import hub_server
import numpy as np
import pytest
from gguf_files import write

from airllm_nb.checkpoint.source import read_config
from airllm_nb.config import GiB, LoadOptions
from airllm_nb.errors import CheckpointError
from airllm_nb.intake.find.layout import Choice, choose
from airllm_nb.intake.find.picks import Room, models, pick, quantisation
from airllm_nb.intake.find.resolve import resolve

OPTIONS = LoadOptions()
# What an 8B model really has: bytes a file, as they are published.
SIZES = {
    f"Some-8B-Instruct-{kind}.gguf": int(size * 1e9)
    for kind, size in {
        "F32": 32.13, "BF16": 16.07, "F16": 16.07, "Q8_0": 8.54, "Q6_K": 6.60, "Q5_K_M": 5.73, "Q5_0": 5.60,
        "Q5_K_S": 5.60, "Q4_1": 5.13, "Q4_K_M": 4.92, "Q4_K_S": 4.69, "IQ4_NL": 4.68, "Q4_0": 4.66, "IQ4_XS": 4.45,
        "Q3_K_M": 4.02, "IQ3_M": 3.78, "Q2_K": 3.18, "IQ2_XXS": 2.40,
    }.items()
}  # fmt: skip


def taken(room: Room, *kinds: str, here: tuple[str, ...] = ()) -> str:
    sizes = {name: size for name, size in SIZES.items() if not kinds or quantisation(name) in kinds}
    return quantisation(pick(sizes, room, "org/m", {f"Some-8B-Instruct-{kind}.gguf" for kind in here})[0])


# ---- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disk", "ram", "vram", "kind"),
    [
        (500, 64, 0, "BF16"),  # never 32 bits
        (500, 12, 0, "Q8_0"),
        (500, 4, 3, "Q6_K"),
        (500, 5.8, 0, "Q5_K_S"),  # before Q5_0, of the same size
        (500, 5, 0, "Q4_K_S"),  # before IQ4_NL and Q4_0
        (500, 4, 0, "IQ3_M"),
        (500, 1, 0, "Q4_K_M"),  # streams
        (500, None, None, "Q4_K_M"),
        (7, 64, 0, "Q5_K_M"),  # a margin is left
        (5, 64, 0, "Q3_K_M"),
        (4, 1, 0, "Q2_K"),
        (1, 64, 0, "IQ2_XXS"),  # the download will say how much is missing
        (None, 64, 0, "BF16"),
    ],
)
def test_the_best_that_disk_and_memory_hold(disk: int | None, ram: float | None, vram: int | None, kind: str) -> None:
    room = Room(*(None if size is None else int(size * GiB) for size in (disk, ram, vram)))
    assert taken(room) == kind


def test_equals_go_by_family() -> None:
    assert taken(Room(ram=64 * GiB), "Q5_0", "Q5_K_S") == "Q5_K_S"
    assert taken(Room(ram=64 * GiB), "IQ4_NL", "Q4_0") == "Q4_0"
    assert taken(Room(ram=64 * GiB), "F16", "BF16") == "BF16"
    assert taken(Room(ram=64 * GiB), "F16", "F32") == "F16"
    assert taken(Room(ram=GiB), "Q4_0", "Q8_0", "IQ4_NL") == "Q4_0"
    assert taken(Room(ram=GiB), "Q2_K", "Q8_0") == "Q2_K"


def test_what_is_here_goes_before_a_download() -> None:
    full = Room(disk=0, ram=64 * GiB)
    assert taken(full, here=("Q4_0",)) == "Q4_0"
    assert taken(full, here=("Q4_0", "Q2_K")) == "Q4_0"
    assert taken(Room(disk=500 * GiB, ram=64 * GiB), here=("Q2_K",)) == "Q2_K"


def test_the_reason_is_one_line_that_people_understand() -> None:
    def why(room: Room, here: tuple[str, ...] = ()) -> str:
        return pick(SIZES, room, "org/m", here)[1]

    assert why(Room(500 * GiB, 5 * GiB, GiB)) == (
        "took Some-8B-Instruct-Q5_K_M.gguf (5.3 GiB) of 18 GGUF files: the best that fits 6.0 GiB of memory; "
        "name another as org/m:FILE.gguf"
    )
    assert "the best that fits 64.0 GiB of memory and the 5.0 GiB free on disk;" in why(Room(5 * GiB, 64 * GiB))
    assert "the one nearest 4.5 bits a weight, as 1.0 GiB of memory holds none whole;" in why(Room(None, GiB))
    assert "the one nearest 4.5 bits a weight that fits;" in why(Room())
    assert "the smallest; none leaves room on the disk, which has 1.0 GiB free;" in why(Room(GiB))
    assert ": it is here already;" in why(Room(GiB), ("Some-8B-Instruct-Q2_K.gguf",))
    two = ("Some-8B-Instruct-Q2_K.gguf", "Some-8B-Instruct-Q4_0.gguf")
    assert ": of the 2 that are here already the best that fits" in why(Room(GiB, 64 * GiB), two)
    assert all("\n" not in why(Room(disk * GiB, GiB)) for disk in (1, 5, 50))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Some-Model-Q4_K_M.gguf", "Q4_K_M"),
        ("model.Q8_0.gguf", "Q8_0"),
        ("some_model_q4_k_m.gguf", "Q4_K_M"),
        ("Model-UD-Q4_K_XL.gguf", "Q4_K_XL"),
        ("Model.i1-IQ2_XXS.gguf", "IQ2_XXS"),
        ("phi-q4.gguf", "Q4"),
        ("phi-fp16.gguf", "F16"),
        ("BF16/Model-BF16.gguf", "BF16"),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("QwQ-32B-Q6_K.gguf", "Q6_K"),
        ("Model-Q8_0_L.gguf", "Q8_0_L"),
        ("Model-Q4_K_M-f16.gguf", "Q4_K_M"),
        ("Model-f16.gguf", "F16"),
        ("Model-IQ4_NL-00001-of-00002.gguf", "IQ4_NL"),
        ("QwQ-32B.gguf", ""),
    ],
)
def test_the_quantisation_is_in_the_name(name: str, kind: str) -> None:
    assert quantisation(name) == kind


def test_files_of_several_models_are_not_chosen_among() -> None:
    same = ["Some-8B-Q8_0.gguf", "Some-8B-UD-Q4_K_XL.gguf", "some-8b.i1-IQ4_XS.gguf", "sub/Some-8B-f16.gguf"]
    assert pick(dict.fromkeys(same, 1), Room(), "org/m")[0] in same
    for other in ("Some-70B-Q4_0.gguf", "Other-8B-Q4_0.gguf", "Some-8B-Base-Q4_0.gguf"):
        with pytest.raises(CheckpointError, match=r"holds 5 GGUF files; name one of them, as org/m:"):
            pick(dict.fromkeys([*same, other], 1), Room(), "org/m")


@pytest.mark.parametrize(
    "other",
    ["Some-8B-Q8_0_L.gguf", "Some-8B-Q4_K_M-f16.gguf", "Some-8B-f16-Q4_K_M.gguf", "Some-8B-UD-Q4_K_XL.gguf",
     "Some-8B-Q6_K-q8.gguf", "Some-8B-Q4_K_M_L.gguf", "Some-8B.f16.q6.gguf", "Some-8B-Q4_K_S-fp16-output.gguf",
     "Q8_0/Some-8B-Q8_0-00001-of-00002.gguf"],
)  # fmt: skip
def test_marks_behind_a_quantisation_make_no_other_model(other: str) -> None:
    assert pick({"Some-8B-Q4_0.gguf": 4, other: 8}, Room(ram=GiB), "org/m")[0] == other


@pytest.mark.parametrize(
    "aside",
    ["mtp/Some-8B-MTP-Q8_0.gguf", "draft/Some-0.6B-Q8_0.gguf", "Some-8B-draft-Q4_0.gguf", "mmproj/model-f16.gguf",
     "Some-8B-EAGLE3-F16.gguf"],
)  # fmt: skip
def test_drafts_and_eyes_make_no_other_model(aside: str) -> None:
    sizes = {"Some-8B-Q4_0.gguf": 4, "Some-8B-Q8_0.gguf": 8, aside: 16}
    assert choose(sizes, "org/m", room=Room(ram=GiB)).weights == ("Some-8B-Q8_0.gguf",)


def test_a_model_with_drafting_layers_inside_is_one() -> None:
    sizes = {"Some-8B-MTP-Q4_0.gguf": 4, "Some-8B-MTP-Q8_0.gguf": 8}
    assert choose(sizes, "org/m", room=Room(ram=GiB)).weights == ("Some-8B-MTP-Q8_0.gguf",)


def test_not_every_gguf_file_is_a_model() -> None:
    beside = ["mmproj-Some-F16.gguf", "Some-mmproj-F16.gguf", "imatrix.gguf", "Some-lora-F16.gguf", "ggml-vocab-a.gguf",
              "Some-Q4_0_4_8.gguf", "README.md"]  # fmt: skip
    assert models(dict.fromkeys([*beside, "Some-Q4_0.gguf", "Explora-Q4_0.gguf"], 1)) == {
        "Explora-Q4_0.gguf": 1, "Some-Q4_0.gguf": 1,
    }  # fmt: skip


PARTS = {f"q8/Some-Q8_0-0000{number}-of-00003.gguf": 5 * GiB for number in (1, 2, 3)}


def test_parts_count_as_one_file() -> None:
    sizes = {"Some-Q4_0.gguf": 8 * GiB, **PARTS}
    found = choose(sizes, "org/m", room=Room(ram=64 * GiB))
    assert found.weights == tuple(PARTS)
    assert found.why.startswith("took q8/Some-Q8_0.gguf (15.0 GiB, 3 parts) of 2 GGUF files: the best that fits 64.0")
    assert choose(sizes, "org/m", room=Room(disk=10 * GiB, ram=64 * GiB)).weights == ("Some-Q4_0.gguf",)
    some, every = list(PARTS)[:2], list(PARTS)
    assert choose(sizes, "org/m", room=Room(disk=10 * GiB), here=some).weights == ("Some-Q4_0.gguf",)
    assert choose(sizes, "org/m", room=Room(disk=10 * GiB), here=every).weights == tuple(PARTS)


def test_parts_are_named_by_any_of_them_or_all() -> None:
    for name in (*PARTS, "q8/Some-Q8_0.gguf"):
        assert choose(PARTS, "org/m", name) == Choice("gguf", None, tuple(PARTS))
    with pytest.raises(CheckpointError, match=r"org/m holds no Some-Q8_0\.gguf; GGUF files there: q8/Some-Q8_0-00001"):
        choose(PARTS, "org/m", "Some-Q8_0.gguf")


def test_a_missing_part_is_named() -> None:
    first, second, third = PARTS
    sizes = {first: GiB, third: GiB}
    missing = rf"{first} is one of 3 parts, of which {second} is missing \(1 in all\); bring it into the same folder"
    for name in (None, first, third, "q8/Some-Q8_0.gguf"):
        with pytest.raises(CheckpointError, match=f"org/m: {missing}"):
            choose(sizes, "org/m", name)
    beside = choose({**sizes, "Some-Q4_0.gguf": GiB}, "org/m")
    assert beside.weights == ("Some-Q4_0.gguf",)
    assert beside.why.startswith(f"took Some-Q4_0.gguf; left out: {first} is one of 3 parts")


# ---- between formats -------------------------------------------------------------------------------------------------

BOTH = {
    "config.json": 600, "model-1.safetensors": 8 * GiB, "model-2.safetensors": 8 * GiB,
    "model.safetensors.index.json": 900, "consolidated.safetensors": 16 * GiB,
    "m-Q8_0.gguf": 8 * GiB, "m-Q4_K_M.gguf": 5 * GiB,
}  # fmt: skip


def test_safetensors_stay_first_where_the_disk_takes_them() -> None:
    found = choose(BOTH, "org/m", room=Room(disk=17 * GiB, ram=64 * GiB))
    assert (found.format, found.index) == ("safetensors", "model.safetensors.index.json")
    assert found.why == "took safetensors (16.0 GiB) before GGUF; name a GGUF file as org/m:FILE.gguf"
    small = choose(BOTH, "org/m", room=Room(disk=16 * GiB, ram=64 * GiB))
    assert small.weights == ("m-Q8_0.gguf",) and small.why == (
        "took m-Q8_0.gguf (8.0 GiB): the safetensors files need 16.0 GiB more on disk, which has 16.0 GiB free; "
        "name another as org/m:FILE.gguf"
    )
    assert choose(BOTH, "org/m", room=Room(disk=6 * GiB)).weights == ("m-Q4_K_M.gguf",)
    # Nothing fits: what the model is published as, and the download says how much is missing.
    assert choose(BOTH, "org/m", room=Room(disk=5 * GiB)).format == "safetensors"
    assert choose(BOTH, "org/m", room=Room(disk=6 * GiB), keep_format=True).format == "safetensors"
    shards = {"model-1.safetensors", "model-2.safetensors"}
    assert choose(BOTH, "org/m", room=Room(disk=0), here=shards).format == "safetensors"


def test_safetensors_before_bin_says_so() -> None:
    files = {"config.json": 1, "model.safetensors": GiB, "pytorch_model.bin": GiB}
    found = choose(files, "org/m")
    assert (found.weights, found.why) == (("model.safetensors",), "took safetensors (1.0 GiB) before bin")
    del files["pytorch_model.bin"]
    assert choose(files, "org/m").why == "", "nothing was chosen"


def test_a_folder_of_several_files_is_chosen_from_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind, size in (("F16", 1600), ("Q8_0", 850), ("Q4_K_M", 490)):
        (tmp_path / f"m-{kind}.gguf").write_bytes(b"G" * size)
    with caplog.at_level(logging.INFO, "airllm_nb"):
        source = resolve(tmp_path, OPTIONS, room=Room(disk=0, ram=1000))
    assert source.gguf_file == tmp_path / "m-Q8_0.gguf" and "the best that fits 1000 B of memory" in source.why
    assert [record.getMessage() for record in caplog.records] == [source.why]
    named = resolve(f"{tmp_path}:m-F16.gguf", OPTIONS)
    assert named.gguf_file == tmp_path / "m-F16.gguf" and named.why == ""
    with pytest.raises(CheckpointError, match=r"holds no m-Q2_K\.gguf; GGUF files there: m-F16\.gguf, m-Q4_K_M"):
        resolve(f"{tmp_path}:m-Q2_K.gguf", OPTIONS)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "n-Q4_0.gguf").write_bytes(b"G")
    assert resolve(f"{tmp_path}:sub/n-Q4_0.gguf", OPTIONS).gguf_file == tmp_path / "sub" / "n-Q4_0.gguf"


# ---- the Hub ---------------------------------------------------------------------------------------------------------

CALLS = """
import json, shutil, sys
from airllm_nb.checkpoint.hub import gguf_header
from airllm_nb.intake.find.picks import Room
from airllm_nb.checkpoint.source import read_config
from airllm_nb.intake.find.resolve import resolve
from airllm_nb.config import LoadOptions

usage = shutil.disk_usage
gguf_header.FIRST = 1 << 14

def ask(name, weights=True, room=None, free=None, **options):
    shutil.disk_usage = usage if free is None else lambda _: type("Usage", (), {"free": free})
    try:
        found = resolve(name, LoadOptions.create(**options), weights=weights, room=Room(**room) if room else None)
        config = read_config(found) if found.header or found.format != "gguf" else None
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
    held = found.header and found.header.stat()
    return {"format": found.format, "files": [path.name for path in found.files], "why": found.why,
            "wanted": found.wanted, "missing": found.missing, "nbytes": found.nbytes, "print": found.fingerprint,
            "header": held and [held.st_size, held.st_blocks * 512], "folder": str(found.folder),
            "config": config}

print(json.dumps([ask(**call) for call in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serve() as hub:
        yield hub


@pytest.fixture
def ask(hub: hub_server.Hub, hub_env: Callable[[str], dict[str, str]]) -> Callable[..., list[dict[str, Any]]]:
    """``ask({"name": …}, …, HF_HUB_OFFLINE="1")``: the calls in one fresh process whose cache is the test's own."""

    def call(*calls: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-c", CALLS, json.dumps(calls)]
        env = hub_env(hub.endpoint) | environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return call


def small(free_after: int) -> int:
    """Free bytes of a disk that takes so many, its margin left."""
    return GiB + free_after


def test_only_the_chosen_file_is_downloaded(hub: hub_server.Hub, ask: Callable[..., Any]) -> None:
    hub.repositories["org/m-GGUF"] = {
        "README.md": b"r", "imatrix.dat": b"i" * 50, "mmproj-m-F16.gguf": b"p" * 60, "trainer_state.json": b"{}",
        "m-F16.gguf": b"f" * 160_000, "m-Q8_0.gguf": b"8" * 85_000, "m-Q4_K_M.gguf": b"4" * 49_000,
        "m-Q6_K-00001-of-00002.gguf": b"6" * 30_000, "m-Q6_K-00002-of-00002.gguf": b"6" * 36_000,
    }  # fmt: skip
    memory = {"ram": 60_000, "vram": 50_000}
    (first,) = ask({"name": "org/m-GGUF", "room": memory})
    assert first["files"] == ["m-Q8_0.gguf"] and first["missing"] == 0
    assert first["why"].startswith(
        "took m-Q8_0.gguf (83.0 KiB) of 4 GGUF files: the best that fits 107.4 KiB of memory"
    )
    assert hub.downloads() == ["m-Q8_0.gguf"]
    assert {name for name, _, _ in hub.sent} == {"m-Q8_0.gguf"} and sum(count for *_, count in hub.sent) == 85_000
    # Another day there is more memory: the name still means the same file, with the Hub and without it.
    again, named = ask({"name": "org/m-GGUF", "room": {"ram": 1 << 40}}, {"name": "org/m-GGUF:m-Q4_K_M.gguf"})
    assert again["files"] == first["files"] and "it is here already" in again["why"]
    assert named["files"] == ["m-Q4_K_M.gguf"] and named["why"] == ""
    before = len(hub.requests)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        (offline,) = ask({"name": "org/m-GGUF", "room": memory}, **environment)
        assert offline.get("files") == first["files"], offline
    assert hub.downloads() == ["m-Q8_0.gguf", "m-Q4_K_M.gguf"] and len(hub.requests) == before


def test_a_gguf_file_where_the_disk_has_no_room_for_more(hub: hub_server.Hub, ask: Callable[..., Any]) -> None:
    config = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
    hub.repositories["org/both"] = {
        "config.json": config, "tokenizer.json": b"{}", "model.safetensors": b"s" * 160_000,
        "pytorch_model.bin": b"b" * 160_000, "m-Q8_0.gguf": b"8" * 85_000, "m-Q4_K_M.gguf": b"4" * 49_000,
    }  # fmt: skip
    call = {"name": "org/both", "free": small(100_000)}
    tight, packed = ask(call, {**call, "compression": "4bit"})
    assert tight["files"] == ["m-Q4_K_M.gguf"] and "the safetensors files need 156.2 KiB more on disk" in tight["why"]
    assert packed["files"] == ["model.safetensors"], "compressed on the way, it needs less"
    assert sorted(hub.downloads()) == ["config.json", "m-Q4_K_M.gguf", "model.safetensors", "tokenizer.json"]
    (roomy,) = ask({"name": "org/both"})
    assert roomy["files"] == ["model.safetensors"] and "before bin and GGUF" in roomy["why"]


# ---- the header of a file on the Hub ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a header of some 40 KB and weights of 2 MiB."""
    path = tmp_path_factory.mktemp("gguf") / "m-F32.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    fields = {"block_count": 2, "context_length": 64, "embedding_length": 512, "feed_forward_length": 96,
              "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 64}  # fmt: skip
    for key, value in fields.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" + "x" * 600 for number in range(64)])
    writer.add_token_merges(["a b", "ab b"])
    for name, rows in (("token_embd.weight", 512), ("output.weight", 512)):
        writer.add_tensor(name, np.ones((rows, 512), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_config_of_a_file_on_the_hub_costs_its_header(
    hub: hub_server.Hub, ask: Callable[..., Any], llama: Path
) -> None:
    whole = llama.read_bytes()
    hub.repositories["org/m-GGUF"] = {"m-F32.gguf": whole, "README.md": b""}
    call = {"name": "org/m-GGUF:m-F32.gguf"}
    planned, again, loaded, cached = ask({**call, "weights": False}, {**call, "weights": False}, call,
                                         {**call, "weights": False})  # fmt: skip
    local = read_config(resolve(llama, OPTIONS))
    for config in (planned["config"], again["config"], local):
        config.pop("_name_or_path")
    assert planned["config"] == json.loads(json.dumps(local)) and planned["config"]["hidden_size"] == 512
    assert planned["files"] == [] and planned["wanted"] == ["m-F32.gguf"]
    assert planned["missing"] == planned["nbytes"] == len(whole)
    length, on_disk = planned["header"]
    assert length == len(whole) and on_disk < len(whole) / 2, "the rest is a hole"
    assert again == planned
    ranged = [count for _, _, count in hub.sent[:-1]]
    assert ranged == [1 << 14, 1 << 14, 1 << 15], "asked once in a process, and not much more than the header"
    assert loaded["files"] == ["m-F32.gguf"] and loaded["print"] == planned["print"] and loaded["header"] is None
    assert cached == loaded, "here, it is planned from the file itself"


def test_a_header_that_cannot_be_had(hub: hub_server.Hub, ask: Callable[..., Any], llama: Path) -> None:
    whole = llama.read_bytes()
    config = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
    hub.repositories["org/whole"] = {"m.gguf": whole}
    hub.repositories["org/beside"] = {"m.gguf": whole, "config.json": config}
    hub.repositories["org/damaged"] = {"m.gguf": b"no GGUF" + whole[7:]}
    hub.repositories["org/flux"] = {"m.gguf": whole.replace(b"llama", b"fluxx")}
    hub.repositories["org/gated"] = {"m.gguf": whole}
    hub.without_ranges.update({"org/whole", "org/beside"})
    hub.gated.add("org/gated")
    names = ("whole", "beside", "damaged", "flux", "gated")
    whole_only, beside, damaged, flux, gated = ask(*[{"name": f"org/{name}", "weights": False} for name in names])
    assert "the config of a GGUF model is inside the weight file, and the server sends whole" in whole_only["text"]
    assert beside["header"] is None and beside["missing"] == len(whole)
    assert damaged["text"].startswith("org/damaged:m.gguf is not a GGUF file")
    assert flux["error"] == "UnsupportedModelError" and flux["text"].startswith("org/flux:m.gguf: GGUF architecture")
    assert gated["error"] == "SourceError" and "accept its licence" in gated["text"]


def test_a_split_model_on_the_hub(hub: hub_server.Hub, ask: Callable[..., Any], tmp_path: Path) -> None:
    """Planned from the headers of all parts; what scales its RoPE is a tensor, and belongs to its config."""
    tensors = {f"blk.0.ffn_{name}.weight": (64, 256) for name in ("gate", "up", "down")}
    fields = {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 256,
              "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4}  # fmt: skip
    tensors = {"token_embd.weight": (64, 64), "rope_freqs.weight": (8,), **tensors, "output.weight": (64, 64)}
    write(tmp_path / "m-F16.gguf", "llama", fields, tensors, kind="F32", limit=2)
    parts = sorted(tmp_path.iterdir())
    names, whole = [f"f16/{part.name}" for part in parts], sum(part.stat().st_size for part in parts)
    assert len(parts) == 3
    hub.repositories["org/m-GGUF"] = {name: part.read_bytes() for name, part in zip(names, parts, strict=True)}
    hub.repositories["org/m-GGUF"] |= {"m-Q4_0.gguf": b"4" * 900, "README.md": b""}
    hub.repositories["org/lost"] = {names[0]: parts[0].read_bytes(), names[2]: parts[2].read_bytes()}
    planned, first, loaded, lost = ask(
        {"name": "org/m-GGUF:f16/m-F16.gguf", "weights": False}, {"name": f"org/m-GGUF:{names[1]}", "weights": False},
        {"name": "org/m-GGUF", "room": {"ram": GiB}}, {"name": "org/lost"},
    )  # fmt: skip
    local = read_config(resolve(parts[0], OPTIONS))
    assert planned["config"]["rope_parameters"] == local["rope_parameters"] == first["config"]["rope_parameters"]
    assert local["rope_parameters"]["rope_type"] == "longrope" and local["tie_word_embeddings"] is False
    assert planned["config"]["tie_word_embeddings"] is False
    assert planned["wanted"] == first["wanted"] == names and planned["nbytes"] == planned["missing"] == whole
    assert loaded["files"] == [part.name for part in parts] and loaded["nbytes"] == whole
    assert set(hub.downloads()) == set(loaded["files"]), "and nothing else"
    assert f"{names[0]} is one of 3 parts, of which {names[1]} is missing (1 in all)" in lost["text"]
    for name in ("org/m-GGUF", "org/m-GGUF:f16/m-F16.gguf", f"org/m-GGUF:{names[2]}"):
        (offline,) = ask({"name": name, "room": {"ram": GiB}}, HF_HUB_OFFLINE="1")
        assert offline.get("files") == loaded["files"], offline
