"""Text or chat messages → the tensors that ``generate`` takes, and the refusals that belong to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import PromptError

Prompt = str | Sequence[Mapping[str, str]]


def encode(tokenizer: Any, prompt: Prompt) -> tuple[str, dict[str, torch.Tensor]]:
    """The prompt as the model sees it, and its ``input_ids`` and ``attention_mask``, ``[1, tokens]``.

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
    return text, {key: encoded[key] for key in ("input_ids", "attention_mask")}


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


def total_length(ids: Any, generation_config: Any, given: Mapping[str, Any]) -> int:
    """How long the sequence may become, in tokens."""
    prompt = ids.shape[-1] if isinstance(ids, torch.Tensor) else 1
    new = given.get("max_new_tokens", getattr(generation_config, "max_new_tokens", None))
    if new is not None:
        return prompt + int(new)
    return max(int(given.get("max_length") or getattr(generation_config, "max_length", None) or 20), prompt + 1)


def sequences(ids: Any, generation_config: Any, given: Mapping[str, Any]) -> int:
    """How many sequences run at once: batch × beams (or returned sequences)."""
    batch = ids.shape[0] if isinstance(ids, torch.Tensor) and ids.dim() > 1 else 1
    beams = given.get("num_beams") or getattr(generation_config, "num_beams", None) or 1
    returned = given.get("num_return_sequences") or getattr(generation_config, "num_return_sequences", None) or 1
    return batch * max(int(beams), int(returned))
