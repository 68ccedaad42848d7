"""Text or chat messages → the tensors that ``generate`` takes, and the refusals that belong to prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import PromptError
from ..flags import check_text
from .settings import as_whole
from .template import render

_EMPTY = "the prompt is empty; write what the model should continue or answer"
Prompt = str | Sequence[Mapping[str, str]]


# Characters of a text of which the first so many tell whether all of it can be a prompt.
_SAMPLE = 1 << 20


def encode(tokenizer: Any, prompt: Any, context: int | None = None) -> tuple[str, dict[str, Any]]:
    """Text, or a list of chat messages, as the model sees it; ``input_ids`` and ``attention_mask``, ``[1, tokens]``.

    Where the tokenizer knows tokens that end an answer in a chat (``chat_stop_ids``), messages bring ``eos_token_id``.

    Raises
    ------
    PromptError
        If there is nothing in it, it is no text or no messages, it is far longer than ``context`` tokens, or the model
        has no chat template for messages, or one that refuses these.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError(_EMPTY)
        check_text(prompt)
        return prompt, _tokens(tokenizer, prompt, context)
    if isinstance(prompt, (bytes, bytearray, memoryview)) or not isinstance(prompt, Sequence):
        if prompt is None:
            raise PromptError(_EMPTY)
        if isinstance(prompt, Mapping):
            raise PromptError("the prompt is one message; chat messages come as a list, [{...}]")
        if isinstance(prompt, torch.Tensor):
            raise PromptError("the prompt is a tensor; for token ids use model.generate(input_ids)")
        check_text(prompt)
    if not prompt:
        raise PromptError(_EMPTY)
    check_messages(prompt)
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("this model has no chat template; give the prompt as plain text (without --chat)")
    text = render(tokenizer, prompt)
    check_text(text, "what the model's chat template makes")
    # The template has written the special tokens already.
    stops = getattr(tokenizer, "chat_stop_ids", None)
    ends = {"eos_token_id": stops} if stops else {}
    return text, _tokens(tokenizer, text, context, add_special_tokens=False) | ends


def _tokens(tokenizer: Any, text: str, context: int | None, **options: Any) -> dict[str, Any]:
    if context is not None and len(text) > _SAMPLE:
        tokens = len(tokenizer(text[:_SAMPLE], **options)["input_ids"])
        if tokens > 2 * context:
            raise PromptError(f"the prompt has {len(text):,} characters, of which the first {_SAMPLE:,} alone are "
                              f"{tokens:,} tokens, and the context is {context:,}; shorten the prompt")  # fmt: skip
    try:
        encoded = tokenizer(text, return_tensors="pt", **options)
    except (
        BaseException
    ) as error:  # whatever a tokenizer of any family runs into; its library's panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:160]
        raise PromptError(f"the model's tokenizer cannot read the prompt ({type(error).__name__}: {said})") from error
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def check_messages(messages: Sequence[Any]) -> None:
    """Refuse what are no chat messages.

    Raises
    ------
    PromptError
        Which names the message, counted from 1.
    """
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {number} is {type(message).__name__}; a chat message is a dict, as in "
                              '{"role": "user", "content": "…"} (one prompt of text: give it alone)')  # fmt: skip
        if not isinstance(message.get("role"), str):
            raise PromptError(f'message {number} has no role; give "role": "user", "assistant" or "system"')
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise PromptError(f'message {number} has no content; give "content": "…"')
        if isinstance(content, (bytes, bytearray)) or not (content is None or isinstance(content, (str, Sequence))):
            check_text(content, f"the content of message {number}")
        _check_plain(message, f"message {number}")


def _check_plain(value: Any, where: str) -> None:
    """Templates get plain values; of what is of other kinds they would write the name, or call methods."""
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, Mapping):
        kind = value.get("type")
        if kind in ("image", "image_url", "audio", "input_audio", "video"):
            raise PromptError(f"{where} holds a part of type {kind!r}; text is all that goes in here")
        for key, each in value.items():
            _check_plain(each, f"{where}: {key}" if isinstance(key, str) else where)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_plain(each, where)
    elif not (value is None or isinstance(value, (bool, int, float))):
        raise PromptError(f"{where} holds {type(value).__name__}; messages are made of text, numbers, lists and dicts")


def check_length(ids: Any, context: int | None) -> None:
    """Refuse prompts without tokens and prompts that leave no room for an answer.

    Parameters
    ----------
    ids
        ``[batch, tokens]``, or ``None`` when there is nothing to check.
    context
        The longest sequence in tokens.
    """
    if ids is None:
        return
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        got = f"a tensor of shape {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise PromptError(f"generate takes token ids as a tensor [batch, tokens], this is {got}; for text use "
                          "model.stream(text) or model.answer(text)")  # fmt: skip
    if ids.numel() == 0:
        raise PromptError("the prompt is empty; give at least one token")
    if context is not None and ids.shape[-1] >= context:
        raise PromptError(f"the prompt has {ids.shape[-1]:,} tokens and the context {context:,}, answer included; "
                          "shorten the prompt, or load with a larger max_seq_len if the model allows it")  # fmt: skip


def prompt_shape(given: Mapping[str, Any]) -> tuple[int, int]:
    """``(batch, tokens)`` of what a call is given: token ids, or embeddings in their place."""
    for name in ("inputs_embeds", "inputs", "input_ids"):
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1]:
            return value.shape[0], value.shape[1]
    return 1, 1


def total_length(prompt: int, setting: Callable[[str], Any]) -> int:
    """How long a sequence may become, in tokens; ``setting`` looks up what ``generate`` will go by."""
    new, longest = setting("max_new_tokens"), setting("max_length")
    if new is not None:
        return prompt + as_whole(new, 20)
    # Where nothing is said, transformers writes 20 tokens.
    return prompt + 20 if longest is None else max(as_whole(longest, 0), prompt + 1)


def sequences(batch: int, setting: Callable[[str], Any]) -> int:
    """How many sequences run at once: batch × beams (or returned sequences)."""
    return batch * max(as_whole(setting(name), 1) for name in ("num_beams", "num_return_sequences"))
