"""The command line: commands, their options (named as the magics name them) and one-line complaints."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import __version__, config
from ..config import ATTENTIONS, DTYPES, LoadOptions, check_text
from ..errors import OptionError, PromptError

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Complains in one line, with the nearest option that is known, and leaves with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help explains)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given, unknown = self.parse_known_args(args, namespace)
        if getattr(given, "prompt", "") is None and (word := _only_word(unknown)) is not None:
            # Where the options stand between them, argparse has taken the prompt for left out at the model already.
            given.prompt, unknown = word, []
        if not unknown:
            return given
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            self.error(f"what is {flag!r} for? (a value with blanks needs quotes)")
        known = [name for action in given.parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
        given.parser.error(f"unknown option {flag}" + (f"; did you mean {near[0]}?" if near else ""))


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
            _add_loading(made, optional=model == "optional")
        return made

    made = command("plan", plan, "show what would go where and how fast; downloads only config and headers")
    made.add_argument("--units", action="store_true", help="the place of every unit")
    command("convert", convert, "write the store that --compression needs, and print its folder")
    _add_generating(command("generate", generate, "answer a prompt, the text streaming to stdout"))
    _add_bench(command("bench", bench, "measure a model, or random weights in a known shape", model="optional"))
    command("doctor", doctor, "say what this machine is and can, and what to do about the rest", model=None)
    _add_cache(command("cache", cache, "list the stores on this machine, or remove some", model=None))
    return parser


def _add_loading(parser: argparse.ArgumentParser, optional: bool) -> None:
    add = parser.add_argument_group("loading").add_argument
    count = "?" if optional else None
    parser.add_argument(
        "model", metavar="MODEL", nargs=count, help="Hub id, ORG/REPO:FILE.gguf, local folder or .gguf file"
    )
    add("--compression", choices=("4bit", "8bit"), help="stream from a compressed store, written once")
    add("--vram", metavar="SIZE", help="memory budget on the GPU, such as 4GiB; default: what is free")
    add("--ram", metavar="SIZE", help="budget for weights in RAM, such as 8GiB; default: what is free")
    add("--shards", metavar="DIR", help="folder for the compressed store")
    add("--adapter", metavar="DIR", action="append", help="apply a LoRA adapter (PEFT format): its folder or Hub id")
    add("--dtype", choices=DTYPES, help="compute in this type; default: the checkpoint's")
    add("--attn", choices=ATTENTIONS, metavar="NAME", help="how attention is computed, as in transformers: %(choices)s")
    add("--device", metavar="DEVICE", help="cuda, cuda:1 or cpu; default: the first GPU, else the CPU")
    add("--max-seq-len", type=int, metavar="N", help="keep room for prompt and answer of this many tokens")
    add("--no-prefetch", action="store_true", help="read and copy weights only when they are needed")
    add("--direct-io", action=argparse.BooleanOptionalAction, help="read past the page cache; default: what is faster")
    add("--profile", action="store_true", help="time each stage and layer")
    add("--delete-original", action="store_true", help="delete the source weights once the store is verified")
    add("--token-env", metavar="NAME", help="environment variable with the Hub token; default: HF_TOKEN")
    add("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    add("--offline", action="store_true", help="use only what is on this machine")


def _add_generating(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; - or nothing: read stdin")
    add = parser.add_argument_group("generating").add_argument
    add("-n", "--max-new-tokens", type=int, default=200, metavar="N", help="longest answer in tokens (%(default)s)")
    add("-t", "--temperature", type=float, default=0.0, metavar="T", help="sample; 0, the default, is greedy")
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens of this total probability")
    add("--top-k", type=int, metavar="K", help="sample from this many most likely tokens")
    add("--seed", type=int, metavar="N", help="start the random numbers here")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")
    add("--chat", action="store_true", help="put the prompt through the model's chat template")
    add("--system", metavar="TEXT", help="system message; implies --chat")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Opens the model, generates once to warm up and once more with the clock running, and says what each link "
        "carried, beside what the plan predicted. The shapes: llama-2-7b, llama-2-70b, llama-3-70b, llama-3.1-405b, "
        "qwen2.5-32b, small, small-qwen."
    )
    add = parser.add_argument_group("measuring").add_argument
    add("--synthetic", metavar="SHAPE", help="instead of MODEL: random weights in this shape, deleted at the end")
    add("--layers", type=int, metavar="N", help="layers of the synthetic model (4)")
    add("--keep", action="store_true", help="keep the synthetic checkpoint for the next time")
    add("--sweeps", type=int, default=5, metavar="N", help="sweeps to measure, after the prompt's (%(default)s)")
    add("--batch", type=int, default=1, metavar="N", help="sequences at once (%(default)s)")
    add("--cap", action="store_true", help="enforce --vram: what is allocated above it fails")


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
    token = None
    if given.token_env and not (token := os.environ.get(given.token_env)):
        raise OptionError(f"--token-env {given.token_env}: no such environment variable is set; export it first")
    return LoadOptions.create(
        compression=given.compression, vram_budget=given.vram, ram_budget=given.ram, dtype=given.dtype,
        layer_shards_saving_path=given.shards, device=given.device, max_seq_len=given.max_seq_len,
        prefetching=not given.no_prefetch, profiling_mode=given.profile, delete_original=given.delete_original,
        hf_token=token, revision=given.revision, local_files_only=given.offline, direct_io=given.direct_io,
        adapter=given.adapter, attn_implementation=given.attn,
    )  # fmt: skip


def sampling(given: argparse.Namespace) -> dict[str, Any]:
    """What ``generate`` needs: greedy without a temperature."""
    how = config.sampling(given.max_new_tokens, given.temperature, given.top_p, given.top_k)
    if "" in given.stop:
        raise OptionError('--stop "" would end every answer at once; give the text that ends it')
    return how | {
        "max_new_tokens": given.max_new_tokens,
        "stop": [text.replace("\\n", "\n").replace("\\t", "\t") for text in given.stop],
    }


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
    check_text(text)
    for flag, value in [("--system", given.system or ""), *(("--stop", stop) for stop in given.stop)]:
        check_text(value, flag)
    if not text.strip():
        raise PromptError("the prompt is empty; write what the model should continue or answer")
    if not (given.chat or given.system):
        return text
    system = [{"role": "system", "content": given.system}] if given.system else []
    return [*system, {"role": "user", "content": text}]
