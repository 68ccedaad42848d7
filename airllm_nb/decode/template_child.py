"""Run as a script: renders chat templates, each within its share of processor time and memory, until stdin ends.

A template is a program that came with a model. The sandbox that it runs in keeps it from files, not from running for
ever; the system keeps this process from that.
"""

from __future__ import annotations

import json
import pickle
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO


def _main(requests: BinaryIO, answers: BinaryIO) -> None:
    sys.path[:] = pickle.load(requests)
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    while True:
        try:
            given = pickle.load(requests)
        except EOFError:
            return
        _allow(given.pop("seconds"), given.pop("nbytes"))
        answer = json.dumps(_rendered(PreTrainedTokenizerBase.apply_chat_template, **given)).encode()
        _allow(0, 0)
        answers.write(len(answer).to_bytes(8, "little") + answer)
        answers.flush()


def _rendered(
    apply: Any, messages: list[Any], template: str, special_tokens: dict[str, Any], characters: int
) -> tuple[str, str]:
    """``("", text)``, or the kind of the error and what it says."""
    # All that it asks of a tokenizer where nothing is tokenised.
    tokenizer = SimpleNamespace(get_chat_template=lambda *_, **__: template, special_tokens_map=special_tokens)
    try:
        text = apply(tokenizer, messages, tokenize=False, add_generation_prompt=True)
    except BaseException as error:  # whatever a template does
        return type(error).__name__, str(error)[:500]
    return ("", text) if len(text) <= characters else ("MemoryError", "")


def _allow(seconds: float, nbytes: int) -> None:
    """More than that ends this process, or is a ``MemoryError``; 0 is without end."""
    with suppress(ImportError, AttributeError, OSError, ValueError):  # not on every system
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor, not of the clock
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + nbytes if nbytes else hard, hard))


if __name__ == "__main__":
    output, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no answer
    _main(sys.stdin.buffer, output)
