"""The flags of the magics, parsed with quotes and variables; a user's mistake takes one line in the cell."""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from IPython.core.error import UsageError
from IPython.core.magic import Magics
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.utils.process import arg_split
from traitlets import Enum, Float, Int, Unicode

from ..config import DTYPES, LOADING, Flag
from ..disk import told
from ..errors import AirLLMError, out_of_memory
from ..flags import GENERATING, MEASURING, MODEL, UNITS, in_flags, unknown
from .prompt_variables import expand, visible

T = TypeVar("T")

_HELP = Flag("-h", "--help", action="store_true", help="show this and do nothing")
_NAME = Flag("--name", help="the name of the model in this session; default: the last one loaded")
_OUTPUT = Flag("-o", "--output", metavar="VAR")
_DASHBOARD = Flag(
    "--dashboard", choices=("full", "bar", "none"), default="full", session=True, metavar="full|bar|none",
    help="live pictures and a Stop button (default), one line of progress, or text alone",
)  # fmt: skip

LOAD = (
    MODEL,
    *LOADING,
    _NAME.but(help="keep several under names; a name that is taken is replaced; default: model"),
    _OUTPUT.but(help="put the model object into this variable"),
    _DASHBOARD,
    _HELP,
)
PLAN = (MODEL, *LOADING, UNITS, _OUTPUT.but(help="put the plan object into this variable"), _HELP)
PANEL = (
    MODEL.but(nargs="?", help="picked to begin with; default: choose in the panel"),
    _NAME.but(help="the name that Load gives it; default: model"),
    _HELP,
)
BENCH = (
    MODEL.but(nargs="?", help="Hub id, local folder or .gguf file; default: a loaded model"),
    *MEASURING,
    *LOADING,
    _NAME.but(help="the loaded model to measure where no MODEL is given; default: the last one loaded"),
    _OUTPUT.but(help="put the result object into this variable"),
    _HELP,
)
GENERATE = (
    *GENERATING,
    _OUTPUT.but(help="store the result: .text, .token_ids, .trace, .stopped_by …"),
    Flag("--raw", action="store_true", help="leave {names} in the prompt as they are"),
    _NAME,
    _HELP,
)
STATUS = (_HELP,)
TRACE = (
    Flag("file", metavar="FILE", nargs="?", help=".json for Perfetto (ui.perfetto.dev), .png or .svg: the picture"),
    Flag(
        "--compare", nargs="*", metavar="VAR",
        help="two or more results stored with -o, one above the other; without names the last two generations",
    ),
    _NAME,
    _HELP,
)  # fmt: skip
UNLOAD = (Flag("name", metavar="NAME", nargs="?", help="one model; default: all"), _HELP)
# By the names of %config AirLLM.
SESSION = {flag.word: flag for flag in (*LOADING, *GENERATING, _DASHBOARD) if flag.session}


def magic(*declared: Flag) -> Callable[[Any], Any]:
    """A magic that is called with these flags parsed; ``--help`` and ``%magic?`` explain them.

    The values of a cell's flags may be ``{names}`` of variables; in a line IPython puts them in itself.
    """

    def decorate(function: Any) -> Any:
        @one_line
        def call(self: Any, line: str, *cell: str) -> None:
            given = parse(made, line, functools.partial(expand, variables=visible(self.shell)) if cell else str)
            if given is None:
                sys.stdout.write(made.parser.format_help().replace("::\n\n  %", "%").rstrip("\n") + "\n")
            else:
                function(self, given, *cell)

        made: Any = functools.wraps(function)(call)
        for flag in reversed(declared):
            default = {"default": None} if flag.session else {}
            made = argument(*flag.names, **flag.how | default | {"help": _sentence(flag.how["help"])})(made)
        made = magic_arguments()(made)
        return made

    return decorate


def _sentence(text: str) -> str:
    is_value = text.partition(" ")[0].rstrip(",") in ("cuda", *DTYPES)
    return (text if is_value else text[:1].upper() + text[1:]) + ("" if text.endswith("…") else ".")


def _trait(flag: Flag) -> Any:
    """What ``%config AirLLM`` shows and sets: the default of a flag in this session."""
    text, default = _sentence(f"{flag.how['help']} ({flag.names[0]})"), flag.how.get("default")
    if "choices" in flag.how:
        return Enum(flag.how["choices"], default, help=text).tag(config=True)
    kinds: dict[Any, Any] = {int: Int, float: Float, None: Unicode}
    return kinds[flag.how.get("type")]("" if default is None else default, help=text).tag(config=True)


# Magics with a trait of each, as if they were written in the class.
SessionMagics: Any = type(Magics)("Magics", (Magics,), {name: _trait(flag) for name, flag in SESSION.items()})


def fill(given: argparse.Namespace, session: Any) -> None:
    """Put the session's defaults where nothing was given."""
    for name, flag in SESSION.items():
        if getattr(given, flag.dest, "") is None and (value := getattr(session, name)) != "":
            setattr(given, flag.dest, value)


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
        given, left = magic.parser.parse_known_args(argv)
    except UsageError as error:
        # argparse's own words, without the chain of causes.
        raise UsageError(f"{name}: {error} (%{name} --help explains)") from None
    if left:
        known = flags(magic)
        raise UsageError(f"{name}: {unknown(left[0], known, '; known: ' + ', '.join(known))}")
    output = getattr(given, "output", None)
    if output is not None and not output.isidentifier():
        raise UsageError(f"{name}: -o {output!r} is no variable name; use letters, digits and _")
    return given


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


# ---- mistakes


def one_line(function: Callable[..., T]) -> Callable[..., T]:
    """Show errors that a user can act on as one line: IPython prints a ``UsageError`` without a traceback.

    The line is raised outside of the handler, as an error of its own: IPython keeps the last exception, whose chain of
    frames would otherwise keep a model's tensors alive.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        full = False
        try:
            with told():
                return function(*args, **kwargs)
        except AirLLMError as error:
            message = in_flags(str(error))
        except Exception as error:
            if (reason := out_of_memory(error)) is None:
                raise
            message = (f"the GPU ran out of memory ({reason}); load again with a smaller --vram or --max-seq-len, or "
                       "shorten the prompt")  # fmt: skip
            full = True
        if full:
            # Only now, with the handler left, are the failed frames and their tensors garbage.
            gc.collect()
        raise UsageError(" ".join(message.splitlines()))

    return call
