"""config.json → transformers' own config, or a refusal that names the architecture and what would work."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from ..checkpoint.legacy.families import ATTENTION, family_of, native_dict
from ..checkpoint.sizes import AskHolds, check_sizes
from ..encoding.formats import check as check_quantisation
from ..encoding.formats import quantisation
from ..errors import CheckpointError, UnsupportedModelError
from .attention import attend_by


def native_config(config: Mapping[str, Any], trust_remote_code: bool = False, holds: AskHolds = lambda: None) -> Any:
    """The native config object for a checkpoint's ``config.json``, those of the mapped families included.

    Parameters
    ----------
    holds
        What the weight files hold, which is all that a config may ask for.

    Raises
    ------
    UnsupportedModelError
        If transformers has no causal language model of this type; code of the repository is never run.
    CheckpointError
        If the native class refuses the values, or they ask for more than the files hold.
    """
    from transformers import CONFIG_MAPPING

    check_supported(config, trust_remote_code)
    native = native_dict(config)
    check_sizes(native, holds)
    model_type = native.get("model_type", "")
    values = _without(native, _NOT_TAKEN)
    kind = CONFIG_MAPPING[model_type]
    try:
        # transformers writes infinity as {"__float__": "Infinity"}.
        made = kind.from_dict(kind._decode_special_floats(values))
    except Exception as error:  # config classes raise whatever their validators do
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"config.json is not one that {model_type} accepts ({reason}); download it again"
        ) from None
    _check_common(made)
    if model_type == "rwkv":
        # It would halve states every few layers, and divide the weights for that in place, against overflow in float16.
        made.rescale_every = 0
    if native is not config and ATTENTION in native:
        attend_by(made, native[ATTENTION])
    return made


def _check_common(made: Any) -> None:
    """What any class reads, and not all of them declare, so that nobody has looked at its type."""
    for name, kind in (("sliding_window", int), ("attention_chunk_size", int), ("is_encoder_decoder", bool)):
        with suppress(RuntimeError):  # one a layer: none for all
            value = getattr(made.get_text_config(), name, None)
            if value is not None and (not isinstance(value, kind) or abs(value) >= 1 << 62):
                raise CheckpointError(f"config.json is damaged: {name} is {reprlib.repr(value)}; download it again")


# An attention or an expert implementation may name code on the Hub, or a library that is not here.
_NOT_TAKEN = frozenset({
    "auto_map", "quantization_config", "compression_config", ATTENTION, "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal",
})  # fmt: skip


def _without(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A config, and those of its parts, without the entries of these names."""
    return {key: _without(value, names) if key.endswith("_config") and isinstance(value, Mapping) else value
            for key, value in config.items() if key not in names}  # fmt: skip


def check_supported(config: Mapping[str, Any], trust_remote_code: bool = False, model: str = "") -> None:
    """Refuse what cannot run here, from ``config.json`` alone; ``model`` is its name. See :func:`native_config`."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL

    if not isinstance(config.get("model_type", ""), str) or not isinstance(config.get("architectures") or [], list):
        raise CheckpointError(f"{model or 'config.json'} is damaged: model_type should be text and architectures a "
                              "list; download it again")  # fmt: skip
    given, config = config, native_dict(config)
    model_type = config.get("model_type", "")
    name = next(iter(config.get("architectures") or []), model_type or "unknown")
    foreign = (
        "; its own code is never run here, trust_remote_code=True does not change that"
        if trust_remote_code
        else "; its repository brings code of its own, which is never run here"
    )
    foreign = foreign if "auto_map" in config else ""
    # Of several parts, one a decoder that runs on text alone.
    has_decoder = model_type in MULTIMODAL and "text_config" in config and not config.get("is_encoder_decoder")
    if model_type not in CONFIG_MAPPING or not (model_type in CAUSAL or has_decoder):
        near = difflib.get_close_matches(model_type, [key for key in CAUSAL if key in CONFIG_MAPPING], n=3, cutoff=0.3)
        hint = f"; the closest supported types: {', '.join(near)}" if near else ""
        why = "is no causal language model" if model_type in CONFIG_MAPPING else "is not known to transformers"
        raise UnsupportedModelError(f"{name} (model_type {model_type!r}) {why}{foreign}{hint}")
    if quantisation(config) and family_of(given) is not None:
        raise UnsupportedModelError(f"{name} is quantised ({quantisation(config)['quant_method']}) in a layout of its "
                                    "own; load the unquantised checkpoint, with compression='4bit'")  # fmt: skip
    check_quantisation(config, model or name)
