"""InternLM (the first) → Llama: the same tensors by the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .family import STRETCH, Config, Family, Refusal, llama_like, plain_rope, stretched
from .sentencepiece import backend, read_model
from .tokens import add_special, prefix, wrap

_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|User|>:' + message['content'] + '<eoh>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Bot|>:' + message['content'] + '<eoa>\n' }}"
    "{% else %}{{ '<|System|>:' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}"
)


def _native(config: Config) -> dict[str, Any]:
    # The code of 2023 has a base of its own whatever rope_theta says; the later code reads rotary.
    rotary = config.get("rotary") or {"base": 10000, "type": "origin"}
    trained = config["max_position_embeddings"]
    rope = (
        stretched(trained, STRETCH * trained, rotary["base"], growth="linear", factor=rotary.get("scaling_factor", 1.0))
        if rotary["type"] == "dynamic"
        else plain_rope(rotary["base"])
    )
    return llama_like(
        config,
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        attention_bias=bool(config.get("bias", True)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **rope,
    )


def _tokenizer(folder: Path, config: Config) -> Any:
    tokens = backend(read_model(folder / "tokenizer.model"))
    add_special(tokens, ["<unk>", "<s>", "</s>"])
    prefix(tokens, {"<s>": 1})
    return wrap(tokens, folder, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>",
                chat_template=_CHAT, chat_stops=("</s>", "<eoa>"))  # fmt: skip


FAMILY = Family(
    model_type="internlm",
    architectures=("InternLMForCausalLM",),
    native="llama",
    refusals=(
        Refusal(
            lambda c: (c.get("rotary") or {"type": "origin"})["type"] not in ("origin", "dynamic"),
            "its rotary type is neither origin nor dynamic",
        ),
    ),
    translate=_native,
    conversions=(),
    tokenizer=_tokenizer,
)
