"""Qwen (the first) → Qwen2. Past ``seq_length`` its angles stretch and its queries grow (dynamic NTK and log-n)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .family import Config, Conversion, Family, Refusal, llama_like, plain_rope, stretched, thirds
from .tiktoken import backend, read_ranks
from .tokens import add_special, prefix, wrap

_END = "<|endoftext|>"
# Numbered after the ranks of the vocabulary file, in this order.
_SPECIAL = (_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _native(config: Config) -> dict[str, Any]:
    base, trained = config.get("rotary_emb_base", 10000), config.get("seq_length", 8192)
    context = max(config.get("max_position_embeddings", trained), trained)
    ntk, logn = config.get("use_dynamic_ntk", True), config.get("use_logn_attn", True)
    long = (
        stretched(trained, context, base, growth="doubling" if ntk else "none", logn=bool(logn))
        if ntk or logn
        else {**plain_rope(base), "max_position_embeddings": context}
    )
    # config.json has the width of gate and up together.
    values = llama_like({"rms_norm_eps": config.get("layer_norm_epsilon", 1e-6), "hidden_act": "silu", **config},
                        intermediate_size=config["intermediate_size"] // 2, use_sliding_window=False)  # fmt: skip
    # The native padding row must exist; which token pads is the tokenizer's to say.
    return {**values, **long, "pad_token_id": None}


def _tokenizer(folder: Path, config: Config) -> Any:
    files = sorted(folder.glob("*.tiktoken"))
    if not files:
        raise CheckpointError(f"{folder} holds no vocabulary (qwen.tiktoken); download it again")
    ranks = read_ranks(files[0])
    ids = {name: len(ranks) + number for number, name in enumerate(_SPECIAL)}
    tokens = backend(ranks, _WORDS, extra=ids)
    add_special(tokens, _SPECIAL)
    prefix(tokens, {})
    return wrap(tokens, folder, eos_token=_END, pad_token=_END, chat_template=_CHAT,
                chat_stops=(_END, "<|im_end|>", "<|im_start|>"))  # fmt: skip


FAMILY = Family(
    model_type="qwen",
    architectures=("QWenLMHeadModel",),
    native="qwen2",
    refusals=(
        Refusal(lambda c: "visual" in c, "this is Qwen-VL, whose vision part is not mapped; load Qwen/Qwen2-VL"),
        Refusal(lambda c: "audio" in c, "this is Qwen-Audio, whose audio part is not mapped; load Qwen/Qwen2-Audio"),
        Refusal(lambda c: not c.get("no_bias", True), "no_bias is false, which Qwen2 does not have"),
        Refusal(lambda c: c.get("rotary_pct", 1.0) != 1.0, "rotary_pct is not 1.0, which Qwen2 does not have"),
        Refusal(
            lambda c: c.get("kv_channels", 128) * c["num_attention_heads"] != c["hidden_size"],
            "kv_channels x num_attention_heads is not hidden_size, which Qwen2 does not have",
        ),
    ),
    translate=_native,
    conversions=(
        Conversion(r"transformer\.wte\.weight", ("model.embed_tokens.weight",)),
        Conversion(r"transformer\.ln_f\.weight", ("model.norm.weight",)),
        Conversion(r"transformer\.h\.(\d+)\.ln_1\.weight", (r"model.layers.\1.input_layernorm.weight",)),
        Conversion(r"transformer\.h\.(\d+)\.ln_2\.weight", (r"model.layers.\1.post_attention_layernorm.weight",)),
        Conversion(
            r"transformer\.h\.(\d+)\.attn\.c_attn\.(weight|bias)",
            tuple(rf"model.layers.\1.self_attn.{part}_proj.\2" for part in "qkv"),
            lambda config: thirds(config["hidden_size"]),
        ),
        Conversion(r"transformer\.h\.(\d+)\.attn\.c_proj\.weight", (r"model.layers.\1.self_attn.o_proj.weight",)),
        # The other way round than in Llama's code: w2 is the gate.
        Conversion(r"transformer\.h\.(\d+)\.mlp\.w1\.weight", (r"model.layers.\1.mlp.up_proj.weight",)),
        Conversion(r"transformer\.h\.(\d+)\.mlp\.w2\.weight", (r"model.layers.\1.mlp.gate_proj.weight",)),
        Conversion(r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight", (r"model.layers.\1.mlp.down_proj.weight",)),
    ),
    tokenizer=_tokenizer,
)
