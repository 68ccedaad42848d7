"""Tiny checkpoints as bitsandbytes and transformers write them, and the models that they stand for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# No row is a whole number of blocks of 64 values.
ODD = {"hidden_size": 60, "intermediate_size": 91, "head_dim": 16}
STATE = ".quant_state.bitsandbytes__"


def plain(folder: Path, model_type: str = "llama", dtype: str = "float32", seed: int = 0, **config: Any) -> Path:
    """A random model, not quantised; ``"gpt2"`` has weights that lie transposed, ``"mixtral"`` has experts."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

    if model_type == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 260, "n_positions": 128,
                 "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
        made: Any = GPT2Config(**sizes | config)
    elif model_type == "mixtral":
        made = MixtralConfig(**SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16} | config)
    else:
        made = LlamaConfig(**SIZES | config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(made).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make(
    folder: Path, model_type: str = "llama", kind: str = "nf4", double: bool = True, storage: str = "uint8",
    dtype: str = "float32", **config: Any,
) -> Path:  # fmt: skip
    """A checkpoint that transformers quantised and saved; ``kind`` is ``"nf4"``, ``"fp4"`` or ``"int8"``."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = plain(folder / "plain", model_type, dtype, **config)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double,
                    "bnb_4bit_quant_storage": storage}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**settings), dtype=getattr(torch, dtype), device_map="cpu"
    )
    model.save_pretrained(folder / kind)
    return folder / kind


def make_mixture(folder: Path, kind: str = "nf4", double: bool = True, dtype: str = "float32", **config: Any) -> Path:
    """Mixtral as transformers 4 saved it: every expert's matrices quantised on their own, under their old names."""
    from bitsandbytes.functional import quantize_4bit

    source, target = plain(folder / "plain", "mixtral", dtype, **config), folder / kind
    target.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        if "proj" not in name and ".experts." not in name:
            tensors[name] = value
            continue
        packed, state = quantize_4bit(value, blocksize=64, quant_type=kind, compress_statistics=double)
        tensors |= {name: packed} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    assert any("block_sparse_moe.experts.3.w2.weight.absmax" in name for name in tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((source / "config.json").read_text("utf-8"))
    written["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(written), "utf-8")
    return target


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantised weight in float32, by bitsandbytes, as it lies: a Conv1D's is transposed."""
    from bitsandbytes.functional import QuantState, int8_vectorwise_dequant

    tensors, found = load_file(folder / "model.safetensors"), {}
    for name in tensors:
        weight, mark, _ = name.partition(STATE)
        if mark:
            stats = {key: value for key, value in tensors.items() if key.startswith(f"{weight}.")}
            found[weight] = _four_bits(tensors[weight], QuantState.from_dict(stats, torch.device("cpu")))
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = int8_vectorwise_dequant(tensors[weight], tensors[name])
    assert found
    return found


def _four_bits(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """As one long row: on a processor bitsandbytes 0.50 is wrong where several are no whole number of blocks."""
    from bitsandbytes.functional import dequantize_4bit

    shape, state.dtype = state.shape, torch.float32
    state.shape = torch.Size((1, math.prod(shape)))
    return dequantize_4bit(packed, state).view(shape)


def reference(folder: Path) -> Any:
    """The model that the checkpoint stands for, in float32: loaded by transformers, every weight dequantised."""
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config["model_type"] == "mixtral":
        return _reference_mixture(folder, config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    for name, weight in dequantised(folder).items():
        name = name.removesuffix(".weight")
        old = model.get_submodule(name)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None)
        linear.weight, linear.bias = nn.Parameter(weight), old.bias
        model.set_submodule(name, linear)
    return model.eval()


def _reference_mixture(folder: Path, config: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    target, weights = folder / "dequantised", dequantised(folder)
    kept = {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if not any(name.startswith(weight) for weight in weights)
    }
    target.mkdir(exist_ok=True)
    save_file(kept | weights, target / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
