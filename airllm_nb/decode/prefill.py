"""What a call of ``generate`` or of the model asks of device memory, and why some prompts cannot be cut."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..plan.needs import rope_layers, since
from ..plan.work import Work
from .cache import Cache
from .ids import check_call, check_settings
from .prompt import prompt_shape, sequences, total_length
from .settings import as_whole, effective

# Tokens that an assistant or a lookup proposes at once, at most; transformers starts with 20 and grows with success.
_CANDIDATES = 64
# Models whose state, carried from chunk to chunk, gives what the whole prompt gives (others forget it between chunks).
STATEFUL_IN_CHUNKS = frozenset({
    "bailing_hybrid", "bamba", "deepseek_v4", "falcon_h1", "granitemoehybrid", "kimi_linear", "nemotron_h",
    "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "zamba2", "zaya",
})  # fmt: skip
# Models whose prompt, cut, gives another answer or an error: their masks or positions are not made for it.
WHOLE = frozenset({"blt", "cpmant", "doge", "git", "moshi", "mpt", "prophetnet"})
# Those of which the same was true in transformers 5.15, and is no longer in 5.23.
WHOLE_AT_FIRST = frozenset({
    "axk2", "big_bird", "deepseek_v32", "glm4v_text", "glm_moe_dsa", "megatron-bert", "qwen2_5_vl_text",
    "qwen2_vl_text", "qwen3_vl_moe_text", "qwen3_vl_text", "rembert", "roformer",
})  # fmt: skip
# Tensors of a call that transformers cuts together with the prompt.
_CUT = ("inputs", "input_ids", "attention_mask", "position_ids")
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def of_generation(native: Any, kwargs: Mapping[str, Any]) -> Work:
    """What ``native.generate(**kwargs)`` asks for.

    Raises
    ------
    PromptError, OptionError
        If tokens, positions or settings are outside of what the model has.
    """
    setting = effective(native, kwargs)
    check_settings(native, setting)
    check_call(native, kwargs)
    (batch, prompt), mask = prompt_shape(kwargs), kwargs.get("attention_mask")
    length = total_length(prompt, setting)
    assisted = next((name for name in _ASSISTED if setting(name)), "")
    logits = None if "logits_to_keep" not in _parameters(native) else kwargs.get("logits_to_keep", 1)
    candidates = max(_CANDIDATES, as_whole(setting("prompt_lookup_num_tokens"), 0)) if assisted else 0
    past = Cache.given(kwargs).length
    whole = assisted or _why_whole(native, kwargs, setting, prompt, past)
    no_cache = setting("use_cache") is False
    if past and isinstance(mask, torch.Tensor):
        length += max(mask.shape[-1] - prompt, 0)
    return Work(
        length=length,
        batch=sequences(batch, setting),
        # Without a cache every forward computes the whole sequence.
        prompt=length if no_cache else prompt + candidates,
        logits=candidates + 1 if assisted and logits is not None else _positions(logits),
        masked=_is_padded(mask) or past > 0 or bool(assisted),
        states=bool(setting("output_hidden_states")),
        attentions=bool(setting("output_attentions")),
        chunk=None if assisted or no_cache or kwargs.get("custom_generate") else setting("prefill_chunk_size"),
        whole=whole,
        remedy=f"this prompt runs in one piece because of {whole}; shorten it" if whole else "shorten the prompt",
    )


def by_name(native: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward of ``native``, by their names."""
    return dict(zip(_parameters(native), args, strict=False)) | dict(kwargs)


def of_forward(native: Any, args: Sequence[Any], kwargs: Mapping[str, Any], within: bool = False) -> Work:
    """What ``native(*args, **kwargs)`` asks for; raises ``PromptError`` for what the model cannot look up.

    ``within`` says that a generation calls it: what that goes on with it has sampled, and the host waits for no device.
    """
    given = by_name(native, args, kwargs)
    past = Cache.given(given).length
    goes_on = within and past > 0
    check_call(native, {k: v for k, v in given.items() if _is_on_host(v)} if goes_on else given)
    batch, tokens = prompt_shape(given)
    logits = given.get("logits_to_keep", 0) if "logits_to_keep" in _parameters(native) else None
    return Work(
        length=tokens + past, batch=batch, prompt=tokens, logits=_positions(logits),
        loss=given.get("labels") is not None, masked=past > 0 or _is_padded(given.get("attention_mask")),
        states=bool(given.get("output_hidden_states")), attentions=bool(given.get("output_attentions")),
        whole="the direct call", remedy="a direct call computes logits for all positions; give logits_to_keep=1 for "
        "the last one alone, or a shorter input",
    )  # fmt: skip


def _why_whole(native: Any, kwargs: Mapping[str, Any], setting: Callable[[str], Any], prompt: int, past: int) -> str:
    """What keeps transformers from cutting this prompt, or would make the answer another one; empty if nothing."""
    if setting("use_cache") is False:
        return "use_cache=False"
    named = ("custom_generate", "inputs_embeds", "output_hidden_states", "output_attentions")
    if found := next((name for name in named if setting(name) is not None and setting(name) is not False), ""):
        return found
    if past:  # transformers 5.15 takes a cache for empty when it cuts
        return "past_key_values"
    for name, value in kwargs.items():
        if name not in _CUT and isinstance(value, torch.Tensor) and value.dim() > 1:
            return name
    return _why_model_is_whole(native, prompt)


def _why_model_is_whole(native: Any, prompt: int) -> str:
    text = native.config.get_text_config()
    carries = text.model_type in STATEFUL_IN_CHUNKS
    # The first is what transformers goes by for caches. An encoder attends to what follows, too.
    if (
        not native._supports_default_dynamic_cache()
        or "past_key_values" not in _parameters(native)
        or (hasattr(text, "add_cross_attention") and not getattr(text, "is_decoder", True))
        or (native._is_stateful and not carries)
        or text.model_type in (WHOLE if since(5, 23) else WHOLE | WHOLE_AT_FIRST)
    ):
        return f"the architecture {text.model_type}"
    for one in rope_layers(text):
        # Their angles depend on the longest position seen so far.
        trained = one.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None) or 0
        if one.get("rope_type") in ("dynamic", "longrope") and prompt > trained:
            return f"rope_type={one['rope_type']}"
    return ""


def _positions(logits_to_keep: Any) -> int | None:
    if isinstance(logits_to_keep, torch.Tensor):
        return logits_to_keep.numel()
    return logits_to_keep or None


def _is_padded(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and (mask.dim() > 2 or not bool(mask.all()))


def _is_on_host(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"


def _parameters(native: Any) -> Mapping[str, inspect.Parameter]:
    return _parameters_of(type(native).forward)


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    _, *rest = inspect.signature(forward).parameters.items()  # without ``self``
    return dict(rest)
