"""Two ways to attend that native classes lack: ALiBi, and angles that stretch with the sequence (dynamic NTK).

Both are functions that transformers calls in the place of its own; keys in the cache are as its own classes leave them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import AirLLMError, OptionError

ALIBI, NTK = "airllm_alibi", "airllm_ntk"


def attend_by(config: Any, recipe: Mapping[str, Any]) -> None:
    """Have the model of ``config`` attend by ``recipe``: ``{"kind": "alibi"}`` or ``{"kind": "ntk", …}``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, function in ((ALIBI, _alibi), (NTK, _ntk)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    config.airllm_attention = dict(recipe)
    if recipe["kind"] == "ntk":
        # Set here: transformers would warn of it in a config.json, though it goes by it.
        config.rope_parameters["original_max_position_embeddings"] = recipe["trained"]
    config._attn_implementation = {"alibi": ALIBI, "ntk": NTK}[recipe["kind"]]


@contextlib.contextmanager
def told_of_attention(config: Any, named: str | None) -> Iterator[None]:
    """A way to attend that this model or this machine has not is an ``OptionError``."""
    own = getattr(config, "airllm_attention", None)
    if named and own:
        raise OptionError(f"attn_implementation={named!r} is not for this model, whose attention ({own['kind']}) is "
                          "computed by a function of its own; leave it out")  # fmt: skip
    try:
        yield
    except (ImportError, ValueError) as error:
        if named is None or isinstance(error, AirLLMError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise OptionError(f"attn_implementation={named!r} cannot be used here ({reason}); leave it out") from None


def slopes(heads: int, device: torch.device | None = None) -> torch.Tensor:
    """ALiBi's slope of each head (https://arxiv.org/abs/2108.12409): float32 ``[heads]``."""
    power = 1 << (heads.bit_length() - 1)
    number = torch.arange(heads, device=device, dtype=torch.float64)
    # Heads beyond a power of two take every other slope of the next one.
    exponents = torch.where(number < power, 2 * (number + 1), 2 * (number - power) + 1)
    return (2 ** (-4 / power * exponents)).float()


def _alibi(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Scores fall with the distance; ``[batch, heads, tokens, head_dim]`` as transformers gives them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # From the query, not from the first key: large numbers would lose their last bits in bfloat16.
    places = torch.arange(key.shape[2], device=key.device)
    distance = (places - _places_of(query, key, attention_mask)[..., None])[:, None]  # [batch or 1, 1, queries, keys]
    bias = slopes(query.shape[1], key.device)[:, None, None] * distance
    if attention_mask is None:
        attention_mask = distance <= 0
    if attention_mask.dtype == torch.bool:
        bias = torch.where(attention_mask, bias, torch.finfo(query.dtype).min)
    else:
        bias = bias + attention_mask
    return sdpa_attention_forward(module, query, key, value, bias.to(query.dtype), **kwargs)


def _ntk(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Past the trained length queries and keys, which are turned by the plain angles, are turned by what is missing.

    The base follows the length of the sequence so far, so that what is computed does not depend on what was computed
    before; the keys of a cache keep the plain angles.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    recipe, count = module.config.airllm_attention, key.shape[2]
    if count > recipe["trained"]:
        places = torch.arange(count, device=key.device)
        positions = places[None, -query.shape[2] :] if position_ids is None else position_ids
        missing = _missing_angles(module, positions.amax(-1) + 1)  # [batch, head_dim / 2]
        # Only differences between places matter, so padding on the left does not.
        key = _turned(key, places[None, :, None] * missing[:, None])
        query = _turned(query, _places_of(query, key, attention_mask)[..., None] * missing[:, None])
        if recipe["logn"]:
            grown = (positions + 1).double().log() / math.log(recipe["trained"])
            query = query * grown.clamp(min=1)[:, None, :, None].to(query.dtype)
    return sdpa_attention_forward(module, query, key, value, attention_mask, position_ids=position_ids, **kwargs)


def _places_of(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Where the queries are among the keys, ``[batch or 1, queries]``: at the end, unless the cache has free room."""
    count, new = key.shape[2], query.shape[2]
    places = torch.arange(count, device=key.device)
    if mask is None:  # several tokens without a mask are the first ones, as transformers leaves it out
        return places[None, :new] if new > 1 else places[None, -1:]
    seen = mask if mask.dtype == torch.bool else mask == 0
    furthest = (seen[:, 0, -1] * places).amax(-1)
    last = torch.where(seen[..., -1].any(), count - 1, furthest)
    return last[:, None] - new + 1 + places[None, :new]


def _missing_angles(module: Any, lengths: torch.Tensor) -> torch.Tensor:
    """Angle a place by which sequences of these lengths lack, ``[batch, head_dim / 2]``."""
    recipe, size = module.config.airllm_attention, module.head_dim
    ratio = lengths.double() / recipe["trained"]
    if recipe["growth"] == "doubling":
        scale = 2 ** torch.ceil(torch.log2(ratio) + 1) - 1
    elif recipe["growth"] == "linear":
        scale = recipe["factor"] * ratio - (recipe["factor"] - 1)
    else:
        scale = torch.ones_like(ratio)
    base = module.config.rope_parameters["rope_theta"]
    exponents = -torch.arange(0, size, 2, device=lengths.device, dtype=torch.float64) / size
    stretched = base * scale.clamp(min=1) ** (size / (size - 2))
    return stretched[:, None] ** exponents - base**exponents


def _turned(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, head_dim]``, turned in Llama's halves by ``[batch or 1, tokens, head_dim / 2]``."""
    cos, sin = angles.cos()[:, None].float(), angles.sin()[:, None].float()
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(states.dtype)
