"""``airllm-nb plan | convert | generate | bench | doctor | cache``: the same engine from a shell.

Exit codes: 0, 1 for an error of the model, the machine or the input (one line on stderr), 2 for wrong usage, 130 after
Ctrl-C. With ``--json`` stdout is one JSON document and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence

from ..disk import told
from ..errors import AirLLMError, OptionError, out_of_memory
from ..flags import in_flags
from . import cache, commands, doctor
from .arguments import make_parser

__all__ = ["main"]

USER, USAGE, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = make_parser(
        plan=commands.plan, convert=commands.convert, generate=commands.generate, bench=commands.bench,
        doctor=doctor.doctor, cache=cache.cache,
    )  # fmt: skip
    given = parser.parse_args(argv)
    try:
        with _warnings(), told():
            return given.run(given)
    except OptionError as error:
        return _fail(str(error), USAGE)
    except AirLLMError as error:
        return _fail(str(error), USER)
    except KeyboardInterrupt as stopped:
        return _fail(
            str(stopped)
            or "interrupted; what was downloaded or converted is kept: the same command goes on from there",
            INTERRUPTED,
        )
    except BrokenPipeError:
        # The reader of stdout has gone: give Python something to flush into at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USER
    except Exception as error:
        if (reason := out_of_memory(error)) is None:
            raise
        return _fail(f"the GPU ran out of memory ({reason}); give a smaller --vram or --max-seq-len", USER)


class _InFlags(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"airllm-nb: {in_flags(record.getMessage())}"


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Warnings on stderr, in the words of a shell."""
    log, handler = logging.getLogger("airllm_nb"), logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_InFlags())
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"airllm-nb: {in_flags(' '.join(message.splitlines()))}\n")
    return code
