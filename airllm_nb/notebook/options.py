"""The flags of the magics: declared once, parsed with quotes, variables and the nearest known name."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.utils.process import arg_split

from .. import config
from ..config import ATTENTIONS, DTYPES, LoadOptions
from ..errors import OptionError

DASHBOARDS = ("full", "bar", "none")

_HELP = argument("-h", "--help", action="store_true", help="Show this and do nothing.")
_NAME = argument("--name", help="The name of the model in this session; default: the last one loaded.")

_LOADING = (
    argument("model", metavar="MODEL", help="Hub id, ORG/REPO:FILE.gguf, local folder or .gguf file."),
    argument(
        "--compression",
        choices=("4bit", "8bit"),
        metavar="4bit|8bit",
        help="Write a compressed store once, and stream from it.",
    ),
    argument("--vram", metavar="SIZE", help="Memory budget on the GPU, such as 4GiB; default: what is free."),
    argument("--ram", metavar="SIZE", help="Budget for weights in RAM, such as 8GiB; default: what is free."),
    argument("--shards", metavar="DIR", help="Folder for the compressed store."),
    argument(
        "--adapter",
        action="append",
        metavar="DIR",
        help="Apply a LoRA adapter (PEFT format): its folder or its Hub id.",
    ),
    argument("--dtype", choices=DTYPES, metavar="TYPE", help="float32, float16 or bfloat16; default: the model's."),
    argument(
        "--attn", choices=ATTENTIONS, metavar="NAME", help=f"Attention, as in transformers: {', '.join(ATTENTIONS)}."
    ),
    argument("--device", metavar="DEVICE", help="cuda, cuda:1 or cpu; default: the first GPU, else the CPU."),
    argument("--max-seq-len", type=int, metavar="N", help="Keep room for prompt and answer of this many tokens."),
    argument("--no-prefetch", action="store_true", help="Read and copy weights only when they are needed."),
    argument(
        "--direct-io",
        action=argparse.BooleanOptionalAction,
        help="Read past the page cache; default: what is faster.",
    ),
    argument("--profile", action="store_true", help="Show the time of each stage and layer after each generation."),
    argument("--delete-original", action="store_true", help="Delete the source weights once the store is verified."),
    argument("--token-env", metavar="VARIABLE", help="Environment variable with the Hub token; default: HF_TOKEN."),
    argument("--revision", metavar="REV", help="Branch, tag or commit on the Hub."),
    argument("--offline", action="store_true", help="Use only what is on this machine."),
    _HELP,
)
LOAD = (
    *_LOADING[:-1],
    argument("--name", help="Keep several under names; a name that is taken is replaced. Default: model."),
    argument("-o", "--output", metavar="VAR", help="Put the model object into this variable."),
    argument(
        "--dashboard",
        choices=DASHBOARDS,
        metavar="full|bar|none",
        help="Live pictures and a Stop button (default), one line of progress, or text alone.",
    ),
    _HELP,
)
PLAN = (
    *_LOADING[:-1],
    argument("--units", action="store_true", help="Show the place of every unit."),
    argument("-o", "--output", metavar="VAR", help="Put the plan object into this variable."),
    _HELP,
)
PANEL = (
    argument("model", metavar="MODEL", nargs="?", help="Picked to begin with; default: choose in the panel."),
    argument("--name", help="The name that Load gives it; default: model."),
    _HELP,
)
BENCH = (
    argument("model", metavar="MODEL", nargs="?", help="Hub id, local folder or .gguf file; default: a loaded model."),
    argument(
        "--synthetic", metavar="SHAPE", help="Instead of MODEL: random weights in this shape, deleted at the end."
    ),
    argument("--layers", type=int, metavar="N", help="Layers of the synthetic model; default: 4."),
    argument("--keep", action="store_true", help="Keep the synthetic checkpoint for the next time."),
    argument("--sweeps", type=int, default=5, metavar="N", help="Sweeps to measure, after the prompt's; default: 5."),
    argument("--batch", type=int, default=1, metavar="N", help="Sequences at once; default: 1."),
    argument("--cap", action="store_true", help="Enforce --vram: what this process allocates above it fails."),
    *_LOADING[1:-1],
    argument("--name", help="The loaded model to measure where no MODEL is given; default: the last one loaded."),
    argument("-o", "--output", metavar="VAR", help="Put the result object into this variable."),
    _HELP,
)
GENERATE = (
    argument("-n", "--max-new-tokens", type=int, metavar="N", help="Longest answer in tokens; default: 200."),
    argument("-t", "--temperature", type=float, metavar="T", help="Sample at this temperature; 0 (default): greedy."),
    argument("--top-p", type=float, metavar="P", help="Sample from the most likely tokens of this total probability."),
    argument("--top-k", type=int, metavar="K", help="Sample from this many most likely tokens."),
    argument("--seed", type=int, metavar="N", help="Start the random numbers here, for sampling."),
    argument("--stop", action="append", metavar="TEXT", help="End the answer before this text; may be repeated."),
    argument("--chat", action="store_true", help="Put the prompt through the model's chat template."),
    argument("--system", metavar="TEXT", help="System message; implies --chat."),
    argument("-o", "--output", metavar="VAR", help="Store the result: .text, .token_ids, .trace, .stopped_by …"),
    argument("--raw", action="store_true", help="Leave {names} in the prompt as they are."),
    _NAME,
    _HELP,
)
STATUS = (_HELP,)
TRACE = (
    argument(
        "file", metavar="FILE", nargs="?", help=".json for Perfetto (ui.perfetto.dev), .png or .svg: the picture."
    ),
    argument(
        "--compare",
        nargs="*",
        metavar="VAR",
        help="Two or more results stored with -o, one above the other; without names the last two generations.",
    ),
    _NAME,
    _HELP,
)
UNLOAD = (argument("name", metavar="NAME", nargs="?", help="One model; default: all."), _HELP)


def arguments(declared: Sequence[argument]) -> Callable[[Any], Any]:
    """IPython's ``magic_arguments`` with these arguments, so that ``%magic?`` explains them."""

    def decorate(function: Any) -> Any:
        for one in reversed(declared):
            function = one(function)
        return magic_arguments()(function)

    return decorate


def flags(magic: Any) -> list[str]:
    """All flags of a magic."""
    return [flag for action in magic.parser._actions for flag in action.option_strings]


def given_flags(magic: Any, given: argparse.Namespace, but: Sequence[str] = ()) -> list[str]:
    """The flags that were given another value than their default, those of ``but`` left out."""
    return [
        next(flag for flag in action.option_strings if flag.startswith("--"))
        for action in magic.parser._actions
        if action.option_strings and action.dest not in but
        and getattr(given, action.dest, action.default) != action.default
    ]  # fmt: skip


def parse(magic: Any, line: str, expand: Callable[[str], str] = str) -> argparse.Namespace | None:
    """The arguments in ``line``, or ``None`` where help was asked for.

    Parameters
    ----------
    expand
        Applied to each argument after splitting, so that a value may have blanks in it.

    Raises
    ------
    UsageError
        In one line: what is wrong, and the nearest flag that is known.
    """
    words = _words(line)
    argv = [expand(word) for word in _joined(words, magic.parser)]
    if "-h" in argv or "--help" in argv:
        return None
    name = magic.parser.prog
    try:
        given, unknown = magic.parser.parse_known_args(argv)
    except UsageError as error:
        # argparse's own words, without the chain of causes.
        raise UsageError(f"{name}: {error} (%{name} --help explains)") from None
    if unknown:
        raise UsageError(f"{name}: {_unknown(unknown[0], flags(magic))}")
    output = getattr(given, "output", None)
    if output is not None and not output.isidentifier():
        raise UsageError(f"{name}: -o {output!r} is no variable name; use letters, digits and _")
    return given


def load_options(given: argparse.Namespace) -> LoadOptions:
    """What :func:`~airllm_nb.engine.facade.open_model` needs."""
    token = None
    if given.token_env:
        token = os.environ.get(given.token_env)
        if not token:
            raise OptionError(f"--token-env {given.token_env}: no such environment variable is set; set it first, for "
                              f"example with %env {given.token_env}=…, or use HF_TOKEN")  # fmt: skip
    return LoadOptions.create(
        compression=given.compression, vram_budget=given.vram, ram_budget=given.ram, dtype=given.dtype,
        layer_shards_saving_path=given.shards, device=given.device, max_seq_len=given.max_seq_len,
        prefetching=not given.no_prefetch, profiling_mode=given.profile, delete_original=given.delete_original,
        hf_token=token, revision=given.revision, local_files_only=given.offline, direct_io=given.direct_io,
        adapter=given.adapter, attn_implementation=given.attn,
    )  # fmt: skip


def sampling(given: argparse.Namespace) -> dict[str, Any]:
    """What ``generate`` needs: greedy without a temperature."""
    return config.sampling(given.max_new_tokens, given.temperature, given.top_p, given.top_k)


def stop_texts(given: argparse.Namespace) -> list[str]:
    """The stop strings; ``\\n`` and ``\\t`` are written as in Python."""
    texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in given.stop or []]
    if "" in texts:
        raise OptionError('--stop "" would end every answer at once; give the text that ends it')
    return texts


def _words(line: str) -> list[str]:
    try:
        # `posix` is only the default on some systems; without it backslashes and inner quotes survive.
        return arg_split(line, posix=False)
    except ValueError as error:
        raise UsageError(f"{str(error).lower()} in: {line.strip()}") from None


def _joined(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Unquoted words; a quoted value is tied to its flag, so that ``--stop "---"`` is not taken for a flag."""
    valued = {flag for action in parser._actions if action.nargs is None for flag in action.option_strings}
    joined: list[str] = []
    for word in words:
        bare = _unquoted(word)
        if bare != word and joined and joined[-1] in valued and bare.startswith("-"):
            glue = "=" if joined[-1].startswith("--") else ""
            joined[-1] += glue + bare
        else:
            joined.append(bare)
    return joined


def _unquoted(word: str) -> str:
    flag, equals, value = word.partition("=")
    if word.startswith("--") and equals:
        return f"{flag}={_unquoted(value)}"
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word


def _unknown(word: str, known: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"what is {word!r} for? (a value with blanks needs quotes)"
    flag = word.partition("=")[0]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    return f"unknown option {flag}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
