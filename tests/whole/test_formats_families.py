"""Packed weights in architectures that read them in ways of their own: a dtype looked at, a product without a call."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import packed_fp8
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import run, streamed
from torch import nn

from airllm_nb import AutoModel
from airllm_nb.model import skeleton

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = (16, 32)
# Matrices of their own, or one stack of all.
EXPERT = re.compile(r"\.experts\.(\d+\.)?\w+(\.weight)?$(?<!bias)")
FAMILIES = (
    "bloom", "deepseek_v2", "deepseek_v3", "deepseek_v32", "falcon", "falcon_h1", "glm4_moe", "glm_moe_dsa", "jamba",
    "llama4_text", "mamba", "mamba2", "mixtral", "olmoe", "qwen2_moe", "qwen3_next", "qwen3_vl_moe", "zamba",
    "zamba2",
)  # fmt: skip


def make(folder: Path, family: str) -> tuple[Path, Path]:
    """A tiny model in FP8, and the same dequantised: every linear layer whose name is the native one, all experts."""
    source, packed, plain = folder / "source", folder / "packed", folder / "plain"
    tiny_models.save_tiny(family, source)
    config = json.loads((source / "config.json").read_text("utf-8"))
    native = tiny_models.resident(source)
    head = native.get_output_embeddings()
    linears = {
        f"{name}.weight"
        for name, module in native.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    tensors = load_file(source / "model.safetensors")
    experts = {name for name, value in tensors.items() if EXPERT.search(name) and value.ndim > 1}
    stored, whole = dict(tensors), dict(tensors)
    for name in (linears | experts) & tensors.keys():
        stored[name], stored[f"{name}_scale_inv"] = packed_fp8.quantised(tensors[name].float(), BLOCK)
    settings = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    for target, values, more in ((packed, stored, {"quantization_config": settings}), (plain, whole, {})):
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config | more), "utf-8")
        save_file(values, target / "model.safetensors", metadata={"format": "pt"})
    assert any(name.endswith("scale_inv") for name in stored)
    save_file(whole | packed_fp8.dequantised(packed), plain / "model.safetensors", metadata={"format": "pt"})
    return packed, plain


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_the_dequantised_model_says(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = make(tmp_path, family)
    tokens, logits = run(tiny_models.resident(plain))
    monkeypatch.setattr(skeleton.cut_units, "__defaults__", (12_000,))
    ways: dict[str, Any] = {
        "kept": lambda: AutoModel.from_pretrained(packed, dtype="float32"),
        "unpacked each time": lambda: AutoModel.from_pretrained(packed, dtype="float32", ram_budget="1MiB"),
        "streamed": lambda: streamed(packed),
    }
    for way, open_it in ways.items():
        with open_it() as model:
            ours_tokens, ours = run(model)
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item(), msg=way)
        assert torch.equal(ours_tokens, tokens), way
