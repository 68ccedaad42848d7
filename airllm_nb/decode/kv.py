"""Room for the key/value cache, from the config alone."""

from __future__ import annotations

from typing import Any

# Planned when nothing is said; a longer generation plans again.
DEFAULT_LENGTH = 2048


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
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0) or 0
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    hidden = getattr(text, "hidden_size", 0) or 0
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    return 2 * layers * kv_heads * head_dim * length * batch * itemsize


def activation_bytes(config: Any, tokens: int, batch: int, itemsize: int) -> int:
    """A bound on what one forward over ``tokens`` new tokens keeps at once, logits of the last token included.

    Residual, normed and projected states of one attention and one MLP live together; transformers' MLP holds three
    tensors of the intermediate size. Attention without a fused kernel would need more: the fused one is the default.
    """
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", 0) or 0
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    vocabulary = getattr(text, "vocab_size", 0) or 0
    per_token = (8 * hidden + 4 * intermediate) * itemsize
    return batch * (tokens * per_token + vocabulary * (itemsize + 2 * 4))
