"""Numbers of tokens and of positions are looked up in tables: one that is outside is said before anything runs.

On a GPU such a number is an assertion of the device, after which the process can do nothing more with it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import OptionError, PromptError
from ..plan.needs import context_length
from .cache import Cache
from .prompt import prompt_shape
from .settings import token_settings

# What architectures call a table of learned positions; one of relative positions is bounded by itself.
_POSITIONS = re.compile(r"^wpe$|^(?!.*(relative|bias)).*posi")
# Only compared with tokens, not looked up: one that never comes is none, as transformers has it.
_COMPARED = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")
# Parts for images and sound count positions of their own.
_NOT_TEXT = re.compile("vision|visual|image|img|audio|speech")
_PASTS = ("past_key_values", "cache_params", "state")  # of recurrent models
_IGNORED = -100  # in labels: no loss for this position


def check_call(native: Any, given: Mapping[str, Any]) -> None:
    """Refuse tensors of a call that the model cannot look up.

    Parameters
    ----------
    given
        The arguments of ``generate`` or of a forward, by name.

    Raises
    ------
    PromptError
        Which names the number, its position and what there is.
    """
    rows = vocabulary(native)
    for name in ("inputs", "input_ids", "decoder_input_ids"):
        if isinstance(value := given.get(name), torch.Tensor) and not (name == "inputs" and value.is_floating_point()):
            _check_ids(value, name, rows)
    if isinstance(labels := given.get("labels"), torch.Tensor):
        _check_ids(labels, "labels", rows, (_IGNORED,))
    embeds = given.get("inputs_embeds")
    width = getattr(native.get_input_embeddings(), "embedding_dim", None) if embeds is not None else None
    if isinstance(embeds, torch.Tensor) and (embeds.dim() != 3 or (width and embeds.shape[-1] != width)):
        raise PromptError(f"inputs_embeds has the shape {list(embeds.shape)}; the model takes [batch, tokens, {width}]")
    _check_mask(given)
    table = getattr(native, "_learned_positions", None)
    if table is not None and isinstance(places := given.get("position_ids"), torch.Tensor) and places.numel():
        low, high = _limits(places)
        if low < 0 or high >= table:
            raise PromptError(
                f"position_ids has {low if low < 0 else high}; this model has positions 0 to {table - 1:,}"
            )


def check_settings(native: Any, setting: Callable[[str], Any]) -> None:
    """Refuse settings of ``generate`` that name a token which the model does not have.

    Raises
    ------
    OptionError
        Which names the setting and the token.
    """
    rows = vocabulary(native)
    for name, values in token_settings(setting):
        for value in values:
            wrong = isinstance(value, int) and name not in _COMPARED and not 0 <= value < (rows or value + 1)
            if wrong:
                raise OptionError(f"{name} names the token {value}; {_has(rows)}")


def vocabulary(native: Any) -> int | None:
    """How many tokens the model knows; ``None`` where it has no single table of them."""
    try:
        table = native.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(table, "num_embeddings", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def guard_positions(native: Any) -> None:
    """Have every forward of a model with learned positions refuse what is longer than those, also inside ``generate``.

    It then raises a ``PromptError``. Call it once, after the model is built.
    """
    longest = context_length(native.config)
    tables = [
        module for name, module in native.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name.rpartition(".")[2])
        and not _NOT_TEXT.search(name)
    ]  # fmt: skip
    native._learned_positions = longest if tables else None
    if not tables or not longest or native.config.is_encoder_decoder:
        return
    # Some begin to count behind the number that fills.
    offsets = [0 if table.padding_idx is None else table.padding_idx + 1 for table in tables]
    rows = min(longest, *(table.num_embeddings - offset for table, offset in zip(tables, offsets, strict=True)))
    names = list(inspect.signature(native.forward).parameters)

    def check(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        length = Cache.given(given).length + prompt_shape(given)[1]
        if length > rows:
            raise PromptError(f"{length:,} tokens are too many: this model has learned {rows:,} positions; shorten the "
                              "prompt, or ask for fewer tokens")  # fmt: skip

    native.register_forward_pre_hook(check, with_kwargs=True)


def _check_ids(ids: torch.Tensor, name: str, rows: int | None, allowed: Iterable[int] = ()) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = str(ids.dtype).removeprefix("torch.")
        raise PromptError(f"{name} is a tensor of {kind}; numbers of tokens are whole: use .long()")
    if not ids.numel() or ids.device.type == "meta":
        return
    low, high = _limits(ids)
    if low >= 0 and (rows is None or high < rows):
        return
    bad = (ids < 0) | (ids >= (rows or high + 1))
    for value in allowed:
        bad &= ids != value
    places = bad.nonzero()
    if len(places):
        place = tuple(places[0].tolist())
        raise PromptError(f"{name} has the token {int(ids[place])} at {list(place)}; {_has(rows)}")


def _limits(values: torch.Tensor) -> tuple[int, int]:
    low, high = torch.stack(torch.aminmax(values)).tolist()  # one way to a device and back
    return low, high


def _has(rows: int | None) -> str:
    if rows is None:
        return "no token has a negative number"
    return (f"the model has {rows:,}, numbered from 0: a tokenizer with more tokens (added ones?) belongs to another "
            "checkpoint")  # fmt: skip


def _check_mask(given: Mapping[str, Any]) -> None:
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    ids = given.get("inputs") if ids is None else ids
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return
    past = next((given[name] for name in _PASTS if given.get(name) is not None), None)
    longest = mask.shape[1] >= ids.shape[1] if past is not None else mask.shape[1] == ids.shape[1]
    if mask.shape[0] != ids.shape[0] or not longest:
        raise PromptError(f"attention_mask has the shape {list(mask.shape)}, and the tokens {list(ids.shape)}; it "
                          "takes one number a token, 1 for those that count")  # fmt: skip
