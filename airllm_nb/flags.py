"""What a user writes in a shell or in a cell: the flags that both faces have, and what is made of their values.

What is of one face alone stands there, in ``cli/arguments.py`` and ``notebook/options.py``.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .config import LOADING, Flag, LoadOptions
from .errors import OptionError, PromptError

MODEL = Flag("model", metavar="MODEL", help="Hub id, ORG/REPO:FILE.gguf, local folder or .gguf file")
UNITS = Flag("--units", action="store_true", help="show the place of every unit")
GENERATING = (
    Flag("-n", "--max-new-tokens", type=int, default=200, session=True, metavar="N",
         help="longest answer in tokens; default: 200"),
    Flag("-t", "--temperature", type=float, default=0.0, session=True, metavar="T",
         help="sample at this temperature; 0 (default): greedy"),
    Flag("--top-p", type=float, metavar="P", help="sample from the most likely tokens of this total probability"),
    Flag("--top-k", type=int, metavar="K", help="sample from this many most likely tokens"),
    Flag("--seed", type=int, metavar="N", help="start the random numbers here, for sampling"),
    Flag("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated"),
    Flag("--chat", action="store_true", help="put the prompt through the model's chat template"),
    Flag("--system", metavar="TEXT", help="system message; implies --chat"),
)  # fmt: skip
MEASURING = (
    Flag("--synthetic", metavar="SHAPE", help="instead of MODEL: random weights in this shape, deleted at the end"),
    Flag("--layers", type=int, metavar="N", help="layers of the synthetic model; default: 4"),
    Flag("--keep", action="store_true", help="keep the synthetic checkpoint for the next time"),
    Flag("--sweeps", type=int, default=5, metavar="N", help="sweeps to measure, after the prompt's; default: 5"),
    Flag("--batch", type=int, default=1, metavar="N", help="sequences at once; default: 1"),
    Flag("--routing", choices=["uniform", "local"], help="have experts chosen evenly, or as locally as on text"),
    Flag("--cap", action="store_true", help="enforce --vram: what this process allocates above it fails"),
)


def unknown(word: str, known: Sequence[str], otherwise: str = "") -> str:
    """What to say of a word that nothing takes: the nearest flag, or ``otherwise``."""
    if not word.startswith("-"):
        return f"what is {word!r} for? (a value with blanks needs quotes)"
    flag = word.partition("=")[0]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    return f"unknown option {flag}" + (f"; did you mean {near[0]}?" if near else otherwise)


def load_options(given: argparse.Namespace, set_it: str) -> LoadOptions:
    """The options among the values that were given; ``set_it`` says how a variable of the environment is set."""
    options = {flag.dest: getattr(given, flag.dest) for flag in LOADING}
    if variable := given.hf_token:
        options["hf_token"] = os.environ.get(variable)
        if not options["hf_token"]:
            raise OptionError(f"--token-env {variable}: no such environment variable is set; {set_it}")
    return LoadOptions.create(**options)


def sampling(given: argparse.Namespace) -> dict[str, Any]:
    """What ``stream`` is asked for: greedy without a temperature.

    Raises
    ------
    OptionError
        If a value makes no sense, or chooses what to sample from while nothing is sampled.
    """
    temperature, top_p, top_k = given.temperature, given.top_p, given.top_k
    limits = {name: value for name, value in (("top_p", top_p), ("top_k", top_k)) if value is not None}
    if given.max_new_tokens < 1:
        raise OptionError(f"-n {given.max_new_tokens}: ask for 1 token or more")
    if temperature < 0:
        raise OptionError(f"-t {temperature}: a temperature is 0 (greedy) or more, such as 0.7")
    if top_p is not None and not 0 < top_p <= 1:
        raise OptionError(f"--top-p {top_p}: a probability is above 0 and at most 1")
    if top_k is not None and top_k < 1:
        raise OptionError(f"--top-k {top_k}: sample from 1 token or more")
    if temperature == 0 and limits:
        raise OptionError("--top-p and --top-k choose what to sample from, but without -t nothing is sampled; "
                          "add a temperature, such as -t 0.7")  # fmt: skip
    # As in Python, for what a shell and a cell cannot hold.
    stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in given.stop or []]
    if "" in stop:
        raise OptionError('--stop "" would end every answer at once; give the text that ends it')
    how = {"do_sample": True, "temperature": temperature, **limits} if temperature else {"do_sample": False}
    return how | {"max_new_tokens": given.max_new_tokens, "stop": stop}


def prompt(given: argparse.Namespace, text: str) -> Any:
    """The text, or with ``--chat`` or ``--system`` the messages of a chat, as ``stream`` takes them."""
    if not (given.chat or given.system) or not text.strip():
        return text
    system = [{"role": "system", "content": given.system}] if given.system else []
    return [*system, {"role": "user", "content": text}]


def check_text(text: Any, name: str = "the prompt") -> None:
    """Refuse what is no text: bytes, and text that was bytes of another encoding.

    Raises
    ------
    PromptError
        Which says what it is and how it becomes text.
    """
    if isinstance(text, (bytes, bytearray, memoryview)):
        raise PromptError(f'{name} is bytes, not text; decode it, as in data.decode("utf-8") or data.decode("latin-1")')
    if not isinstance(text, str):
        raise PromptError(f"{name} is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"{text[error.start]!a}, half of a character or a byte of another encoding"
        raise PromptError(f"{name} is no text: its character {error.start + 1:,} is {what}; write it in UTF-8 "
                          '(of a file in Latin-1: iconv -f latin1 -t utf8, or open(…, encoding="latin-1"))'
                          ) from None  # fmt: skip


# ---- messages name the options of Python; in a shell and in a cell they have other names


def _names(flag: Flag) -> Iterator[tuple[str, str]]:
    """How messages name an option, as a pattern, and how a face does."""
    option, name, action = flag.dest, flag.names[0], flag.how.get("action")
    if action in ("store_true", "store_false"):
        yield f"{option}={action == 'store_true'}", name
    elif name != f"--{option}":
        yield rf"{option}=\.\.\.", f"{name} {flag.how.get('metavar')}"
        yield option, name
    elif flag.how.get("choices"):
        yield rf"{option}='(\w+)'(?:( or )'(\w+)')?", rf"{name} \1\2\3"


_NAMES = [(re.compile(rf"\b{pattern}"), name) for flag in LOADING for pattern, name in _names(flag)]


def in_flags(message: str) -> str:
    """A message with the flags' names of the options in it, for the shell and the magics."""
    for pattern, name in _NAMES:
        message = pattern.sub(name, message)
    return message
