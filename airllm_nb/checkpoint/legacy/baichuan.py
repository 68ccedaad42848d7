"""Baichuan and Baichuan2 → Llama. The 13B attends by ALiBi; Baichuan2's output head has rows of length 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...disk import read_json
from .family import ATTENTION, Config, Conversion, Family, Refusal, llama_like, plain_rope, thirds
from .sentencepiece import USER_DEFINED, backend, read_model
from .tokens import add_special, prefix, wrap

# All that tells Baichuan, some tokens added perhaps, from Baichuan2, whose config.json is of the same type.
_FIRST_VOCABULARY = range(64_000, 65_536)
# Of Baichuan2-Chat and Baichuan-Chat alike.
_USER, _ASSISTANT = 195, 196


def _is_first(config: Config) -> bool:
    return config["vocab_size"] in _FIRST_VOCABULARY


def _native(config: Config) -> dict[str, Any]:
    if config.get("max_position_embeddings"):
        return llama_like(config, **plain_rope(10000))
    # Angles of zero turn nothing: positions are the attention's.
    still = {"rope_type": "linear", "factor": float("inf"), "rope_theta": 10000.0}
    return llama_like(config, max_position_embeddings=config.get("model_max_length", 4096), rope_parameters=still,
                      **{ATTENTION: {"kind": "alibi"}})  # fmt: skip


def _tokenizer(folder: Path, config: Config) -> Any:
    model = read_model(folder / "tokenizer.model")
    tokens = backend(model)
    add_special(tokens, ["<unk>", "<s>", "</s>"])
    prefix(tokens, {})
    template = _chat_template(folder, model.pieces, _is_first(config))
    return wrap(tokens, folder, bos_token="<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>",
                chat_template=template, chat_stops=("</s>",))  # fmt: skip


def _chat_template(folder: Path, pieces: Any, is_first: bool) -> str | None:
    """The chat format names its roles by number; it can be written where those are tokens of their own."""
    numbers = read_json(folder / "generation_config.json", optional=True) or {}
    roles = [numbers.get("user_token_id", _USER), numbers.get("assistant_token_id", _ASSISTANT)]
    if any(
        not isinstance(number, int) or not 0 <= number < len(pieces) or pieces[number].kind != USER_DEFINED
        for number in roles
    ):
        return None
    user, assistant = (pieces[number].text for number in roles)
    end = "{{ '</s>' }}" if is_first else ""
    return (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '" + user + "' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '" + assistant + "' + message['content'] }}" + end + "{% else %}"
        "{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '" + assistant + "' }}"
        "{% endif %}"
    )


FAMILY = Family(
    model_type="baichuan",
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    native="llama",
    refusals=(Refusal(lambda c: c.get("hidden_act", "silu") != "silu", "its activation is not silu"),),
    translate=_native,
    conversions=(
        Conversion(
            r"(model\.layers\.\d+\.self_attn)\.W_pack\.weight",
            tuple(rf"\1.{part}_proj.weight" for part in "qkv"),
            lambda config: thirds(config["hidden_size"]),
        ),
    ),
    tokenizer=_tokenizer,
    normalised=lambda config: () if _is_first(config) else ("lm_head.weight",),
)
