"""Packed checkpoints whose config.json does not say how: what lies beside it is believed, the rest is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_awq
import packed_bnb
import packed_fp8
import packed_gptq
import packed_mxfp4
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import resident, run

from airllm_nb import AutoModel, LoadOptions, convert_model
from airllm_nb.engine.facade import plan_model
from airllm_nb.errors import OptionError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")

MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.27.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
}
AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
AUTOGPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": True, "sym": False, "true_sequential": True,
            "model_name_or_path": None}  # fmt: skip


def rewritten(
    folder: Path, target: Path, change: Callable[[str], str] = str, settings: dict[str, Any] | None = None
) -> Path:
    """A copy whose config says ``settings`` of the quantisation, or nothing, its tensors renamed by ``change``."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    config |= {"quantization_config": settings} if settings else {}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = {change(name): value for name, value in load_file(target / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_equal(folder: Path, reference: Any, packed_as: str) -> None:
    tokens, logits = run(reference)
    with AutoModel.from_pretrained(folder, dtype="float32") as model:
        assert model.status()["compression"] == packed_as
        ours_tokens, ours = run(model)
    assert ((ours - logits).abs().max() / logits.abs().max()).item() <= 1e-4
    assert torch.equal(ours_tokens, tokens)


# ---- what lies beside it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["hf_quant_config.json", "config.json"])
def test_fp8_of_modelopt(tmp_path: Path, where: str) -> None:
    """A scale a matrix, under the names that compressed-tensors has too."""
    made = packed_fp8.make_compressed(tmp_path, "tensor")
    assert {"weight_scale", "input_scale"} < {name.rpartition(".")[2] for name in load_file(made / "model.safetensors")}
    in_config = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    folder = rewritten(made, tmp_path / "modelopt", settings=in_config if where == "config.json" else None)
    if where != "config.json":
        (folder / where).write_text(json.dumps(MODELOPT), "utf-8")
    assert_equal(folder, packed_fp8.reference(made), "modelopt: fp8")


@pytest.mark.parametrize(
    ("file", "settings", "packed_as"),
    [
        ("quantize_config.json", AUTOGPTQ, "gptq: 4-bit"),
        ("quant_config.json", AWQ, "awq: 4-bit"),
        ("quantize_config.json", AWQ, "awq: 4-bit"),
    ],
)
def test_the_file_of_an_older_program(
    tmp_path: Path, tiny_llama: Callable[..., Path], file: str, settings: dict[str, Any], packed_as: str
) -> None:
    if settings is AWQ:
        made, maker = packed_awq.make(tmp_path / "made", tiny_llama()), packed_awq
    else:
        made, maker = packed_gptq.make(tmp_path / "made", tiny_llama(), desc_act=True, sym=False), packed_gptq
    folder = rewritten(made, tmp_path / "old")
    (folder / file).write_text(json.dumps(settings), "utf-8")
    assert_equal(folder, maker.reference(made), packed_as)
    assert plan_model(folder).fit.compression == packed_as
    with pytest.raises(OptionError, match="packed already"):
        AutoModel.from_pretrained(folder, compression="4bit")


def test_it_is_refused_as_a_config_would_be(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    folder = rewritten(packed_awq.make(tmp_path / "made", tiny_llama()), tmp_path / "old")
    (folder / "quant_config.json").write_text(json.dumps(AWQ | {"version": "GEMV"}), "utf-8")
    with pytest.raises(UnsupportedModelError, match="version 'gemv'"):
        AutoModel.from_pretrained(folder)
    folder = rewritten(packed_fp8.make(tmp_path), tmp_path / "nvfp4")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}), "utf-8")
    with pytest.raises(UnsupportedModelError, match=r"modelopt .* quant_algo 'NVFP4' is not one of FP8"):
        AutoModel.from_pretrained(folder)


def test_one_that_was_left_over_is_left_aside(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_llama(), folder)
    (folder / "quantize_config.json").write_text(json.dumps(AUTOGPTQ), "utf-8")
    assert_equal(folder, resident(folder), None)
    with AutoModel.from_pretrained(folder, compression="4bit", layer_shards_saving_path=tmp_path / "shards") as model:
        assert model.status()["compression"] == "4bit"


# ---- what nothing says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(16, 32), None])
def test_fp8_with_scales_that_nothing_explains(tmp_path: Path, block: tuple[int, int] | None) -> None:
    folder = rewritten(packed_fp8.make(tmp_path, block=block), tmp_path / "unsaid")
    words = r"_proj\.weight is quantised \(F8_E4M3\) with \S+_proj\.weight_scale_inv beside it.* quantization_config"
    with pytest.raises(UnsupportedModelError, match=words):
        AutoModel.from_pretrained(folder, dtype="float32")
    with pytest.raises(UnsupportedModelError, match=words):
        AutoModel.from_pretrained(folder, compression="4bit", layer_shards_saving_path=tmp_path / "shards")
    with pytest.raises(UnsupportedModelError, match=words):
        plan_model(folder)


def test_fp8_experts_with_scales_that_nothing_explains(tmp_path: Path) -> None:
    folder = rewritten(packed_fp8.make(tmp_path, "qwen3_moe"), tmp_path / "unsaid")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".experts." in name or "scale" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"experts\.\d\.\w+\.weight is quantised \(F8_E4M3\) with"):
        AutoModel.from_pretrained(folder, dtype="float32")


def test_fp8_without_scales_is_what_transformers_takes_it_for(
    tmp_path: Path, tiny_llama: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that were only cast."""
    folder = tmp_path / "cast"
    shutil.copytree(tiny_llama(), folder)
    for file in folder.glob("*.safetensors"):
        tensors = {name: value.to(torch.float8_e4m3fn) if "_proj" in name else value
                   for name, value in load_file(file).items()}  # fmt: skip
        save_file(tensors, file, metadata={"format": "pt"})
    caplog.set_level(logging.WARNING, "airllm_nb")
    assert_equal(folder, resident(folder), None)
    assert "cast: weights are FP8 without any scale (model.layers.0." in caplog.text


NO_CONFIG: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "gptq": (lambda folder, source: packed_gptq.make(folder, source), r"\.qweight is packed \(GPTQ or AWQ\)"),
    "nf4": (lambda folder, _: packed_bnb.make(folder), r"absmax is packed \(bitsandbytes\)"),
    "mxfp4": (lambda folder, source: packed_mxfp4.make(folder, source), r"_blocks is packed \(MXFP4\)"),
}


@pytest.mark.parametrize("name", NO_CONFIG)
def test_what_looks_packed_is_no_missing_shard(tmp_path: Path, tiny_llama: Callable[..., Path], name: str) -> None:
    make, words = NO_CONFIG[name]
    folder = rewritten(make(tmp_path / "made", tiny_llama()), tmp_path / "unsaid")
    with pytest.raises(UnsupportedModelError, match=words + r".*no quantization_config in config\.json"):
        AutoModel.from_pretrained(folder, dtype="float32")


def test_packed_experts_under_names_that_the_model_does_not_have(tmp_path: Path) -> None:
    """As bitsandbytes' gpt-oss has them: one list of matrices in the place of a stack."""
    made = packed_bnb.make_mixture(tmp_path)

    def change(name: str) -> str:
        for old, new in (("w1", "gate_up_projs.\\1"), ("w2", "down_projs.\\1"), ("w3", "gate_up_projs.1\\1")):
            name = re.sub(rf"block_sparse_moe\.experts\.(\d)\.{old}", rf"mlp.experts.{new}", name)
        return name

    settings = json.loads((made / "config.json").read_text("utf-8"))["quantization_config"]
    folder = rewritten(made, tmp_path / "listed", change, settings)
    words = r"layers\.\d\.mlp\.experts\.\w+_projs\.\d\.weight is packed \(nf4\) in a place that MixtralForCausalLM"
    with pytest.raises(UnsupportedModelError, match=words):
        AutoModel.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_leftover_beside_plain_weights_stops_no_compression(
    tiny_llama: Callable[..., Path], tmp_path: Path, suffix: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama(), tmp_path / "model"))
    (folder / "quantize_config.json").write_text(json.dumps(AUTOGPTQ), "utf-8")
    if suffix == ".bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    options = LoadOptions.create(compression="8bit", layer_shards_saving_path=tmp_path / "shards", device="cpu")
    assert (convert_model(folder, options) / "config.json").is_file()
