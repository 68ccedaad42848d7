"""Chat messages → text, by the model's own chat template, which is a program that came with it.

It is rendered as ``apply_chat_template`` renders it, but in a process of its own that has a few seconds and some memory
for it; that one is kept for the next messages, and ends with this one.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import GiB, MiB, format_bytes
from ..errors import PromptError

CHILD = Path(__file__).with_name("template_child.py")
# Of the processor; and of the clock, which goes on where the machine is busy.
SECONDS, PATIENCE = 5.0, 120.0
# Beside what the messages themselves take. A text that is longer is no prompt of any model.
NBYTES, CHARACTERS = 512 * MiB, 64 << 20
_PLAIN = "give the prompt as plain text (without --chat)"


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """What ``tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)`` gives.

    Raises
    ------
    PromptError
        If the template refuses the messages, is broken, gives nothing, or does not come to an end.
    """
    from transformers import PreTrainedTokenizerBase

    try:
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            # A library's own way, not a template.
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            kind, said = "", text  # of a subclass of str, perhaps, by which it knows its own text
        else:
            template, special = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
            if not isinstance(template, str):
                raise TypeError(f"it is {type(template).__name__}, no text")
            question = {"messages": [dict(one) for one in messages], "template": template, "special_tokens": special}
            kind, said = _renderer.ask(question)
    except PromptError:
        raise
    except Exception as error:  # whatever a tokenizer of any family runs into
        kind, said = type(error).__name__, str(error)
    if kind:
        raise PromptError(_explained(kind, " ".join(said.split())[:200], messages))
    if not said.strip():
        raise PromptError(f"the model's chat template makes nothing of these messages; {_PLAIN}")
    return said


def _explained(kind: str, said: str, messages: Sequence[Mapping[str, Any]]) -> str:
    if kind == "MemoryError":
        return f"the model's chat template makes more of these messages than fits in memory; {_PLAIN}"
    if kind == "TemplateError":  # raised by the template itself
        has_system = any(message.get("role") == "system" for message in messages)
        remedy = "leave the system message out (without --system)" if has_system else "change the messages"
        return f"the model's chat template refuses these messages: {said}; {remedy}, or {_PLAIN}"
    return f"the model's chat template does not work ({kind}: {said}); {_PLAIN}, or set tokenizer.chat_template"


class _Renderer:
    """The process, started when it is first asked. One question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, question: dict[str, Any]) -> tuple[str, str]:
        """``("", text)``, or the kind of an error and what it says."""
        data = pickle.dumps(question)
        room = NBYTES + 32 * len(data)
        limits = {"seconds": SECONDS + len(data) / MiB, "nbytes": room, "characters": CHARACTERS}
        with self._lock:
            child = self._started()
            # A clock that ends what the processor's own does not: a child that waits, or a system without such clocks.
            late = threading.Event()

            def end() -> None:
                late.set()
                child.kill()

            clock = threading.Timer(PATIENCE, end)
            clock.daemon = True
            clock.start()
            done = False
            try:
                answer = self._exchange(child, pickle.dumps({**question, **limits}))
                done = answer is not None
            finally:  # Ctrl-C comes through here too
                clock.cancel()
                if not done:
                    self.close()
        if answer is not None:
            return answer[0], answer[1]
        ends = [-getattr(signal, name) for name in ("SIGKILL", "SIGPROF") if hasattr(signal, name)]  # not on Windows
        if late.is_set() or child.returncode in ends:
            raise PromptError(f"the model's chat template does not come to an end within {limits['seconds']:.0f} s; "
                              f"{_PLAIN}")  # fmt: skip
        raise PromptError(f"the model's chat template ends the process that renders it (code {child.returncode}), "
                          f"which has {format_bytes(room)} for it; {_PLAIN}")  # fmt: skip

    def _exchange(self, child: subprocess.Popen[bytes], data: bytes) -> list[str] | None:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(data)
            child.stdin.flush()
        except OSError:  # it has ended
            child.wait()
            return None
        size = int.from_bytes(child.stdout.read(8), "little")
        answer = child.stdout.read(size) if 0 < size < GiB else b""
        if size and len(answer) == size:
            return list(json.loads(answer))
        child.kill() if size else None
        child.wait()
        return None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None and self._owner == os.getpid():
            return self._child
        self.close()
        if not sys.executable or getattr(sys, "frozen", False):
            raise PromptError(f"there is no Python to render the model's chat template with; {_PLAIN}")
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            # A session of its own: Ctrl-C is for this process, which ends that one.
            child = subprocess.Popen(
                [sys.executable, "-I", str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True, env=os.environ | one,
            )  # fmt: skip
        except OSError as error:
            raise PromptError(f"no process can be started to render the model's chat template ({error}); "
                              f"{_PLAIN}") from None  # fmt: skip
        self._child, self._owner = child, os.getpid()
        assert child.stdin is not None
        child.stdin.write(pickle.dumps([path for path in sys.path if path]))
        return child

    def close(self) -> None:
        """End it; the next question starts another."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not sent yet cannot be
                    continue


_renderer = _Renderer()
atexit.register(_renderer.close)
