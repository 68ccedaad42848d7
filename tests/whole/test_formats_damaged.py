"""Encoded checkpoints that lost a part or say nonsense: one line that names the thing, never a wrong answer."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import packed_awq
import packed_bnb
import packed_fp8
import packed_gptq
import packed_mxfp4
import pytest
import torch
from gguf_files import tiny_llama_gguf, write
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from airllm_nb import AutoModel
from airllm_nb.checkpoint.gguf import in_place as gguf_packed
from airllm_nb.checkpoint.gguf import weights as gguf
from airllm_nb.checkpoint.gguf.header import read_gguf
from airllm_nb.checkpoint.source import Source, read_config
from airllm_nb.config import LoadOptions
from airllm_nb.encoding import formats
from airllm_nb.errors import AirLLMError, CheckpointError
from airllm_nb.intake.containers.gguf import sorted_weights
from airllm_nb.intake.find.resolve import resolve
from airllm_nb.intake.native import native_weights
from airllm_nb.tensors.index import CheckpointIndex, Extent, TensorInfo, read_index

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 9, 3, 40]])

MAKERS: dict[str, Callable[[Path, Path], Path]] = {
    "fp8": lambda folder, _: packed_fp8.make(folder),
    "fp8-experts": lambda folder, _: packed_fp8.make(folder, "qwen3_moe"),
    "compressed": lambda folder, _: packed_fp8.make_compressed(folder, "block"),
    "nf4": lambda folder, _: packed_bnb.make(folder),
    "int8": lambda folder, _: packed_bnb.make(folder, kind="int8"),
    "gptq": lambda folder, source: packed_gptq.make(folder / "gptq", source, desc_act=True),
    "awq": lambda folder, source: packed_awq.make(folder / "awq", source),
    "mxfp4": lambda folder, source: packed_mxfp4.make(folder / "mxfp4", source),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Callable[[str], Path]:
    """Format → a checkpoint, made once: copy it before you change it."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = MAKERS[name](tmp_path_factory.mktemp(name), tiny_llama())
        return folders[name]

    return get


def without(folder: Path, target: Path, ending: str) -> Path:
    """The checkpoint without the first of its tensors of that ending."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    del tensors[min(name for name in tensors if name.endswith(ending))]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


# ---- a lost part -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ending", "words"),
    [
        ("fp8", "down_proj.weight_scale_inv", r"layers\.0\.mlp\.down_proj\.weight is quantised \(F8_E4M3\)"),
        ("fp8-experts", "experts.1.up_proj.weight_scale_inv", r"experts\..* is quantised \(F8_E4M3\)"),
        ("compressed", "q_proj.weight_scale", r"q_proj\.weight is quantised \(F8_E4M3\)"),
        ("int8", "o_proj.SCB", r"o_proj\.weight is quantised \(I8\)"),
        ("nf4", "bitsandbytes__nf4", r"weight is quantised \(U8\)"),
        ("gptq", "down_proj.g_idx", r"down_proj\.g_idx is missing"),
    ],
)
def test_a_lost_part_is_noticed(
    made: Callable[[str], Path], tmp_path: Path, name: str, ending: str, words: str
) -> None:
    folder = without(made(name), tmp_path / "lost", ending)
    with pytest.raises(CheckpointError, match=words):
        AutoModel.from_pretrained(folder, dtype="float32")
    with AutoModel.from_pretrained(made(name), dtype="float32") as model:
        assert model(IDS).logits.isfinite().all()


def source_of(path: Path) -> Source:
    return resolve(path, LoadOptions())


def skeleton_of(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def elsewhere(index: CheckpointIndex) -> dict[str, TensorInfo]:
    """As from the headers of files that are not downloaded."""
    return {
        name: replace(info, extents=tuple(replace(extent, path=Path("not-here")) for extent in info.extents))
        for name, info in index.items()
    }


@pytest.mark.parametrize("name", ["fp8-experts", "int8"])
def test_a_lost_scale_is_noticed_from_headers_alone(made: Callable[[str], Path], name: str) -> None:
    folder = made(name)
    source, index, skeleton = source_of(folder), elsewhere(read_index(folder)), skeleton_of(folder)
    assert native_weights(index, read_config(source), source, skeleton)[1]
    del index[max(name for name in index if name.endswith(("scale_inv", "SCB")))]
    with pytest.raises(CheckpointError, match="has no scale beside it"):
        native_weights(index, read_config(source), source, skeleton)


def test_integers_that_belong_there_are_left_alone(made: Callable[[str], Path]) -> None:
    """A table of the model's own, and packed weights that the model has no use for."""
    folder, table = made("fp8"), "model.layers.0.mlp.table"
    source, index, skeleton = source_of(folder), dict(read_index(folder)), skeleton_of(folder)
    skeleton.get_submodule("model.layers.0.mlp").register_buffer("table", torch.zeros(4, dtype=torch.int32))
    whole = native_weights(index, read_config(source), source, skeleton)
    at = (Extent(folder / "model.safetensors", 0, 16),)
    index[table] = TensorInfo(table, "I32", (4,), at)
    index["vision.proj.weight"] = TensorInfo("vision.proj.weight", "F8_E4M3", (4, 4), at)
    plain, packed = native_weights(index, read_config(source), source, skeleton)
    assert plain.keys() == whole[0].keys() | {table}
    assert packed.keys() == whole[1].keys()


# ---- nonsense in a config --------------------------------------------------------------------------------------------

JUNK: tuple[Any, ...] = (None, 0, -1, 3, 4.0, "x", "", [], [1], [16, 16, 16], {}, {"a": 1}, True, math.inf, "128x²")
KEYS = (
    "dynamic", "config_groups", "sparsity_config", "weight_block_size", "transform_config", "format", "pack_dtype",
    "checkpoint_format", "bits", "group_size", "desc_act", "version", "backend", "load_in_4bit", "bnb_4bit_quant_type",
    "expert_dtype", "fmt", "modules_to_not_convert",
)  # fmt: skip


def _nonsense(settings: dict[str, Any]) -> Any:
    for key, value in itertools.product(dict.fromkeys((*settings, *KEYS)), JUNK):
        yield {**settings, key: value}
    groups = settings.get("config_groups", {"group_0": {"weights": {"num_bits": 8, "type": "float"}}})
    for key, value in itertools.product(("", "weights", "format", *groups["group_0"]["weights"], "block"), JUNK):
        changed = copy.deepcopy(groups)
        group = changed["group_0"]
        if not key:
            changed["group_0"] = value
        else:
            (group if key in ("weights", "format") else group["weights"])[key] = value
        yield {**settings, "config_groups": changed}
    for key, value in itertools.product(("bits", "desc_act"), JUNK):
        yield {**settings, "dynamic": {"+:.*": {key: value}}}


@pytest.mark.parametrize("name", MAKERS)
def test_nonsense_in_a_config_is_read_or_refused(made: Callable[[str], Path], name: str) -> None:
    config = json.loads((made(name) / "config.json").read_text("utf-8"))
    index, outcomes = read_index(made(name)), set()
    wanted, method = formats.find(config, index, {})[1].keys(), config["quantization_config"]["quant_method"]
    for settings in _nonsense(config["quantization_config"]):
        changed = {**config, "quantization_config": settings}
        try:
            formats.check(changed, "a model")
            found = formats.find(changed, index, {})[1]
        except AirLLMError as error:
            outcomes.add(type(error))
        else:
            outcomes.add(None)
            assert found.keys() == wanted or settings["quant_method"] != method
    assert None in outcomes
    assert len(outcomes) > 1


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_gguf_matrix_that_lacks_a_row_is_refused(tmp_path: Path) -> None:
    path = _llama_with(tmp_path / "tiny.gguf", {"blk.0.attn_q.weight": (63, 64)})
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight \[63, 64\]"):
        AutoModel.from_pretrained(path, dtype="float32", layer_shards_saving_path=tmp_path / "shards")


def _llama_with(path: Path, other: dict[str, tuple[int, ...]]) -> Path:
    """A tiny Llama, some of its tensors of other shapes."""
    whole = read_gguf(tiny_llama_gguf(path))
    shapes = {name: tensor.shape for name, tensor in whole.tensors.items()}
    fields = {key.removeprefix("llama."): value for key, value in whole.metadata.items() if key.startswith("llama.")}
    path.unlink()
    return write(path, "llama", fields, shapes | other)


def test_a_rule_that_computes_warns_of_nothing(tmp_path: Path) -> None:
    """Mamba's ``A`` is stored as its negative exponential: its logarithm is taken of row numbers, 0 among them."""
    path = _mamba(tmp_path / "tiny.gguf")
    file = read_gguf(path)
    found = gguf.GGUFWeights(file, gguf.gguf_config(file), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sorted_out = gguf_packed.in_place(found)
    assert any(name.endswith("A_log") for name in sorted_out.rest)
    assert sorted_out.packed


def _mamba(path: Path) -> Path:
    fields = {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "ssm.conv_kernel": 4, "ssm.inner_size": 128,
        "ssm.state_size": 16, "ssm.time_step_rank": 4, "vocab_size": 64, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (64, 64), "output_norm.weight": (64,), "output.weight": (64, 64),
    }  # fmt: skip
    for layer, (name, shape) in itertools.product(range(2), {
        "attn_norm.weight": (64,), "ssm_in.weight": (256, 64), "ssm_conv1d.weight": (128, 4), "ssm_conv1d.bias": (128,),
        "ssm_x.weight": (36, 128), "ssm_dt.weight": (128, 4), "ssm_dt.bias": (128,), "ssm_a": (128, 16),
        "ssm_d": (128,), "ssm_out.weight": (64, 128),
    }.items()):  # fmt: skip
        tensors[f"blk.{layer}.{name}"] = shape
    return write(path, "mamba", fields, tensors, kind=lambda name: "F32" if tensors[name][-1] % 32 else "Q8_0")


def test_a_gguf_file_is_sorted_once(tmp_path: Path) -> None:
    path = tiny_llama_gguf(tmp_path / "tiny.gguf")
    first = sorted_weights(path, "float32")
    assert sorted_weights(path, "float32") is first
    assert sorted_weights(path, "bfloat16") is not first
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert sorted_weights(path, "float32") is not first
    path.unlink()
    other = tiny_llama_gguf(path, inner=128)
    name = "model.layers.0.mlp.up_proj.weight"
    assert sorted_weights(other, "float32").packed[name].shape == (128, 64)
