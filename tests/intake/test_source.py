"""A model's name → local files: folders as they are found in the wild, and a Hub that runs on this machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest

from airllm_nb.checkpoint.source import Source, read_config, store_folder
from airllm_nb.config import LoadOptions
from airllm_nb.errors import CheckpointError, SourceError, UnsupportedModelError
from airllm_nb.intake.find.resolve import resolve

OPTIONS = LoadOptions()
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def fill(folder: Path, **files: str | bytes) -> Path:
    """``fill(path, **{"config.json": CONFIG})``"""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def index_of(*shards: str) -> str:
    return json.dumps({"weight_map": {f"tensor{number}": shard for number, shard in enumerate(shards)}})


# ---- local folders ---------------------------------------------------------------------------------------------------


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    fill(tmp_path / "m", **{"config.json": CONFIG, "model.safetensors": "s" * 10, "pytorch_model.bin": "b"})
    source = resolve(tmp_path / "m", OPTIONS)
    assert (source.format, source.files, source.nbytes) == (
        "safetensors", (tmp_path / "m" / "model.safetensors",), 10)  # fmt: skip
    assert source.name == "m" and source.repo_id is None and read_config(source)["model_type"] == "llama"


def test_shards_come_from_the_index(tmp_path: Path) -> None:
    folder = fill(tmp_path, **{
        "config.json": CONFIG, "model.safetensors.index.json": index_of("b.safetensors", "a.safetensors"),
        "a.safetensors": "aa", "b.safetensors": "bb", "consolidated.safetensors": "other",
    })  # fmt: skip
    assert [path.name for path in resolve(folder, OPTIONS).files] == ["a.safetensors", "b.safetensors"]
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard b\.safetensors .* missing"):
        resolve(folder, OPTIONS)


def test_bin_shards(tmp_path: Path) -> None:
    fill(tmp_path, **{"config.json": CONFIG, "pytorch_model.bin.index.json": index_of("x.bin"), "x.bin": "x"})
    assert resolve(tmp_path, OPTIONS).format == "bin"


@pytest.mark.parametrize("weight_map", [["x"], {"t": "../outside.safetensors"}, {"t": 3}, {}])
def test_a_damaged_index_names_the_file(tmp_path: Path, weight_map: Any) -> None:
    index = json.dumps({"weight_map": weight_map})
    fill(tmp_path, **{"config.json": CONFIG, "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged"):
        resolve(tmp_path, OPTIONS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "no weights"),
        (["model.safetensors"], r"no config\.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter.*load its base model with --adapter /"),
        (["params.json", "consolidated.00.pth"], "original consolidated weights"),
        (["config.json", "consolidated.safetensors"], "original consolidated weights"),
        (["config.json", "tf_model.h5"], "weights of TensorFlow only"),
        (["config.json", "flax_model.msgpack"], "weights of Flax only"),
        (["config.json", "model.onnx", "model.onnx_data"], "weights of ONNX only"),
        (["config.json", "openvino_model.xml", "openvino_model.bin"], "weights of OpenVINO only"),
        (["config.json", "rank0.engine"], "TensorRT-LLM engines"),
        (["config.json", "weights.npz"], "weights of MLX only"),
        (["model.mlmodel"], "weights of CoreML only"),
        (["Some.llamafile"], "a llamafile; use the GGUF version"),
        (["ggml-model-q4_0.bin"], "GGML files.*use a GGUF version"),
        (["RWKV-4.pth"], r"layout of their own \(\.pth"),
        (["last.ckpt"], r"layout of their own"),
        (["config.json", "optimizer.pt"], "no weights"),
        (["train.parquet", "test.jsonl"], "a data set, not a model"),
        (["model_index.json"], "diffusers pipeline"),
        (["mmproj-model-f16.gguf"], r"only a vision part \(mmproj\)"),
        (["imatrix.gguf"], "only an importance matrix"),
        (["a.gguf", "b.gguf"], r"2 GGUF files; name one of them, as /.*:a\.gguf .*a\.gguf, b\.gguf"),
        (["a-00001-of-00002.gguf"], r"one of 2 parts, of which a-00002-of-00002\.gguf is missing"),
        ([], r"no config\.json"),
    ],
)
def test_a_folder_that_is_no_checkpoint_says_what_it_is(tmp_path: Path, files: list[str], message: str) -> None:
    fill(tmp_path, **dict.fromkeys(files, CONFIG))
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(tmp_path, OPTIONS)
    assert "\n" not in str(caught.value)


def test_an_adapter_names_its_base_model(tmp_path: Path) -> None:
    fill(tmp_path, **{"adapter_config.json": '{"base_model_name_or_path": "org/base"}', "adapter_model.bin": ""})
    with pytest.raises(CheckpointError, match=f"load its base model org/base with --adapter {tmp_path}"):
        resolve(tmp_path, OPTIONS)


@pytest.mark.parametrize(
    ("settings", "program"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.25}}, "EXL2"),
        ({"quantization_config": {"quant_method": "gptq", "group_size": 64, "bits": 4}}, None),
        ({"quantization": {}}, None),
    ],
)
def test_what_another_program_packed_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], program: str | None
) -> None:
    fill(tmp_path, **{"config.json": json.dumps(json.loads(CONFIG) | settings), "model.safetensors": "s"})
    if program is None:
        assert resolve(tmp_path, OPTIONS, check_config=lambda _: None).format == "safetensors"
        return
    with pytest.raises(UnsupportedModelError, match=f"is packed for {program}, which cannot be streamed; load the"):
        resolve(tmp_path, OPTIONS, check_config=lambda _: None)


def test_the_folder_above_the_model_points_at_it(tmp_path: Path) -> None:
    below = fill(tmp_path / "snapshots" / "abc", **{"config.json": CONFIG, "model.safetensors": "s"})
    with pytest.raises(CheckpointError, match=f"but {below} does"):
        resolve(tmp_path, OPTIONS)


def test_git_lfs_pointers_are_recognised(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    fill(tmp_path, **{"config.json": CONFIG, "model.safetensors": pointer})
    with pytest.raises(CheckpointError, match="git lfs pull"):
        resolve(tmp_path, OPTIONS)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "model.gguf", "a/b/c/d", "~/nothing/here"])
def test_paths_that_do_not_exist(name: str) -> None:
    with pytest.raises(SourceError, match="there is no file or folder"):
        resolve(name, OPTIONS)


def test_a_web_address_is_not_a_name() -> None:
    with pytest.raises(SourceError, match="org/name"):
        resolve("https://example.org/org/name", OPTIONS)


def test_a_weight_file_is_not_a_name(tmp_path: Path) -> None:
    fill(tmp_path, **{"model.safetensors": "s"})
    with pytest.raises(SourceError, match="name the folder"):
        resolve(tmp_path / "model.safetensors", OPTIONS)


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": 3}', '{"architectures": "x"}'])
def test_a_damaged_config_is_refused(tmp_path: Path, config: str) -> None:
    fill(tmp_path, **{"config.json": config, "model.safetensors": "s"})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(resolve(tmp_path, OPTIONS))


def test_check_config_can_refuse(tmp_path: Path) -> None:
    def refuse(config: dict[str, Any]) -> None:
        raise UnsupportedModelError(config["model_type"])

    fill(tmp_path, **{"config.json": CONFIG, "model.safetensors": "s"})
    with pytest.raises(UnsupportedModelError, match="llama"):
        resolve(tmp_path, OPTIONS, check_config=refuse)


def test_gguf_by_file_relative_path_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, **{"Some Model.Q4_0.gguf": "x"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [resolve(name, OPTIONS) for name in ("Some Model.Q4_0.gguf", "~/Some Model.Q4_0.gguf", ".")]
    assert {source.gguf_file for source in found} == {tmp_path / "Some Model.Q4_0.gguf"}
    assert {(source.format, source.name) for source in found} == {("gguf", "Some-Model.Q4_0")}


def test_the_store_has_a_readable_unique_name(tmp_path: Path) -> None:
    fill(tmp_path / "m", **{"config.json": CONFIG, "model.safetensors": "s"})
    first = resolve(tmp_path / "m", OPTIONS)
    options = LoadOptions.create(layer_shards_saving_path=tmp_path / "stores")
    folder = store_folder(first, "4bit", "bfloat16", options)
    assert folder == tmp_path / "stores" / f"m--4bit--bfloat16--{first.fingerprint[:8]}"
    fill(tmp_path / "m", **{"model.safetensors": "changed"})
    assert store_folder(resolve(tmp_path / "m", OPTIONS), "4bit", "bfloat16", options) != folder
    assert store_folder(first, None, "float16", OPTIONS).name.startswith("m--none--float16--")


# ---- the Hub ---------------------------------------------------------------------------------------------------------

CALLS = """
import json, shutil, sys
from airllm_nb.checkpoint.source import read_config
from airllm_nb.config import LoadOptions
from airllm_nb.intake.find.resolve import resolve

def ask(name, weights=True, free=None, check=None, **options):
    seen = []
    def refuse(config):
        raise ValueError("refused " + config["model_type"])
    if free is not None:
        shutil.disk_usage = lambda _: type("Usage", (), {"free": free})
    try:
        found = resolve(name, LoadOptions.create(**options), weights=weights, progress=seen.append,
                        check_config=refuse if check else None)
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"files": [path.name for path in found.files], "folder": str(found.folder), "format": found.format,
            "revision": found.revision, "nbytes": found.nbytes, "name": found.name, "progress": seen[-1:],
            "gguf": str(found.gguf_file), "config": read_config(found) if found.format != "gguf" else None}

print(json.dumps([ask(**call) for call in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serve() as hub:
        hub.repositories["org/sharded"] = {
            "config.json": CONFIG.encode(),
            "tokenizer.json": b"{}",
            "tokenizer.model": b"t",
            "modeling_evil.py": b"raise SystemExit",
            "model.safetensors.index.json": index_of("m-1.safetensors", "m-2.safetensors").encode(),
            "m-1.safetensors": b"1" * 300_000,
            "m-2.safetensors": b"2" * 500_000,
            "pytorch_model.bin": b"b" * 900,
            "original/consolidated.00.pth": b"p",
            "onnx/model.onnx": b"o",
        }
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


def test_hub_downloads_what_is_needed_and_then_works_offline(hub: hub_server.Hub, ask: Callable[..., Any]) -> None:
    (planned, loaded) = ask({"name": "org/sharded", "weights": False}, {"name": "org/sharded"})
    assert planned["files"] == [] and planned["nbytes"] == 800_000 and planned["config"]["model_type"] == "llama"
    assert loaded["files"] == ["m-1.safetensors", "m-2.safetensors"] and loaded["format"] == "safetensors"
    assert loaded["revision"] == hub_server.COMMIT and loaded["name"] == "sharded"
    assert loaded["progress"] == [["download", 800_000, 800_000, "bytes", "org/sharded"]]
    assert sorted(set(hub.downloads())) == [
        "config.json", "m-1.safetensors", "m-2.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer.model",
    ]  # fmt: skip
    assert hub.downloads()[0] == "config.json"
    before = len(hub.requests)
    again, named = ask({"name": "org/sharded"}, {"name": "org/sharded", "revision": "main"}, HF_HUB_OFFLINE="1")
    assert again["files"] == named["files"] == loaded["files"] and again["folder"] == loaded["folder"]
    (local,) = ask({"name": "org/sharded", "local_files_only": True})
    assert local["files"] == loaded["files"] and len(hub.requests) == before


def test_hub_falls_back_to_the_cache_without_a_connection(hub: hub_server.Hub, ask: Callable[..., Any]) -> None:
    ask({"name": "org/sharded"})
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    cached, absent = ask({"name": "org/sharded"}, {"name": "org/other"}, **gone)
    assert cached["files"] == ["m-1.safetensors", "m-2.safetensors"]
    assert absent["error"] == "SourceError" and "cannot be reached" in absent["text"]


def test_hub_errors_are_one_line_with_the_remedy(hub: hub_server.Hub, ask: Callable[..., Any]) -> None:
    hub.repositories["meta/gated"] = hub.repositories["org/sharded"]
    hub.repositories["org/empty"] = {"config.json": CONFIG.encode(), "README.md": b""}
    hub.repositories["org/short"] = {k: v for k, v in hub.repositories["org/sharded"].items() if k != "m-2.safetensors"}
    hub.gated.add("meta/gated")
    cases = [
        ({"name": "meta/gated"}, rf"accept its licence at {hub.endpoint}/meta/gated"),
        ({"name": "meta/gated", "hf_token": "wrong"}, "HF_TOKEN"),
        ({"name": "org/typo"}, "check the spelling"),
        ({"name": "gpt-nothing"}, "check the spelling"),
        ({"name": "org/sharded", "revision": "v9"}, "no revision 'v9'"),
        ({"name": "org/other", "local_files_only": True}, "not in the local cache"),
        ({"name": "org/empty"}, "no weights"),
        ({"name": "org/short"}, "m-2.safetensors"),
        ({"name": "org/sharded", "free": 700_000}, "needs 781.2 KiB more on disk but .* has 683.6 KiB free"),
        ({"name": "org/sharded", "check": True}, "refused llama"),
    ]
    answers = ask(*[call for call, _ in cases])
    for (call, message), answer in zip(cases, answers, strict=True):
        assert "error" in answer, call
        assert "\n" not in answer["text"], call
        assert re.search(message, answer["text"]), answer["text"]
    assert not [name for name in hub.downloads() if name.startswith("m-")], "weights were downloaded before the checks"
    (granted,) = ask({"name": "meta/gated", "hf_token": "granted"})
    assert granted["files"] == ["m-1.safetensors", "m-2.safetensors"]


def test_hub_completes_a_download_that_broke_off(hub: hub_server.Hub, ask: Callable[..., Any]) -> None:
    hub.cut["m-2.safetensors"] = 100_000
    (loaded,) = ask({"name": "org/sharded"})
    if "error" in loaded:  # a library that does not retry by itself: the next load does
        (loaded,) = ask({"name": "org/sharded"})
    assert (Path(loaded["folder"]) / "m-2.safetensors").read_bytes() == b"2" * 500_000
    assert hub.downloads().count("m-1.safetensors") == 1


def test_hub_gguf_repositories(hub: hub_server.Hub, ask: Callable[..., Any]) -> None:
    hub.repositories["org/one-GGUF"] = {"README.md": b"", "model.Q4_0.gguf": b"G" * 64}
    hub.repositories["org/many-GGUF"] = {"a.gguf": b"a", "b.gguf": b"b", "q/c.gguf": b"c"}
    many, one, named, nested, slash, lost, tag = ask(
        {"name": "org/many-GGUF"}, {"name": "org/one-GGUF"}, {"name": "org/many-GGUF:b.gguf"},
        {"name": "org/many-GGUF:q/c.gguf"}, {"name": "org/many-GGUF/q/c.gguf"}, {"name": "org/many-GGUF:d.gguf"},
        {"name": "org/many-GGUF:Q4_K_M"},
    )  # fmt: skip
    assert one["gguf"].endswith("model.Q4_0.gguf") and one["format"] == "gguf"
    assert "name one of them, as org/many-GGUF:a.gguf" in many["text"] and "q/c.gguf" in many["text"]
    assert named["gguf"].endswith("b.gguf") and nested["gguf"].endswith("q/c.gguf") and nested == slash
    assert "holds no d.gguf; GGUF files there: a.gguf, b.gguf, q/c.gguf" in lost["text"]
    assert "name one as org/many-GGUF:FILE.gguf" in tag["text"]
    assert hub.downloads() == ["model.Q4_0.gguf", "b.gguf", "c.gguf"]
    before = len(hub.requests)
    offline = ask({"name": "org/one-GGUF"}, {"name": "org/many-GGUF:b.gguf"}, HF_HUB_OFFLINE="1")
    assert [found["gguf"] for found in offline] == [one["gguf"], named["gguf"]] and len(hub.requests) == before


def test_only_other_layouts_on_the_hub_are_refused_by_name(hub: hub_server.Hub, ask: Callable[..., Any]) -> None:
    cases = {
        "org/original": (["config.json", "original/consolidated.00.pth"], "original consolidated weights"),
        "org/onnx": (["config.json", "onnx/model.onnx"], "weights of ONNX only"),
        "org/coreml": (["Some.mlpackage/Data/com.apple.CoreML/model.mlmodel"], "weights of CoreML only"),
        "org/adapter": (["adapter_config.json", "adapter_model.bin"], "load its base model with --adapter org/adapter"),
        "org/parts": (["q8/m-Q8_0-00001-of-00002.gguf"], "m-Q8_0-00002-of-00002.gguf is missing"),
    }
    hub.repositories.update({name: dict.fromkeys(files, CONFIG.encode()) for name, (files, _) in cases.items()})
    mlx = json.dumps(json.loads(CONFIG) | {"quantization": {"group_size": 64, "bits": 4}}).encode()
    hub.repositories["org/mlx"] = {"config.json": mlx, "model.safetensors": b"w"}
    answers = ask(*[{"name": name} for name in cases])
    for (name, (_, message)), answer in zip(cases.items(), answers, strict=True):
        assert answer["error"] == "CheckpointError" and answer["text"].startswith(name), answer
        assert message in answer["text"] and "\n" not in answer["text"], answer
    (packed,) = ask({"name": "org/mlx", "check": True})
    assert packed["error"] == "UnsupportedModelError" and "org/mlx is packed for MLX" in packed["text"]
    assert hub.downloads() == ["config.json"], "and nothing but a config was downloaded"


def test_source_is_frozen(tmp_path: Path) -> None:
    fill(tmp_path, **{"config.json": CONFIG, "model.safetensors": "s"})
    source = resolve(tmp_path, OPTIONS)
    assert isinstance(source, Source)
    with pytest.raises(AttributeError):
        source.name = "other"  # type: ignore[misc]
