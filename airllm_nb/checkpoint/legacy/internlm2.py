"""InternLM2 → Llama. Queries, keys and values lie together for each key head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .family import STRETCH, Config, Conversion, Family, Refusal, llama_like, plain_rope, stretched
from .sentencepiece import backend, read_model
from .tokens import add_special, added_tokens, prefix, wrap

_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PARTS = {"w1": "gate", "w3": "up", "w2": "down"}


def _scaling(config: Config) -> str:
    scaling = config.get("rope_scaling") or {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _native(config: Config) -> dict[str, Any]:
    scaling, base = config.get("rope_scaling") or {}, config.get("rope_theta", 10000)
    trained, factor = config["max_position_embeddings"], scaling.get("factor", 1.0)
    rope: dict[str, Any] = plain_rope(base)
    kind = _scaling(config)
    if kind == "dynamic":
        rope = stretched(trained, STRETCH * trained, base, growth="linear", factor=factor)
    elif kind == "linear":
        rope["rope_parameters"] |= {"rope_type": "linear", "factor": float(factor)}
    return llama_like(
        config,
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        attention_bias=bool(config.get("bias", True)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **rope,
    )


def _rows(config: Config) -> list[list[tuple[int, int]]]:
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config["hidden_size"] // heads
    queries, step = heads // groups * width, (heads // groups + 2) * width
    starts = [group * step for group in range(groups)]
    return [
        [(at, at + queries) for at in starts],
        [(at + queries, at + queries + width) for at in starts],
        [(at + queries + width, at + step) for at in starts],
    ]


def _tokenizer(folder: Path, config: Config) -> Any:
    # The chat tokens are laid over pieces that nothing else uses.
    control = ["<unk>", "<s>", "</s>"]
    chat = {name: number for name, number in added_tokens(folder).items() if name not in control}
    tokens = backend(read_model(folder / "tokenizer.model"), chat)
    add_special(tokens, control)
    prefix(tokens, {"<s>": 1})
    return wrap(tokens, folder, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>",
                chat_template=_CHAT, chat_stops=("</s>", "<|im_end|>"))  # fmt: skip


FAMILY = Family(
    model_type="internlm2",
    architectures=("InternLM2ForCausalLM",),
    native="llama",
    refusals=(
        Refusal(
            lambda c: _scaling(c) not in ("default", "linear", "dynamic"),
            "its rope_scaling is neither linear nor dynamic",
        ),
    ),
    translate=_native,
    conversions=(
        Conversion(r"model\.tok_embeddings\.weight", ("model.embed_tokens.weight",)),
        Conversion(r"output\.weight", ("lm_head.weight",)),
        Conversion(r"(model\.layers\.\d+)\.attention_norm\.weight", (r"\1.input_layernorm.weight",)),
        Conversion(r"(model\.layers\.\d+)\.ffn_norm\.weight", (r"\1.post_attention_layernorm.weight",)),
        Conversion(
            r"(model\.layers\.\d+)\.attention\.wqkv\.(weight|bias)",
            tuple(rf"\1.self_attn.{part}_proj.\2" for part in "qkv"),
            _rows,
        ),
        Conversion(r"(model\.layers\.\d+)\.attention\.wo\.(weight|bias)", (r"\1.self_attn.o_proj.\2",)),
        *(
            Conversion(rf"(model\.layers\.\d+)\.feed_forward\.{theirs}\.weight", (rf"\1.mlp.{ours}_proj.weight",))
            for theirs, ours in _PARTS.items()
        ),
    ),
    tokenizer=_tokenizer,
)
