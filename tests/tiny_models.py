"""Every causal language model that transformers has a config for, made tiny: a few layers, random weights; and run,
resident and streamed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import StreamedModel
from airllm_nb.intake import planning, prepare
from airllm_nb.model.device import Budgets
from airllm_nb.plan.experts import staging
from airllm_nb.plan.placement import window
from airllm_nb.plan.residency import Machine
from airllm_nb.stream.ring import align, host_room

MACHINE = Machine(True, disk=1e9, link=1e10, memory=1e10)
IDS = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(1))
LAYERS = 4
# What a field is set to wherever a config has it as a number; a config's own defaults give the rest.
SIZES: dict[str, int] = {
    **dict.fromkeys(["vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"], 260),
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size", "word_embed_proj_dim",
         "attention_hidden_size", "lru_width", "backbone_hidden_size", "input_embedding_size"], 64),
    "output_embedding_size": 96,
    **dict.fromkeys(
        ["intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "dim_ff", "dff",
         "d_inner", "feed_forward_size", "dense_intermediate_size", "intermediate_size_mlp", "prompt_mid_dim"], 128),
    **dict.fromkeys(
        ["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
         "shared_experts_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"], 48),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks",
         "num_encoder_layers", "num_decoder_layers"], LAYERS),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads", "swa_num_attention_heads",
         "linear_num_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"], 2),
    **dict.fromkeys(
        ["head_dim", "swa_head_dim", "d_head", "dim_head", "kv_channels", "linear_head_dim", "attention_head_size",
         "index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "qk_nope_head_dim"], 16),
    "qk_rope_head_dim": 16, "qk_head_dim": 32, "rotary_dim": 8, "query_pre_attn_scalar": 16,
    "kv_lora_rank": 32, "q_lora_rank": 32, "o_lora_rank": 16, "o_groups": 2,
    **dict.fromkeys(
        ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "zero_expert_num": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1,
    **dict.fromkeys(
        ["sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attention_chunk_size",
         "local_attention", "local_attention_window_len"], 8),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions",
         "max_source_positions", "model_max_length", "position_bias_max_distance", "rel_extent"], 128),
    "position_bias_num_buckets": 32,
    "index_n_heads": 8, "index_topk": 4, "index_block_size": 4, "index_topk_blocks": 2,
    **dict.fromkeys(["linear_num_key_heads"], 2), "linear_num_value_heads": 4,
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state"], 8),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 16),
    "mamba_d_ssm": 128, "n_groups": 2, "n_mamba_heads": 2, "attention_head_dim": 32,
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    "block_size": 8, "router_hidden_size": 16, "gated_norm_rank": 8, "adapter_rank": 8,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8,
    "image_size": 32, "patch_size": 8, "image_seq_length": 4, "mm_tokens_per_image": 4,
    "pronunciation_embed_dim": 32, "pronunciation_vocab_size": 64, "shape_embed_dim": 16, "shape_vocab_size": 64,
}  # fmt: skip
# Lists of what each layer is.
_KINDS = ("layer_types", "mlp_layer_types", "indexer_types")
# Special tokens are below the byte vocabulary; those of other modalities at its end, where no prompt meets them.
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
_LAST_TOKEN = 259
# Positions of text in three dimensions: how many of the eight angles each of them has.
_MROPE = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_DOTS3 = {
    "head_dim": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
_QWEN4_EXP = {
    "indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ple_embed_dim": 64, "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "heads_per_ngram": 2, "hc_lowrank": 8,
}  # fmt: skip
# What a type needs beside the sizes: fields by the name of the type; "text_config.x" is a field of a part.
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "num_hidden_layers": 4, "encoder_config.hidden_size_global": 64,
        "decoder_config.hidden_size_global": 64,
    },
    "cohere_compass_text": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    }},
    "dbrx": {"attn_config.clip_qkv": 8.0, "attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2},
    "deepseek_v2": {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "num_experts_per_tok": 2,
                    "n_routed_experts": 4, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config." + key: value for key, value in _DOTS3.items()
    } | {"vision_config.adapter_in_dim": 64, "vision_config.adapter_out_dim": 64,
         "audio_config.adapter_out_dim": 64, "audio_config.adapter_input_size": 64},
    "dots3_note_text": _DOTS3,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "emu3": {
        "vq_config.base_channels": 32, "vq_config.embed_dim": 16, "vq_config.latent_channels": 16,
        "vq_config.channel_multiplier": [1, 1],
        "vocabulary_map": {"<image>": 259, "<|extra_200|>": 258, "<|visual token 000000|>": 257},
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": 128, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "glm4v": _MROPE | {"vision_config.depth": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite_speech": {"encoder_config.hidden_dim": 64, "projector_config.encoder_hidden_size": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config." + key: value for key, value in _QWEN4_EXP.items()},
    "qwen4_exp_text": _QWEN4_EXP,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE | {"vision_config.embed_dim": 64, "vision_config.depth": 2},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
              "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8,
               "attention_hidden_size": 128, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """The config of a type with every size small; hybrids have at least one layer of each kind."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    fixes = FIXES.get(model_type, {})
    return kind(**small_fields(kind, fixes))


def small_fields(kind: type, fixes: dict[str, Any], default: Any = None) -> dict[str, Any]:
    """Arguments that make a small ``kind``, from what its defaults say there is."""
    if default is None:
        default = kind(**{key: value for key, value in fixes.items() if key.startswith("hidden_size_per")})
    fields: dict[str, Any] = {}
    for name, value in vars(default).items():
        part = kind.sub_configs.get(name)
        if part is not None and value is not None:
            inner = {key.partition(".")[2]: fix for key, fix in fixes.items() if key.startswith(f"{name}.")}
            own = type(value) if not isinstance(value, dict) else part
            fields[name] = {"model_type": own.model_type} | small_fields(own, inner, value)
        elif name == "is_decoder":
            fields[name] = True
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in SIZES:
                fields[name] = SIZES[name]
            elif name in TOKENS:
                fields[name] = TOKENS[name]
            elif name.endswith(("_token_id", "_token_index")) and value > _LAST_TOKEN:
                fields[name] = _LAST_TOKEN
        elif name in TOKENS and (value is None or isinstance(value, list)):
            fields[name] = TOKENS[name]
        elif name in _KINDS and value:
            fields[name] = _each_kind(value)
    if "kv_lora_rank" in fields:  # one latent for all heads: there are no groups
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields.update({key: value for key, value in fixes.items() if "." not in key})
    return fields


def _each_kind(kinds: Iterable[str]) -> list[str]:
    distinct = list(dict.fromkeys(kinds))
    return [distinct[index % len(distinct)] for index in range(LAYERS)]


def full_class(config: Any) -> Any:
    """The auto class of what a checkpoint of this type holds: of all parts, where the language model is one of them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    native = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_part = native is None or native.config_class is config.sub_configs.get("text_config")
    return AutoModelForMultimodalLM if is_part else AutoModelForCausalLM


def save_tiny(model_type: str, folder: Path, seed: int = 0) -> Any:
    """Save a tiny model of the type into ``folder``, float32; returns it."""
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = full_class(config).from_config(config, dtype=torch.float32).eval()
        randomise(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Every weight different from its neighbours and from its initial value, so that none can be missed."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            # A smaller table: else the last token's own row decides what a tied head answers.
            parameter.copy_(noise * (0.03 if id(parameter) in tables else 0.15))
        else:
            parameter.add_(noise * 0.1)
    for module in model.modules():
        # As training leaves it; some classes write zeros there whatever was loaded.
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0
    persistent = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer) * 0.1)


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers itself loads as a causal language model, or as a model of several parts."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    is_causal = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForCausalLM if is_causal else AutoModelForMultimodalLM
    native, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"], "transformers does not know this layout: there is nothing to compare with"
    return native.eval()


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        logits = model(IDS).logits
        return generated(model, IDS), logits


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.inference_mode():
        return model.generate(ids, **(settings | options))


def streamed(folder: Path, **options: Any) -> StreamedModel:
    """Open with room for three units on the device, and with less RAM than weights, so that some come from disk."""
    ample = {"vram_budget": "1GiB", "ram_budget": "1GiB", "max_seq_len": 32}
    prepared = prepare.prepare(folder, LoadOptions.create(**{"dtype": "float32", **ample, **options}))
    units = [unit.nbytes for unit in prepared.sizes if unit.kind not in ("embedding", "experts")]
    banks = [unit.experts for unit in prepared.sizes if unit.experts]
    needs = planning.needs(prepared, prepared.planned, prepared.planned.sizes[0]).total
    vram = needs + window([align(size) for size in units]) + staging(banks, 0)[1]
    all_but_one = sum(map(align, units)) - 1
    ring = window([host_room(size) for size in units])
    passing = max((align(bank.nbytes) for bank in banks), default=0)
    ram = passing + max(min(ring + max(units), all_but_one), max(map(host_room, units)))
    model = StreamedModel(prepared, MACHINE, Budgets(vram, ram))
    assert "disk" in model.plan.tiers or len(units) <= 3
    assert model.plan.streamed_bytes or len(units) <= 3
    return model
