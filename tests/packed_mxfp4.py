"""A tiny gpt-oss whose experts are random MXFP4, and the model that transformers dequantises from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from packed_gptq import copy_settings
from safetensors.torch import save_file


def make(folder: Path, tokenizer: Path, *, hidden_size: int = 64, experts: int = 4, seed: int = 0) -> Path:
    """Tensors as in openai/gpt-oss-20b; every byte is a valid block, and scales are near those of real weights."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=260, hidden_size=hidden_size, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=experts, num_experts_per_tok=2, sliding_window=8,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    copy_settings(tokenizer, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = {name: value.bfloat16() for name, value in GptOssForCausalLM(config).state_dict().items()}
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            count, rows, columns = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = torch.randint(256, (count, columns, rows // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 122, (count, columns, rows // 32), dtype=torch.uint8)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    described = config.to_dict() | {"dtype": "bfloat16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(described | {"architectures": ["GptOssForCausalLM"]}), "utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reference(folder: Path) -> Any:
    """The dequantised model: float32, on the CPU."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    settings = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    return model.float().eval()
