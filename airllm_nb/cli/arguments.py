"""The command line: commands, their options (named as the magics name them) and one-line complaints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import __version__, flags
from ..config import LOADING, Flag, LoadOptions
from ..errors import PromptError

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Complains in one line, with the nearest option that is known, and leaves with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help explains)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given, left = self.parse_known_args(args, namespace)
        if getattr(given, "prompt", "") is None and (word := _only_word(left)) is not None:
            # Where the options stand between them, argparse has taken the prompt for left out at the model already.
            given.prompt, left = word, []
        if not left:
            return given
        known = [name for action in given.parser._actions for name in action.option_strings]
        asked = given.parser if left[0].startswith("-") else self
        asked.error(flags.unknown(left[0], known))


def _only_word(left: Sequence[str]) -> str | None:
    """What is left over, if that is one word and no option: a dash alone is none, nor is what stands behind ``--``."""
    if len(left) == 2 and left[0] == "--":
        return left[1]
    return left[0] if len(left) == 1 and (left[0] == "-" or not left[0].startswith("-")) else None


def make_parser(
    *, plan: Command, convert: Command, generate: Command, bench: Command, doctor: Command, cache: Command
) -> argparse.ArgumentParser:
    """The parser; what it returns has ``run``, the command to call with it."""
    parser = Parser(prog="airllm-nb", description="Run language models that do not fit: weights stream from disk.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run: Command, text: str, *, model: str | None = "one") -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        made.set_defaults(run=run, parser=made)
        made.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
        if model:
            _add(made, flags.MODEL.but(nargs="?" if model == "optional" else None))
            _add(made.add_argument_group("loading"), *LOADING)
        return made

    made = command("plan", plan, "show what would go where and how fast; downloads only config and headers")
    _add(made, flags.UNITS)
    command("convert", convert, "write the store that --compression needs, and print its folder")
    made = command("generate", generate, "answer a prompt, the text streaming to stdout")
    made.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; - or nothing: read stdin")
    _add(made.add_argument_group("generating"), *flags.GENERATING)
    made = command("bench", bench, "measure a model, or random weights in a known shape", model="optional")
    made.epilog = (
        "Opens the model, generates once to warm up and once more with the clock running, and says what each link "
        "carried, beside what the plan predicted. The shapes: llama-2-7b, llama-2-70b, llama-3-8b, llama-3-70b, "
        "llama-3.1-405b, qwen2.5-32b, and the mixtures mixtral-8x7b, qwen3-30b-a3b, gpt-oss-20b, gpt-oss-120b, "
        "deepseek-v3; small, small-qwen, small-moe."
    )
    _add(made.add_argument_group("measuring"), *flags.MEASURING)
    command("doctor", doctor, "say what this machine is and can, and what to do about the rest", model=None)
    _add_cache(command("cache", cache, "list the stores on this machine, or remove some", model=None))
    return parser


def _add(parser: argparse._ActionsContainer, *declared: Flag) -> None:
    for flag in declared:
        parser.add_argument(*flag.names, **flag.how)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Only stores, which conversions write, are listed and removed: never downloads or your own files."
    where = "the folder that --shards named when they were made; default: the cache folder"
    parser.set_defaults(removes=False)
    parser.add_argument("--shards", metavar="DIR", help=where)
    actions = parser.add_subparsers(metavar="ACTION", parser_class=Parser)

    def action(name: str, text: str, removes: bool) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        made.set_defaults(removes=removes, parser=made)
        # Without a default: what stands before the action stays.
        made.add_argument("--shards", metavar="DIR", default=argparse.SUPPRESS, help=where)
        made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document on stdout")
        return made

    action("list", "list the stores, as without an action", False)
    made = action("remove", "remove stores, none that is in use; asks first", True)
    made.add_argument("names", metavar="NAME", nargs="*", help="a store; or a model, or what FROM says: all its stores")
    made.add_argument("--unfinished", action="store_true", help="what conversions and removals that were ended left")
    made.add_argument("--all", action="store_true", help="all stores there; with --yes, not the only copy of a model")
    made.add_argument("-y", "--yes", action="store_true", help="do not ask")


def load_options(given: argparse.Namespace) -> LoadOptions:
    """What the engine's functions need."""
    return flags.load_options(given, "export it first")


def read_prompt(given: argparse.Namespace) -> Any:
    """The prompt as ``stream`` takes it; from stdin where none is given."""
    text = given.prompt
    if text is None or text == "-":
        if sys.stdin.isatty():
            sys.stderr.write("reading the prompt from here; end it with Ctrl-D on a line of its own\n")
        try:
            text = sys.stdin.read().rstrip("\n")
        except UnicodeDecodeError as error:
            byte = f"{error.start + 1:,} is 0x{error.object[error.start]:02x}"
            raise PromptError(f"the prompt on standard input is not {error.encoding} (its byte {byte}); convert it, as "
                              "in iconv -f latin1 -t utf8") from None  # fmt: skip
    flags.check_text(text)
    for flag, value in [("--system", given.system or ""), *(("--stop", stop) for stop in given.stop or [])]:
        flags.check_text(value, flag)
    if not text.strip():
        raise PromptError("the prompt is empty; write what the model should continue or answer")
    return flags.prompt(given, text)
