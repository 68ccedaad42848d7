"""The RoPE scaling of a GGUF file in transformers' words: its own reader leaves out most of it.

llama.cpp keeps it in ``ARCH.rope.scaling.*``, as transformers has it in ``rope_parameters``, except for two kinds: the
factors of Llama 3 and LongRoPE are tensors, one number a frequency.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from .cursor import damaged
from .header import GGUFFile, dequantised

log = logging.getLogger(__name__)

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
# What every Llama of 3.1, 3.2 and 3.3 has; of its factor the tensor tells.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# llama.cpp's names → transformers'
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
_READ = {"type", "factor", "original_context_length", "attn_factor", "finetuned", *_YARN}


def scale_rope(config: Any, file: GGUFFile) -> None:
    """Put the RoPE scaling that a file's metadata and tensors say into its native config.

    A warning names what transformers has no words for, and from which length it matters.
    """
    prefix = f"{file.architecture}.rope.scaling."
    said = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    if (old := file.metadata.get(f"{file.architecture}.rope.scale_linear")) is not None:
        said.setdefault("factor", old)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        _warn(config, file, said, said)
        return
    # Of layers of two kinds those with a window have none.
    nested = isinstance(rope.get("full_attention"), dict)
    plain = dict(rope["full_attention"] if nested else rope)
    plain.setdefault("rope_type", "default")
    factors = {name: [float(factor) for factor in dequantised(file.tensors[name])]
               for name in TENSORS if name in file.tensors}  # fmt: skip
    if not nested:
        _check_heads(config, file, plain, factors)
    original = said.get("original_context_length")
    if original and hasattr(config, "original_max_position_embeddings"):  # which goes before that of the parameters
        config.original_max_position_embeddings = original
    made = _parameters(said, factors, plain, original or config.max_position_embeddings) or plain
    config.rope_parameters = {**rope, "full_attention": made} if nested else made
    is_other = said.get("type", "none") not in ("none", made["rope_type"])
    _warn(config, file, said, (set(said) - _READ) | ({"type"} if is_other else set()))


def _check_heads(config: Any, file: GGUFFile, plain: dict[str, Any], factors: Mapping[str, list[float]]) -> None:
    """Put the share of each head that is rotated into ``plain``, where it is known; a factor is for two of its values.

    Raises
    ------
    CheckpointError
        If there are more factors, or fewer.
    """
    if not factors and "partial_rotary_factor" not in plain:
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * plain.get("partial_rotary_factor", 1.0))
    said = file.metadata.get(f"{file.architecture}.rope.dimension_count")
    if "partial_rotary_factor" in plain and isinstance(said, int) and 0 < said <= head and said != rotated:
        plain["partial_rotary_factor"], rotated = said / head, said
    for name, numbers in factors.items():
        if 2 * len(numbers) != rotated:
            raise damaged(file.path, f"{name!r} has {len(numbers)} values, for heads of which {rotated} are rotated")


def _parameters(
    said: Mapping[str, Any], factors: Mapping[str, list[float]], plain: Mapping[str, Any], original: int
) -> dict[str, Any] | None:
    """The scaled parameters; ``None`` where there is no scaling, or none that is understood."""
    unscaled = {key: plain[key] for key in ("rope_theta", "partial_rotary_factor") if key in plain}
    kind, factor = said.get("type", "linear"), float(said.get("factor") or 1)
    if LONG in factors and SHORT in factors:
        made = _longrope(factors[LONG], factors[SHORT], original)
        return unscaled | made | ({"attention_factor": said["attn_factor"]} if "attn_factor" in said else {})
    if FREQS in factors:
        numbers = [number * factor for number in factors[FREQS]]
        if plain["rope_type"] == "proportional" and set(numbers) <= {1.0, max(numbers)}:
            return None  # frequencies that are left out, which transformers knows by itself
        as_they_are = _longrope(numbers, numbers, original) | {"factor": 1.0, "attention_factor": 1.0}
        return unscaled | (_llama3(numbers, plain["rope_theta"]) or as_they_are)
    if kind == "linear" and factor != 1:
        return unscaled | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        named = {theirs: said[ours] for ours, theirs in _YARN.items() if ours in said}
        return unscaled | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | named
    return None


def _longrope(long: list[float], short: list[float], original: int) -> dict[str, Any]:
    return {"rope_type": "longrope", "long_factor": long, "short_factor": short,
            "original_max_position_embeddings": original}  # fmt: skip


def _llama3(factors: list[float], theta: float) -> dict[str, Any] | None:
    """The parameters that give these factors; ``None`` where only the list of them says it."""
    largest, low, high = max(factors), _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    for number, factor in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (number / len(factors))
        turns = _LLAMA3["original_max_position_embeddings"] / wavelength
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(factor, 1 / ((1 - kept) / largest + kept), rel_tol=1e-5):
            return None
    return {"rope_type": "llama3", "factor": largest, **_LLAMA3}


def _warn(config: Any, file: GGUFFile, said: Mapping[str, Any], names: Any) -> None:
    if names:
        left_out = ", ".join(f"rope.scaling.{name}={said[name]}" for name in sorted(names))
        length = said.get("original_context_length") or getattr(config, "max_position_embeddings", 0)
        log.warning("%s: its RoPE scaling is not what transformers knows here and is left out (%s); beyond %s tokens "
                    "answers get worse", file.path.name, left_out, f"{length:,}")  # fmt: skip
