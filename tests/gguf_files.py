"""GGUF files in miniature, written by the format's own library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from airllm_nb.checkpoint.gguf.cursor import read_as_array

# Types whose blocks the library cannot make from values → where their float16 scales lie in a block.
SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ3_XXS": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """Random values in a type; where the library cannot make its blocks, random blocks with scales of a fair size."""
    data = (rng.standard_normal(shape) * 0.2).astype(np.float32)
    if kind.name not in SCALES:
        return np.asarray(gguf.quantize(data, kind))
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (data.size // size, nbytes), dtype=np.uint8)
    for at in SCALES[kind.name]:
        raw[:, at : at + 2] = (rng.random(len(raw)) * 4e-4).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return raw.reshape(*shape[:-1], -1)


def write(
    path: Path,
    arch: str,
    fields: dict[str, Any],
    tensors: dict[str, Any],
    kind: Callable[[str], str] | str = "Q8_0",
    words: int = 64,
    limit: int = 0,
    small_first: bool = False,
) -> Path:
    """A GGUF file of ``tensors``: name → shape; ``kind`` is the type of the matrices, or says it by their name.

    With a ``limit`` of tensors a file it is split, as ``path`` with ``-00001-of-…`` in their names; ``small_first``
    leaves the first without tensors.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=limit, small_first_shard=small_first)
    writer.add_name("tiny")
    for key, value in fields.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "abb", *(f"t{number}" for number in range(words - 4))])
    writer.add_token_merges(["a b", "ab b"])
    for name, shape in tensors.items():
        named = "F32" if len(shape) < 2 else kind if isinstance(kind, str) else kind(name)
        made = gguf.GGMLQuantizationType[named]
        writer.add_tensor(name, blocks(rng, shape, made), raw_dtype=made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama_gguf(
    path: Path, hidden: int = 64, inner: int = 96, tied: bool = False, words: int = 64,
    more: dict[str, Any] | None = None, **options: Any,
) -> Path:  # fmt: skip
    fields = {
        "block_count": 2, "context_length": 64, "embedding_length": hidden, "feed_forward_length": inner,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "vocab_size": words,
    } | (more or {})  # fmt: skip
    tensors: dict[str, Any] = {"token_embd.weight": (words, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        tensors["output.weight"] = (words, hidden)
    half, square = (hidden // 2, hidden), (hidden, hidden)
    for layer in range(2):
        tensors |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_q": square, "attn_k": half, "attn_v": half, "attn_output": square, "attn_norm": (hidden,),
                "ffn_norm": (hidden,), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
                "ffn_down": (hidden, inner),
            }.items()
        }  # fmt: skip
    return write(path, "llama", fields, tensors, words=words, **options)


def tiny_qwen2moe_gguf(path: Path, words: int = 64, **options: Any) -> Path:
    fields = {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "expert_count": 4, "expert_used_count": 2, "vocab_size": words,
        "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 96,
    }  # fmt: skip
    tensors: dict[str, Any] = {"token_embd.weight": (words, 64), "output_norm.weight": (64,)}
    tensors["output.weight"] = (words, 64)
    config = transformers.Qwen2MoeConfig(num_experts=4)
    moe, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
    for layer in range(2):
        tensors |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_q.weight": (64, 64), "attn_q.bias": (64,), "attn_k.weight": (32, 64), "attn_k.bias": (32,),
                "attn_v.weight": (32, 64), "attn_v.bias": (32,), "attn_output.weight": (64, 64),
                "attn_norm.weight": (64,), "ffn_norm.weight": (64,), "ffn_gate_inp.weight": (4, 64),
                "ffn_gate_inp_shexp.weight": (64,), "ffn_gate_exps.weight": (4, moe, 64),
                "ffn_up_exps.weight": (4, moe, 64), "ffn_down_exps.weight": (4, 64, moe),
                "ffn_gate_shexp.weight": (shared, 64), "ffn_up_shexp.weight": (shared, 64),
                "ffn_down_shexp.weight": (64, shared),
            }.items()
        }  # fmt: skip
    return write(path, "qwen2moe", fields, tensors, words=words, **options)


def tiny_gpt2_gguf(path: Path, **options: Any) -> Path:
    fields = {
        "block_count": 2, "context_length": 1024, "embedding_length": 64, "feed_forward_length": 256,
        "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    tensors: dict[str, Any] = {"token_embd.weight": (64, 64), "position_embd.weight": (1024, 64)}
    tensors |= {"output_norm.weight": (64,), "output_norm.bias": (64,), "output.weight": (64, 64)}
    for layer in range(2):
        for name, shape in {
            "attn_qkv": (192, 64), "attn_output": (64, 64), "ffn_up": (256, 64), "ffn_down": (64, 256),
            "attn_norm": (64,), "ffn_norm": (64,),
        }.items():  # fmt: skip
            tensors |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": (shape[0],)}
    return write(path, "gpt2", fields, tensors, **options)


def mixed(name: str) -> str:
    """As files of the kind Q4_K_M are."""
    return "Q6_K" if "ffn_down" in name or "attn_v" in name or name.startswith(("token_embd", "output")) else "Q4_K"


def dequantised_gguf(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers makes of the file, dequantised."""
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with read_as_array():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options).eval()
