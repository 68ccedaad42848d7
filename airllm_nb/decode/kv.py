"""Room for the key/value cache and for activations, from the config alone."""

from __future__ import annotations

from typing import Any

# Planned when nothing is said; a longer generation plans again.
DEFAULT_LENGTH = 2048
# Bytes a vocabulary entry and sequence, beside the logits: the float32 scores of the last position, their sorted copy,
# indices, probabilities and sums where top-k and top-p sample.
_SCORES = 36


def context_length(config: Any) -> int | None:
    """The longest sequence that the model was made for, in tokens; ``None`` where the config does not say."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def cache_bytes(config: Any, length: int, batch: int, itemsize: int) -> int:
    """Bytes of a full dynamic cache: two tensors ``[batch, kv_heads, length, head_dim]`` a layer.

    Sliding windows and states of constant size need less; this is what is kept free.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    return 2 * layers * _cached_width(config) * length * batch * itemsize


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
    hidden = getattr(text, "hidden_size", 0) or 0
    vocabulary = getattr(text, "vocab_size", 0) or 0
    heads = getattr(text, "num_attention_heads", None) or 0
    width = max(hidden, heads * _head_width(text))
    per_token = (4 * hidden + 4 * width + _feed_forward(text, hidden)) * itemsize
    # Growing a layer's cache holds its old and its new keys.
    per_cached = _cached_width(config) + (2 * width if masked or eager else 0)
    per_pair = (4 + itemsize if masked or eager else 0) + (heads * (2 * itemsize + 4) if eager else 0)
    attention = length * (per_cached * itemsize + tokens * per_pair)
    head = vocabulary * (logits * (itemsize + 4 + 8 * loss) + _SCORES)
    return batch * (tokens * per_token + attention + head)


def returned_bytes(config: Any, length: int, batch: int, itemsize: int, *, states: bool, attentions: bool) -> int:
    """Bytes of what is kept to be returned: every layer's hidden states, every layer's attention."""
    text = config.get_text_config()
    layers, hidden = getattr(text, "num_hidden_layers", 0) or 0, getattr(text, "hidden_size", 0) or 0
    per_token = (layers + 1) * hidden if states else 0
    per_pair = layers * (getattr(text, "num_attention_heads", None) or 0) if attentions else 0
    return batch * length * (per_token + length * per_pair) * itemsize


def _feed_forward(text: Any, hidden: int) -> int:
    """Values a token in the feed-forward part."""
    dense = 4 * (getattr(text, "intermediate_size", None) or 4 * hidden)
    routed = getattr(text, "num_experts_per_tok", None) or 0
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 0
    if not isinstance(routed, int) or not isinstance(inner, int):  # a list: one a layer
        return int(dense)
    return max(int(dense), routed * 3 * (hidden + inner))


def _head_width(text: Any) -> int:
    """The widest head: of queries and keys, of values, or of the layers with heads of their own."""
    names = ("head_dim", "qk_head_dim", "v_head_dim", "global_head_dim")
    known = [size for size in (getattr(text, name, None) for name in names) if isinstance(size, int)]
    return max(known, default=0)


def _cached_width(config: Any) -> int:
    """Values a token and layer of the keys alone."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    hidden = getattr(text, "hidden_size", 0) or 0
    return int(kv_heads * (getattr(text, "head_dim", None) or hidden // heads))
