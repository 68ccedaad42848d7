"""The shapes of well-known models, and the weights that a checkpoint of one holds."""

from __future__ import annotations

import difflib
from typing import Any

from ..errors import OptionError

Shape = tuple[int, ...]


def _llama(hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, layers: int, **more: Any) -> Any:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02,
        "intermediate_size": inner, "max_position_embeddings": 4096, "mlp_bias": False, "num_attention_heads": heads,
        "num_hidden_layers": layers, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": vocabulary, **more,
    }  # fmt: skip


def _qwen2(*sizes: int, **more: Any) -> Any:
    made = _llama(*sizes, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768, sliding_window=32768,
                  use_sliding_window=False)  # fmt: skip
    for name in ("attention_bias", "mlp_bias", "rope_scaling"):
        del made[name]
    return made | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | more


_LLAMA_3 = {"bos_token_id": 128000, "eos_token_id": 128001, "rope_theta": 500000.0, "max_position_embeddings": 8192}
_LLAMA_3_1 = _LLAMA_3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                     "original_max_position_embeddings": 8192},
}  # fmt: skip

# name: the config of the real model, or of one that a test has time for
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32000, 32),
    "llama-2-70b": _llama(8192, 28672, 64, 8, 32000, 80),
    "llama-3-70b": _llama(8192, 28672, 64, 8, 128256, 80, **_LLAMA_3),
    "llama-3.1-405b": _llama(16384, 53248, 128, 8, 128256, 126, **_LLAMA_3_1),
    "qwen2.5-32b": _qwen2(5120, 27648, 40, 8, 152064, 64, bos_token_id=151643, eos_token_id=151645),
    "small": _llama(1024, 2816, 16, 4, 4096, 4),
    "small-qwen": _qwen2(256, 704, 4, 2, 1024, 4),
}


def shape_config(shape: str, layers: int) -> dict[str, Any]:
    """The config of a shape cut to ``layers`` layers.

    Raises
    ------
    OptionError
        If there is no such shape, or less than one layer.
    """
    if shape not in SHAPES:
        near = difflib.get_close_matches(shape, SHAPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(SHAPES)}"
        raise OptionError(f"there is no shape {shape!r}; {hint}")
    if layers < 1:
        raise OptionError(f"a model of {layers} layers cannot run; ask for 1 layer or more")
    return {**SHAPES[shape], "num_hidden_layers": layers}


def weights_by_file(config: dict[str, Any]) -> list[dict[str, Shape]]:
    """Names and shapes of the weights, by file: each layer, then the rest."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    layer: dict[str, Shape] = {
        "self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden), "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner), "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }  # fmt: skip
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", hidden), ("k", kv), ("v", kv))}
    layers = [
        {f"model.layers.{number}.{name}": size for name, size in sorted(layer.items())}
        for number in range(config["num_hidden_layers"])
    ]
    return [*layers, {"lm_head.weight": (vocabulary, hidden), "model.embed_tokens.weight": (vocabulary, hidden),
                      "model.norm.weight": (hidden,)}]  # fmt: skip
