"""Tiny FP8 checkpoints: in blocks by transformers' own conversion, or as compressed-tensors lays them out.

Blocks of other sizes than 128 × 128 keep the models tiny; nothing in the format depends on their size.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 260, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# What the published checkpoints leave as it is.
KEPT = ("embed_tokens", "lm_head", "mlp.gate.", "norm", "eh_proj")
GREATEST = torch.finfo(torch.float8_e4m3fn).max


def plain(folder: Path, model_type: str = "llama", seed: int = 0, **config: Any) -> Path:
    """A random float32 model, not quantised: ``"llama"``, ``"qwen3_moe"`` or ``"deepseek_v3"``."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, Qwen3MoeConfig

    if model_type == "deepseek_v3":
        extra = {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                 "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "q_lora_rank": 32,
                 "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}  # fmt: skip
        made: Any = DeepseekV3Config(**SIZES | extra | config)
    elif model_type == "qwen3_moe":
        extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        made = Qwen3MoeConfig(**SIZES | extra | config)
    else:
        made = LlamaConfig(**SIZES | config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


def make(
    folder: Path, model_type: str = "llama", block: tuple[int, int] | None = (16, 32), scales: str = "float",
    static: bool = False, **config: Any,
) -> Path:  # fmt: skip
    """The layout of DeepSeek-V3 and Qwen3: ``weight_scale_inv`` for each block; for each matrix without ``block``.

    ``scales`` is ``"float"``, ``"ue8m0"`` (powers of two of a dtype of their own) or ``"bytes"`` (the same as U8).
    ``static`` adds scales of activations. Where a matrix is no whole number of blocks the last ones are smaller.
    """
    tensors = load_file(plain(folder / "plain", model_type, **config) / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") or "kv_a_proj" in name]:
        if any(kept in name for kept in KEPT):
            continue
        weight, scale = quantised(tensors[name], block, "float" if scales == "float" else "ue8m0")
        if scales == "bytes":
            scale = scale.view(torch.uint8)
        tensors[name], tensors[f"{name}_scale_inv"] = weight, scale if block else scale.view(())
        if static:
            tensors[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.02)
    settings = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": list(block) if block else None, "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    if scales != "float":
        settings["scale_fmt"] = "ue8m0"
    return _written(folder, "fp8", tensors, settings)


def quantised(
    weight: torch.Tensor, block: tuple[int, int] | None, scales: str = "float"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, or a stack of them, and its scales by transformers' own conversion, which only takes whole blocks."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    if weight.ndim == 3:
        weights, stacked = zip(*(quantised(matrix, block, scales) for matrix in weight), strict=True)
        return torch.stack(weights), torch.stack(stacked)
    options = {} if scales == "float" else {"scale_fmt": scales}
    settings = FineGrainedFP8Config(weight_block_size=block, **options)
    rows, columns = weight.shape
    height, width = block or weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    result = Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert({"x.weight": padded})
    return result["x.weight"][:rows, :columns].contiguous(), result["x.weight_scale_inv"]


def make_compressed(folder: Path, strategy: str = "channel", **config: Any) -> Path:
    """The layout of compressed-tensors: ``weight_scale`` for each row (``"channel"``), ``"tensor"`` or ``"block"``."""
    block = (16, 32)
    tensors = load_file(plain(folder / "plain", **config) / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        if strategy == "block":
            tensors[name], tensors[f"{name}_scale"] = quantised(weight, block)
            continue
        scale = weight.abs().amax(1, keepdim=True) / GREATEST  # [rows, 1]
        if strategy == "tensor":
            scale = scale.amax().view(1)
            tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor([0.02])
        scale = scale.bfloat16()
        tensors[name], tensors[f"{name}_scale"] = (weight / scale.float()).to(torch.float8_e4m3fn), scale
    settings = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": None, "config_groups": {"group_0": {
            "targets": ["Linear"], "output_activations": None,
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True,
                                  "symmetric": True},
            "weights": {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False,
                        "block_structure": list(block) if strategy == "block" else None},
        }},
    }  # fmt: skip
    return _written(folder, "compressed", tensors, settings)


def _written(folder: Path, name: str, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    target = folder / name
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "plain" / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), "utf-8")
    return target


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """Every FP8 weight in float32 by the definition: each value by the scale of the block that it lies in."""
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    groups = settings.get("config_groups", {}).get("group_0", {}).get("weights", {})
    found = {}
    for name, weight in tensors.items():
        if weight.dtype != torch.float8_e4m3fn:
            continue
        scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{name}_scale"))
        assert scale is not None
        values = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
        height, width = settings.get("weight_block_size") or groups.get("block_structure") or (1, weight.shape[-1])
        if values.numel() > 1:
            values = values.repeat_interleave(height, -2)[..., : weight.shape[-2], :]
            values = values.repeat_interleave(width, -1)[..., : weight.shape[-1]]
        found[name] = weight.float() * values
    assert found
    return found


def reference(folder: Path) -> Any:
    """The model that the checkpoint stands for, in float32: loaded and dequantised by transformers.

    Where blocks do not divide a matrix, and for compressed-tensors (which needs its own package), transformers loads
    the weights that :func:`dequantised` gives.
    """
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    settings = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    weights, block = dequantised(folder), settings.get("weight_block_size") or (1, 1)
    divides = all(weight.shape[0] % block[0] == 0 == weight.shape[1] % block[1] for weight in weights.values())
    if settings["quant_method"] == "fp8" and divides:
        loading = FineGrainedFP8Config(weight_block_size=settings["weight_block_size"], dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=loading, dtype=torch.float32, device_map="cpu"
        )
        return model.eval()
    source, target = folder.parent / "plain", folder / "dequantised"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(
        load_file(source / "model.safetensors") | weights, target / "model.safetensors", metadata={"format": "pt"}
    )
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
