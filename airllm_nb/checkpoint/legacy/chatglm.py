"""ChatGLM2 and ChatGLM3 → GLM. Rotary pairs are interleaved over the first half of a head in both: no permutation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .family import Config, Conversion, Family, Refusal
from .sentencepiece import backend, read_model
from .tokens import add_special, prefix, wrap

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# Numbered after the pieces, in this order; ChatGLM2 has the first five.
_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_ROLES)

# Each message is encoded apart in the original, with a blank in front.
_CHAT3 = (
    "{{ '[gMASK]sop' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\n ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_CHAT2 = (
    "{{ '[gMASK]sop' }}{% set turn = namespace(number=0) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set turn.number = turn.number + 1 %}"
    "{{ '[Round ' ~ turn.number ~ ']\n\n问：' ~ message['content'] ~ '\n\n答：' }}"
    "{% else %}{{ message['content'] ~ '\n\n' }}{% endif %}{% endfor %}"
)


def _native(config: Config) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0 * config.get("rope_ratio", 1), "partial_rotary_factor": 0.5}
    return {
        "vocab_size": config["padded_vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["multi_query_group_num"],
        "head_dim": config["kv_channels"],
        "rms_norm_eps": config["layernorm_epsilon"],
        "max_position_embeddings": config["seq_length"],
        "attention_bias": bool(config.get("add_qkv_bias")),
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        # GLM's own defaults are numbers of a larger vocabulary.
        "bos_token_id": None,
        "eos_token_id": config.get("eos_token_id", 2),
        "pad_token_id": config.get("pad_token_id", 0),
        "torch_dtype": config.get("torch_dtype"),
    }


def _rows(config: Config) -> list[list[tuple[int, int]]]:
    queries = config["num_attention_heads"] * config["kv_channels"]
    keys = config["multi_query_group_num"] * config["kv_channels"]
    return [[(0, queries)], [(queries, queries + keys)], [(queries + keys, queries + 2 * keys)]]


def _tokenizer(folder: Path, config: Config) -> Any:
    model = read_model(folder / "tokenizer.model")
    is_second = "chatglm2" in str(config.get("_name_or_path", "")).lower()
    special = _SPECIAL[:5] if is_second else _SPECIAL
    ids = {name: len(model.pieces) + number for number, name in enumerate(special)}
    tokens = backend(model, ids)
    add_special(tokens, ["</s>", "<unk>"])
    prefix(tokens, {"[gMASK]": ids["[gMASK]"], "sop": ids["sop"]})
    return wrap(
        tokens, folder, kind=_chat_class(), eos_token="</s>", pad_token="<unk>", unk_token="<unk>",
        # What looks like a special token in a text is text.
        split_special_tokens=True, chat_template=_CHAT2 if is_second else _CHAT3,
        chat_stops=() if is_second else ("</s>", "<|user|>", "<|observation|>"),
    )  # fmt: skip


class _Rendered(str):
    """Text that the chat template wrote: the special tokens in it are meant."""


def _chat_class() -> type:
    from transformers import PreTrainedTokenizerFast

    class ChatGLMTokenizer(PreTrainedTokenizerFast):
        """Parses special tokens in what the chat template writes, and nowhere else."""

        def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
            settings = {"split_special_tokens": False, **(kwargs.pop("tokenizer_kwargs", None) or {})}
            written = super().apply_chat_template(conversation, *args, tokenizer_kwargs=settings, **kwargs)
            return _Rendered(written) if isinstance(written, str) else written

        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            texts: Sequence[Any] = [text] if isinstance(text, str) else text
            if any(isinstance(one, _Rendered) for one in texts):
                kwargs["split_special_tokens"] = False
            return super()._encode_plus(text, *args, **kwargs)

    return ChatGLMTokenizer


FAMILY = Family(
    model_type="chatglm",
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    native="glm",
    refusals=(
        Refusal(
            lambda c: "inner_hidden_size" in c or "position_encoding_2d" in c,
            "this is the first ChatGLM-6B, another architecture than ChatGLM2 and 3; load THUDM/chatglm3-6b",
        ),
        Refusal(
            lambda c: c.get("padded_vocab_size") == 151552,
            "this is GLM-4 in its first form; load the one that is native, zai-org/glm-4-9b-chat-hf",
        ),
        Refusal(
            lambda c: c.get("rope_ratio", 1) != 1 and "chatglm2" in str(c.get("_name_or_path", "")).lower(),
            "ChatGLM2 stretches its positions by rope_ratio, which is not mapped; load THUDM/chatglm3-6b-32k",
        ),
        Refusal(
            lambda c: c.get("quantization_bit"),
            "quantization_bit is set: its weights are quantised by code of its own; load the unquantised "
            "checkpoint, with compression='4bit' if it should be small",
        ),
        Refusal(
            lambda c: c.get("pre_seq_len") is not None,
            "pre_seq_len is set: a prefix encoder (P-tuning) is not mapped; load the base checkpoint",
        ),
        Refusal(lambda c: c.get("vision_config"), "its vision part is not mapped; load the model's -hf version"),
        Refusal(
            lambda c: not c.get("multi_query_attention"),
            "multi_query_attention is not set: heads of their own keys lie interleaved, which is not mapped",
        ),
        Refusal(lambda c: c.get("add_bias_linear"), "add_bias_linear is set, which GLM does not have"),
        Refusal(lambda c: not c.get("rmsnorm", True), "rmsnorm is false: layer norm is not mapped"),
        Refusal(lambda c: not c.get("post_layer_norm", True), "post_layer_norm is false: there is no last norm"),
        Refusal(
            lambda c: c.get("apply_residual_connection_post_layernorm"),
            "apply_residual_connection_post_layernorm is set, which GLM does not do",
        ),
    ),
    translate=_native,
    conversions=(
        Conversion(r"transformer\.embedding\.word_embeddings\.weight", ("model.embed_tokens.weight",)),
        Conversion(r"transformer\.output_layer\.weight", ("lm_head.weight",)),
        Conversion(r"transformer\.encoder\.final_layernorm\.weight", ("model.norm.weight",)),
        Conversion(
            r"transformer\.encoder\.(layers\.\d+)\.self_attention\.query_key_value\.(weight|bias)",
            tuple(rf"model.\1.self_attn.{part}_proj.\2" for part in "qkv"),
            _rows,
        ),
        Conversion(
            r"transformer\.encoder\.(layers\.\d+)\.self_attention\.dense\.weight",
            (r"model.\1.self_attn.o_proj.weight",),
        ),
        # Gate and up stay one matrix, in the order that GLM has them.
        Conversion(
            r"transformer\.encoder\.(layers\.\d+)\.mlp\.dense_h_to_4h\.weight", (r"model.\1.mlp.gate_up_proj.weight",)
        ),
        Conversion(
            r"transformer\.encoder\.(layers\.\d+)\.mlp\.dense_4h_to_h\.weight", (r"model.\1.mlp.down_proj.weight",)
        ),
        Conversion(r"transformer\.encoder\.(layers\.\d+\.(input|post_attention)_layernorm\.weight)", (r"model.\1",)),
    ),
    tokenizer=_tokenizer,
)
