"""What ``generate`` goes by: arguments, a config that is passed, the checkpoint's own defaults; and what can be true.

An answer is one text that comes token by token. Where a caller asks for something else, that is refused; where the
checkpoint's defaults do, they are left aside with a warning.
"""

from __future__ import annotations

import copy
import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk import read_json
from ..errors import OptionError
from ..flags import check_text

log = logging.getLogger(__name__)

# Setting → what it is where an answer can stream.
_ONE_TEXT: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": None, "penalty_alpha": None,
    "dola_layers": None, "constraints": None, "force_words_ids": None, "custom_generate": None,
}  # fmt: skip
# Setting → the least whole number that it can be.
_WHOLE = {
    "max_new_tokens": 1, "max_length": 0, "min_new_tokens": 0, "min_length": 0, "num_beams": 1, "num_beam_groups": 1,
    "num_return_sequences": 1, "top_k": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "prompt_lookup_num_tokens": 1, "max_matching_ngram_size": 1, "num_assistant_tokens": 1, "prefill_chunk_size": 1,
}  # fmt: skip
# Setting → between what it is.
_REAL = {
    "temperature": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (1e-3, 1), "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1), "repetition_penalty": (1e-3, math.inf), "encoder_repetition_penalty": (1e-3, math.inf),
    "length_penalty": (-math.inf, math.inf), "diversity_penalty": (-math.inf, math.inf), "max_time": (0, math.inf),
    "penalty_alpha": (0, 1), "guidance_scale": (-math.inf, math.inf), "top_h": (0, 1),
}  # fmt: skip
_FLAGS = (
    "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "output_scores", "output_logits",
    "output_attentions", "output_hidden_states", "return_dict_in_generate", "token_healing", "low_memory",
)  # fmt: skip
# One token or several; of one token only.
_TOKENS = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_TOKEN = ("pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
TOKEN_SETTINGS = (*_TOKENS, *_TOKEN)
_SETTINGS = (*_WHOLE, *_REAL, *_FLAGS, *TOKEN_SETTINGS)
_DICTS = ("watermarking_config", "cache_config", "compile_config")


def effective(native: Any, kwargs: Mapping[str, Any]) -> Callable[[str], Any]:
    """Looks a setting up as ``native.generate(**kwargs)`` will: ``None`` where nobody says anything."""
    configs = (kwargs.get("generation_config"), native.generation_config)

    def setting(name: str) -> Any:
        if name in kwargs:
            return plain_number(kwargs[name])
        said = (value for config in configs if (value := getattr(config, name, None)) is not None)
        return plain_number(next(said, None))

    return setting


def as_whole(value: Any, otherwise: int) -> int:
    """A number that sizes something; ``otherwise`` where it is none, which transformers then says."""
    value = plain_number(value)
    is_number = _is_whole(value) or (_is_real(value) and math.isfinite(value))
    return int(value) if is_number else otherwise


def plain_number(value: Any) -> Any:
    """The number of Python that one of another library, or a tensor or an array without dimensions, stands for."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not getattr(value, "is_meta", False):
        value = value.item()
    if _is_whole(value):
        return int(value)
    return float(value) if _is_real(value) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def complaint(name: str, value: Any) -> str:
    """What is wrong with a setting, to stand behind ``name=value``; empty where nothing is, or it is not known."""
    value = plain_number(value)
    if value is None:
        return ""
    is_whole = _is_whole(value)
    if name in _WHOLE and not (is_whole and value >= _WHOLE[name]):
        return f"must be a whole number of {_WHOLE[name]} or more"
    if name in _REAL:
        low, high = _REAL[name]
        if not _is_real(value) or not low <= value <= high or value in (math.inf, -math.inf):
            limits = f" of {low} or more" if high == math.inf else f" from {low} to {high}"
            return f"must be a number{limits if low > -math.inf else ''}"
    if name in _FLAGS and not (isinstance(value, int) and value in (0, 1)):
        return "must be True or False"
    if name in _TOKEN and not is_whole and not (name == "forced_eos_token_id" and _are_whole(value)):
        return "must be the number of a token"
    if name in _TOKENS and not is_whole and not _are_whole(value):
        return "must be the number of a token, or a list of such numbers"
    if name == "stop_strings" and not _are_texts(value):
        return "must be text, or a list of texts, none of them empty"
    if name in _DICTS and not _are_numbers(value):
        return "must be a dict of numbers and names"
    return ""


def _are_numbers(value: Any) -> bool:
    """Of names that are of numbers; a config of transformers' own has looked at them."""
    if not isinstance(value, Mapping):
        return hasattr(value, "to_dict")
    texts = (name for name, each in value.items() if isinstance(each, str))
    return not {"bias", "greenlist_ratio", "hashing_key", "context_width", "ngram_len"} & set(texts)


def _are_whole(value: Any) -> bool:
    if hasattr(value, "tolist"):
        value = value.tolist()
    return all(map(_is_whole, map(plain_number, value if isinstance(value, (list, tuple)) else [value])))


def _are_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, (list, tuple)) and all(isinstance(each, str) and each for each in texts)


def for_answer(
    native: Any, tokenizer: Any, kwargs: Mapping[str, Any], max_new_tokens: Any, stop: Any
) -> tuple[dict[str, Any], list[str]]:
    """Arguments for ``generate`` that make one text, and the texts that end it.

    Raises
    ------
    OptionError
        If the caller asks for several texts, for something that does not stream, or for what cannot be.
    """
    kwargs = {name: plain_number(value) if name in _SETTINGS else value for name, value in kwargs.items()}
    passed, max_new_tokens = kwargs.get("generation_config"), plain_number(max_new_tokens)
    given = {**(_said(passed) if passed is not None else {}), **kwargs, "max_new_tokens": max_new_tokens}
    for name, value in given.items():
        if problem := complaint(name, value):
            raise OptionError(f"{name}={_short(value)} {problem}")
    if max_new_tokens is None:
        raise OptionError("max_new_tokens=None must be a whole number of 1 or more")
    least = given.get("min_new_tokens")
    if least is not None and least > max_new_tokens:
        raise OptionError(f"min_new_tokens={least} is more than max_new_tokens={max_new_tokens}; ask for fewer")
    if stop is not None and not _are_texts(stop):
        raise OptionError(f"stop={_short(stop)} must be text, or a list of texts, none of them empty")
    setting = effective(native, kwargs)
    aside: dict[str, Any] = {}
    for name, plain in _ONE_TEXT.items():
        value = setting(name)
        if value is None or value == plain or (plain is None and value in (0, False)):
            continue
        if given.get(name) is not None:
            raise OptionError(f"{name}={_short(value)}: beams, several texts and the like do not stream, an answer is "
                              "one text that comes token by token; use model.generate for them")  # fmt: skip
        aside[name] = plain
        said = native.__dict__.setdefault("_left_aside", set())
        if name in said:
            continue
        said.add(name)
        log.warning("%s=%s of the checkpoint's generation_config.json is left aside: an answer is one text that comes "
                    "token by token (model.generate goes by it)", name, _short(value))  # fmt: skip
    if setting("do_sample") and setting("temperature") == 0:
        aside |= {"do_sample": False, "temperature": None}
    kwargs.update(aside)
    if passed is not None and aside:  # which is completed by the checkpoint's, and looked at, before the rest counts
        kwargs["generation_config"] = copy.deepcopy(passed)
        for name, plain in aside.items():
            setattr(kwargs["generation_config"], name, plain)
    own = setting("stop_strings") or []
    stops = list(dict.fromkeys([*([stop] if isinstance(stop, str) else stop or []),
                                *([own] if isinstance(own, str) else own)]))  # fmt: skip
    for text in stops:
        check_text(text, "a text that ends the answer")
    if stops:
        kwargs.update(stop_strings=stops, tokenizer=tokenizer)
    return kwargs, stops


def _said(config: Any) -> dict[str, Any]:
    return {name: value for name in (*_SETTINGS, *_ONE_TEXT, "stop_strings")
            if (value := getattr(config, name, None)) is not None}  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def checkpoint_defaults(folder: Path, config: Any) -> Any:
    """The checkpoint's own ``GenerationConfig``; what in its file cannot be is left out, with a warning.

    Parameters
    ----------
    config
        The native config, whose values stand in.
    """
    from transformers import GenerationConfig

    vocabulary = getattr(config.get_text_config(), "vocab_size", None)

    def of_model() -> Any:
        made = GenerationConfig.from_model_config(config)
        for name in _wrong(made.to_dict(), vocabulary, folder / "config.json"):
            setattr(made, name, getattr(GenerationConfig(), name, None))
        return made

    file = folder / "generation_config.json"
    values = read_json(file, optional=True)
    if values is None:
        return of_model()
    wrong = _wrong(values, vocabulary, file)
    try:
        made = GenerationConfig.from_dict({name: value for name, value in values.items() if name not in wrong})
    except Exception as error:  # whatever its own checks say
        log.warning("%s cannot be used (%s); going on without it", file, " ".join(str(error).split())[:160])
        return of_model()
    if "eos_token_id" in wrong:
        made.eos_token_id = of_model().eos_token_id
    return made


def _wrong(values: Mapping[str, Any], vocabulary: int | None, file: Path) -> Mapping[str, str]:
    """The settings of a file that cannot be, each said: what is wrong with them."""
    wrong = {name: problem for name, value in values.items() if (problem := complaint(name, value))}
    for name in _TOKEN:  # -1 is written for "none"; as a fill between sequences it would be looked up
        value = values.get(name)
        if name not in wrong and isinstance(value, int) and not 0 <= value < (vocabulary or math.inf):
            wrong[name] = f"is no token of {vocabulary:,}" if value >= 0 else ""
    for name, problem in wrong.items():
        level = logging.WARNING if problem else logging.INFO
        log.log(level, "%s: %s=%s %s; going on without it", file, name, _short(values[name]), problem or "is no token")
    return wrong


def token_settings(setting: Callable[[str], Any]) -> list[tuple[str, Sequence[Any]]]:
    """The tokens that settings name, with the name of the setting: all of them are looked up or written somewhere."""
    named: list[tuple[str, Sequence[Any]]] = []
    for name in TOKEN_SETTINGS:
        value = setting(name)
        if value is not None:
            named.append((name, list(_flat(value))))
    for name in ("bad_words_ids", "force_words_ids", "forced_decoder_ids"):
        named.append((name, list(_flat(setting(name) or []))))
    bias = setting("sequence_bias")
    if isinstance(bias, Mapping):
        named.append(("sequence_bias", list(_flat(list(bias)))))
    elif isinstance(bias, (list, tuple)):
        named.append(("sequence_bias", list(_flat([pair[:1] for pair in bias if isinstance(pair, (list, tuple))]))))
    return named


def _flat(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value
