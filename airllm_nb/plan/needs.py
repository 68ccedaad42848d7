"""Room for the key/value cache and for activations, from the config alone; and how long a sequence may be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn

from ..errors import OptionError

# Planned when nothing is said; a longer generation plans again.
DEFAULT_LENGTH = 2048
# Types whose number of positions is that before scaling; and those that say what it was before: theirs may be either.
_STRETCHED, _FROM, _MOST = ("linear", "dynamic", "yarn", "proportional"), ("yarn", "llama3", "longrope"), 1 << 20
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_target_positions")
# What tables of positions are called.
_POSITIONS = re.compile(r"(position|\bpos_|\bwpe\b)[^.]*(\.weight)?$")
# Bytes a vocabulary entry and sequence, beside the logits: the float32 scores of the last position, their sorted copy,
# indices, probabilities and sums where top-k and top-p sample.
_SCORES = 36


def context_length(config: Any) -> int | None:
    """The longest sequence that the model was made for, in tokens; ``None`` where the config does not say.

    Positions that are scaled reach further than the config's number where that is of the training before: by their
    factor, unless the number counts it in already. Where layers differ, as far as all of them reach.
    """
    text = config.get_text_config()
    for name in _LENGTHS:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return min(_reach(rope, value) for rope in rope_layers(text))
    return None


def check_positions(native: Any, length: int | None) -> None:
    """Refuse a ``length`` that a table of positions does not reach; calculated ones have no end.

    Raises
    ------
    OptionError
        If ``native`` has such a table, learned or calculated beforehand.
    """
    held = context_length(native.config)
    if length is None or held is None or length <= held:
        return
    for path, module in native.named_modules():
        tables = {**module._buffers, **(module._parameters if isinstance(module, nn.Embedding) else {})}
        for name, table in tables.items():
            # Some classes keep the first two rows for padding.
            if table is not None and _POSITIONS.search(f"{path}.{name}") and held in (*table.shape, table.shape[0] - 2):
                raise OptionError(f"max_seq_len={length} is more than the {held:,} positions that this model has a "
                                  f"table for ({path}.{name}); leave it out, or give at most {held}")  # fmt: skip


def rope_layers(text: Any) -> list[Mapping[str, Any]]:
    """The parameters of the rotary positions: one set for all layers, or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [value for value in rope.values() if isinstance(value, Mapping)] or [rope]


def _reach(rope: Mapping[str, Any], said: int) -> int:
    """How far scaled positions go, as transformers reads the parameters of each type."""
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    original = rope.get("original_max_position_embeddings") if kind in _FROM else None
    is_scaled = kind in _STRETCHED or isinstance(original, int)
    if not is_scaled or not isinstance(factor, (int, float)) or not 1 < factor < _MOST:
        return said
    return max(said, int((original if isinstance(original, int) else said) * factor))


def cache_bytes(config: Any, length: int, batch: int, itemsize: int) -> int:
    """Bytes of a full dynamic cache: keys and values ``[batch, kv_heads, length, head_dim]`` a layer.

    Sliding windows and states of constant size need less; this is what is kept free.
    """
    text = config.get_text_config()
    # A model of several stacks has a config for each.
    stacks = [text] if _largest(text, "num_attention_heads") else [getattr(text, name) for name in text.sub_configs]
    width = sum(_largest(stack, "num_hidden_layers") * sum(_cached_widths(stack)) for stack in stacks)
    return width * length * batch * itemsize


def activation_bytes(
    config: Any, tokens: int, batch: int, itemsize: int, *, length: int = 0, logits: int = 1, loss: bool = False,
    masked: bool = False, eager: bool = False,
) -> int:  # fmt: skip
    """A bound on what one forward over ``tokens`` new tokens keeps at once.

    Residual, normed and projected states of one attention and one MLP live together; transformers' MLP holds three
    tensors of the intermediate size, and one of experts holds them for every expert that a token is routed to.

    Parameters
    ----------
    tokens, batch
        New tokens a sequence, and sequences.
    length
        Tokens that one attention looks at, those of the cache included.
    logits, loss
        Positions a sequence that get logits, and whether they get a loss in float32 too.
    masked
        Attention gets a mask, ``[batch, 1, tokens, length]``; then keys and values are repeated for all heads.
    eager
        Attention is not fused: its scores are kept, ``[batch, heads, tokens, length]``.
    """
    text = config.get_text_config()
    hidden, vocabulary = _largest(text, "hidden_size"), _largest(text, "vocab_size")
    heads = _largest(text, "num_attention_heads")
    width = max(hidden, heads * _largest(text, "head_dim", "qk_head_dim", "v_head_dim", "global_head_dim"))
    per_token = (4 * hidden + 4 * width + _feed_forward(text, hidden)) * itemsize
    # Growing a layer's cache holds its old and its new keys; a latent one is expanded to keys and values of all heads.
    is_latent = _largest(text, "kv_lora_rank") > 0
    per_cached = max(_cached_widths(text)) + (2 * width if masked or eager or is_latent else 0)
    per_pair = (4 + itemsize if masked or eager else 0) + (heads * (2 * itemsize + 4) if eager else 0)
    attention = length * (per_cached * itemsize + tokens * per_pair)
    head = vocabulary * (logits * (itemsize + 4 + 8 * loss) + _SCORES)
    return batch * (tokens * per_token + attention + head)


def returned_bytes(config: Any, length: int, batch: int, itemsize: int, *, states: bool, attentions: bool) -> int:
    """Bytes of what is kept to be returned: every layer's hidden states, every layer's attention."""
    text = config.get_text_config()
    layers = _largest(text, "num_hidden_layers")
    per_token = (layers + 1) * _largest(text, "hidden_size") if states else 0
    per_pair = layers * _largest(text, "num_attention_heads") if attentions else 0
    return batch * length * (per_token + length * per_pair) * itemsize


def _feed_forward(text: Any, hidden: int) -> int:
    """Values a token in the feed-forward part."""
    dense = 4 * (_largest(text, "intermediate_size") or 4 * hidden)
    inner = _largest(text, "moe_intermediate_size") or _largest(text, "intermediate_size")
    # Two more of the hidden size where experts stream: each token is given to each of its experts, and taken back.
    return max(dense, _largest(text, "num_experts_per_tok") * (5 * hidden + 3 * inner))


def routed_experts(config: Any, count: int) -> int:
    """How many of a layer's ``count`` experts a token is routed to; all, where the config does not say."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "experts_per_token")
    return min(_largest(config.get_text_config(), *names) or count, count)


def _cached_widths(text: Any) -> tuple[int, int]:
    """Values a token and layer of the keys, and of the values."""
    heads = _largest(text, "num_attention_heads") or 1
    head = _largest(text, "head_dim", "global_head_dim", "swa_head_dim") or _largest(text, "hidden_size") // heads
    kv_heads = _largest(
        text, "num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads", "num_kv_heads"
    )
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    kv_heads = kv_heads or heads
    if latent := _largest(text, "kv_lora_rank"):
        rope, indexer = _largest(text, "qk_rope_head_dim"), _largest(text, "index_head_dim")
        if indexer and not since(5, 23):
            # Keys and values of all heads, where an indexer chooses among them.
            return heads * (_largest(text, "qk_nope_head_dim") + rope), heads * _largest(text, "v_head_dim") + indexer
        # The latent and the one rotated key, for all heads, and the key of an indexer.
        return latent, rope + indexer
    return kv_heads * head, kv_heads * head


def since(major: int, minor: int) -> bool:
    """Whether this is that transformers or a later one."""
    return tuple(map(int, version("transformers").split(".")[:2])) >= (major, minor)


def _largest(text: Any, *names: str) -> int:
    """The largest number that any of the fields has in any layer: one for all, a list, or a config a layer; else 0."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    values = [getattr(layer, name, None) for layer in layers for name in names]
    numbers = [each for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]
    return max((each for each in numbers if isinstance(each, int)), default=0)
