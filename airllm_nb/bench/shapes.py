"""The shapes of well-known models, and the tensors that a checkpoint of one holds, as it is published."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from ..encoding.formats import quantisation
from ..errors import OptionError
from ..model.architecture import native_config
from ..model.placing import compressible
from ..model.skeleton import build, kept_in_float32
from ..tensors.dtypes import DTYPE_NAMES
from ..tensors.index import ITEMSIZE, TensorInfo


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


def _mixture(model_type: str, architecture: str, rope_theta: float, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture], "model_type": model_type, "attention_dropout": 0.0, "hidden_act": "silu",
        "initializer_range": 0.02, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": rope_theta, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, **more,
    }  # fmt: skip


def _qwen3_moe(hidden: int, inner: int, heads: int, kv_heads: int, experts: int, used: int, vocabulary: int,
               layers: int, **more: Any) -> dict[str, Any]:  # fmt: skip
    return _mixture(
        "qwen3_moe", "Qwen3MoeForCausalLM", 1e6, attention_bias=False, bos_token_id=151643, decoder_sparse_step=1,
        eos_token_id=151645, head_dim=128, hidden_size=hidden, intermediate_size=3 * hidden, mlp_only_layers=[],
        max_position_embeddings=40960, max_window_layers=layers, moe_intermediate_size=inner, norm_topk_prob=True,
        num_attention_heads=heads, num_experts=experts, num_experts_per_tok=used, num_hidden_layers=layers,
        num_key_value_heads=kv_heads, rms_norm_eps=1e-6, router_aux_loss_coef=0.001, sliding_window=None,
        use_sliding_window=False, vocab_size=vocabulary,
    ) | more  # fmt: skip


def _gpt_oss(experts: int, layers: int) -> dict[str, Any]:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _mixture(
        "gpt_oss", "GptOssForCausalLM", 150000, attention_bias=True, eos_token_id=200002, experts_per_token=4,
        head_dim=64, hidden_size=2880, initial_context_length=4096, intermediate_size=2880,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=131072, num_attention_heads=64,
        num_experts_per_tok=4, num_hidden_layers=layers, num_key_value_heads=8, num_local_experts=experts,
        pad_token_id=199999, quantization_config={"modules_to_not_convert": kept, "quant_method": "mxfp4"},
        rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                      "rope_type": "yarn", "truncate": False},
        router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0, vocab_size=201088,
    )  # fmt: skip


_DEEPSEEK_V3 = _mixture(
    "deepseek_v3", "DeepseekV3ForCausalLM", 10000, attention_bias=False, bos_token_id=0, eos_token_id=1,
    first_k_dense_replace=3, hidden_size=7168, intermediate_size=18432, kv_lora_rank=512,
    max_position_embeddings=163840, moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256,
    n_shared_experts=1, norm_topk_prob=True, num_attention_heads=128, num_experts_per_tok=8, num_hidden_layers=61,
    num_key_value_heads=128, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
    quantization_config={"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                         "weight_block_size": [128, 128]},
    rms_norm_eps=1e-6,
    rope_scaling={"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                  "original_max_position_embeddings": 4096, "type": "yarn"},
    routed_scaling_factor=2.5, scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc", v_head_dim=128,
    vocab_size=129280,
)  # fmt: skip
_MIXTRAL = _mixture(
    "mixtral", "MixtralForCausalLM", 1e6, bos_token_id=1, eos_token_id=2, hidden_size=4096, intermediate_size=14336,
    max_position_embeddings=32768, num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32,
    num_key_value_heads=8, num_local_experts=8, router_aux_loss_coef=0.02, sliding_window=None, vocab_size=32000,
)  # fmt: skip
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
    "llama-3-8b": _llama(4096, 14336, 32, 8, 128256, 32, **_LLAMA_3),
    "llama-3-70b": _llama(8192, 28672, 64, 8, 128256, 80, **_LLAMA_3),
    "llama-3.1-405b": _llama(16384, 53248, 128, 8, 128256, 126, **_LLAMA_3_1),
    "qwen2.5-32b": _qwen2(5120, 27648, 40, 8, 152064, 64, bos_token_id=151643, eos_token_id=151645),
    "mixtral-8x7b": _MIXTRAL,
    "qwen3-30b-a3b": _qwen3_moe(2048, 768, 32, 4, 128, 8, 151936, 48),
    "gpt-oss-20b": _gpt_oss(32, 24),
    "gpt-oss-120b": _gpt_oss(128, 36),
    "deepseek-v3": _DEEPSEEK_V3,
    "small": _llama(1024, 2816, 16, 4, 4096, 4),
    "small-qwen": _qwen2(256, 704, 4, 2, 1024, 4),
    "small-moe": _qwen3_moe(256, 128, 4, 2, 16, 4, 1024, 4, bos_token_id=1, eos_token_id=2, head_dim=64),
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
    config = {**SHAPES[shape], "num_hidden_layers": layers}
    if kinds := config.get("layer_types"):
        config["layer_types"] = (kinds * layers)[:layers]
    return config


def skeleton_of(config: dict[str, Any]) -> Any:
    """The native model without weights, and its parameters in the dtypes that a bfloat16 checkpoint has them in."""
    return build(native_config(config), torch.bfloat16, torch.device("cpu"))


def native_tensors(skeleton: Any) -> dict[str, TensorInfo]:
    """All that a checkpoint holds, by the names of the model; it lies nowhere yet."""
    is_exact = kept_in_float32(skeleton, torch.bfloat16)
    dtypes = {name: torch.float32 if is_exact(name) else tensor.dtype for name, tensor in skeleton.state_dict().items()}
    return {
        name: TensorInfo(name, DTYPE_NAMES[dtypes[name]], tuple(tensor.shape), ())
        for name, tensor in skeleton.state_dict().items()
    }


def tensors_by_file(config: dict[str, Any]) -> list[dict[str, TensorInfo]]:
    """What the files of a published checkpoint hold: one a layer, then the rest; it lies nowhere yet.

    Names and shapes are what transformers would save, packed as the config's ``quantization_config`` says.
    """
    from transformers.core_model_loading import revert_weight_conversion

    skeleton = skeleton_of(config)
    dtypes = {name: info.dtype for name, info in native_tensors(skeleton).items()}
    linear = {f"{name}.weight" for name in compressible(skeleton)}
    layers: list[dict[str, TensorInfo]] = [{} for _ in range(config["num_hidden_layers"] + 1)]
    for name, tensor in revert_weight_conversion(skeleton, skeleton.state_dict()).items():
        shape, dtype = tuple(tensor.shape), dtypes.get(name, "BF16")
        packs = name in linear or ".experts." in name
        number = next((int(word) for word in name.split(".") if word.isdecimal()), -1)
        layers[number] |= _published(TensorInfo(name, dtype, shape, ()), config if packs else {})
    # As the safetensors library sorts them.
    return [dict(sorted(file.items(), key=lambda item: (-ITEMSIZE[item[1].dtype], item[0]))) for file in layers]


def _published(info: TensorInfo, config: dict[str, Any]) -> dict[str, TensorInfo]:
    """A weight as it lies in a checkpoint of this config."""
    name, shape, method = info.name, info.shape, quantisation(config).get("quant_method")
    parts: dict[str, tuple[str, tuple[int, ...]]]
    if method == "fp8" and len(shape) == 2:
        high, wide = quantisation(config)["weight_block_size"]
        parts = {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", (-(-shape[0] // high), -(-shape[1] // wide)))}
    elif method == "mxfp4" and len(shape) == 3:  # its columns, in blocks
        blocks = (shape[0], shape[2], shape[1] // 32)
        parts = {f"{name}_blocks": ("U8", (*blocks, 16)), f"{name}_scales": ("U8", blocks)}
    else:
        parts = {name: (info.dtype, shape)}
    return {part: TensorInfo(part, dtype, size, ()) for part, (dtype, size) in parts.items()}
