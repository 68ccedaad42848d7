"""Text or chat messages → the tensors that ``generate`` takes, and the refusals that belong to prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import PromptError

Prompt = str | Sequence[Mapping[str, str]]


def encode(tokenizer: Any, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """The prompt as the model sees it, and its ``input_ids`` and ``attention_mask``, ``[1, tokens]``.

    Where the tokenizer knows tokens that end an answer in a chat (``chat_stop_ids``), messages bring ``eos_token_id``.

    Raises
    ------
    PromptError
        If there is nothing in it, or messages are given to a model without a chat template.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise PromptError("the prompt is empty; write what the model should continue or answer")
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_tensors="pt")
        return prompt, {key: encoded[key] for key in ("input_ids", "attention_mask")}
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("this model has no chat template; give the prompt as plain text (without --chat)")
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens already.
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    stops = getattr(tokenizer, "chat_stop_ids", None)
    ends = {"eos_token_id": stops} if stops else {}
    return text, {key: encoded[key] for key in ("input_ids", "attention_mask")} | ends


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
        return prompt + int(new)
    # Where nothing is said, transformers writes 20 tokens.
    return prompt + 20 if longest is None else max(int(longest), prompt + 1)


def sequences(batch: int, setting: Callable[[str], Any]) -> int:
    """How many sequences run at once: batch × beams (or returned sequences)."""
    return batch * max(int(setting(name) or 1) for name in ("num_beams", "num_return_sequences"))
