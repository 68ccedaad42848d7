"""Options: every default of the package, validated once, with no heavy import."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .disk import expanded
from .errors import OptionError

COMPRESSIONS = ("4bit", "8bit")
DTYPES = ("float32", "float16", "bfloat16")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

MiB = 1 << 20
GiB = 1 << 30

_UNITS = {
    "": 1, "B": 1,
    "K": 1 << 10, "KIB": 1 << 10, "KB": 10**3, "M": 1 << 20, "MIB": 1 << 20, "MB": 10**6,
    "G": 1 << 30, "GIB": 1 << 30, "GB": 10**9, "T": 1 << 40, "TIB": 1 << 40, "TB": 10**12,
}  # fmt: skip


def parse_bytes(value: int | float | str | None, option: str = "size") -> int | None:
    """Turn ``"4GiB"``, ``"500 MB"``, ``4294967296`` or ``None`` into bytes.

    ``KiB, MiB, GiB, TiB`` and the bare letters are powers of 1024; ``KB, MB, GB, TB`` powers of 1000.

    Raises
    ------
    OptionError
        If the text is no size, or the size is negative.
    """
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        size = int(value)
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(value))
        if not match or match[2].upper() not in _UNITS:
            raise OptionError(f'{option}={value!r} is not a size; write bytes or a size such as "4GiB" or "512MiB"')
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 0:
        raise OptionError(f"{option}={value!r} is negative; give a size of 0 or more")
    return size


def format_bytes(size: float) -> str:
    """Bytes as people read them: ``"3.7 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def format_seconds(seconds: float) -> str:
    """Seconds as people read them: ``"0.07 ms"``, ``"0.712 s"``, ``"12.3 s"``, ``"21 min"``, ``"2.5 h"``."""
    if 0 < seconds < 0.001:
        return f"{float(f'{seconds * 1e3:.2g}'):g} ms"
    if seconds < 120:
        return f"{float(f'{seconds:.3g}'):g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_option(nbytes: int) -> str:
    """Bytes, rounded up, the way they are written in an option: ``"55MiB"``."""
    return f"{-(-nbytes // MiB)}MiB"


def cache_dir() -> Path:
    """Where stores go when no folder is named: ``$AIRLLM_NB_CACHE``, else the user's cache folder."""
    if named := os.environ.get("AIRLLM_NB_CACHE"):
        return expanded(named)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "airllm_nb"
    try:
        return Path.home() / ".cache" / "airllm_nb"
    except RuntimeError:
        raise OptionError("this user has no home folder to keep anything in; set AIRLLM_NB_CACHE to a folder") from None


# ---- the options of loading


class Flag:
    """An option as a shell and a cell write it; names and keywords are those of ``argparse``'s ``add_argument``.

    ``session`` says that ``%config AirLLM`` sets its default.
    """

    def __init__(self, *names: str, session: bool = False, **how: Any):
        self.names, self.session, self.how = names, session, how

    def but(self, **how: Any) -> Flag:
        """The same with other keywords."""
        return Flag(*self.names, session=self.session, **self.how | how)

    @property
    def word(self) -> str:
        """``"max_new_tokens"`` of ``--max-new-tokens``."""
        return self.names[-1].lstrip("-").replace("-", "_")

    @property
    def dest(self) -> str:
        """Where a parsed namespace has its value."""
        return str(self.how.get("dest", self.word))


def _option(
    *names: str, default: Any = None, check: Callable[[Any, str], Any] | None = None, repr: bool = True, **how: Any
) -> Any:
    """A field of :class:`LoadOptions`, and its flag if it has names; ``check`` refuses a value or makes it normal."""
    flag = Flag(*names, default=default, **how) if names else None
    return field(default=default, repr=repr, metadata={"flag": flag, "check": check})


def _known(value: Any, name: str, choices: tuple[str, ...], use: str = "") -> Any:
    if value not in choices:
        raise OptionError(f"{name}={value!r} is not known; use {use or 'one of ' + ', '.join(choices)}")
    return value


def _device(value: Any, name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(value)):
        raise OptionError(f"{name}={str(value)!r} is not known; use 'cuda', 'cuda:0' or 'cpu'")
    return str(value)


def _must(be: str, is_good: Callable[[Any], bool]) -> Callable[[Any, str], Any]:
    def check(value: Any, name: str) -> Any:
        if not is_good(value):
            raise OptionError(f"{name}={value!r} must be {be}")
        return value

    return check


_count = _must("a whole number of 1 or more", lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0)


def _one_adapter(given: Any, _: str) -> str:
    adapters = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(adapters) != 1:
        raise OptionError(f"{len(adapters)} adapters were given, and one can be applied; join them first (peft: "
                          "add_weighted_adapter, then save_pretrained)")  # fmt: skip
    if not isinstance(adapters[0], (str, os.PathLike)) or not os.fspath(adapters[0]).strip():
        raise OptionError(f"adapter={adapters[0]!r} names no adapter; give its folder or its Hub id")
    return os.fspath(adapters[0])


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded. Names and defaults are AirLLM's where AirLLM has the option.

    This is the table that flags, ``--help``, completion and ``%config`` are made from too.

    Parameters
    ----------
    compression
        ``None``, ``"4bit"`` (nf4, blocks of 64) or ``"8bit"`` (block-wise int8).
    vram_budget, ram_budget
        Bytes or a size such as ``"4GiB"``; default what is free, less a margin.
    layer_shards_saving_path
        Folder for the store that compression writes; default :func:`cache_dir`.
    adapter
        A LoRA adapter in PEFT's format, applied unmerged: its folder, or its Hub id.
    dtype
        ``"bfloat16"``, ``"float16"``, ``"float32"`` or a torch dtype; default the checkpoint's, float16 where the
        GPU has no bfloat16.
    attn_implementation
        ``"eager"``, ``"sdpa"``, ``"flash_attention_2"`` … as in transformers, whose own choice is the default.
    device
        ``"cuda"``, ``"cuda:1"``, ``"cpu"``; default the first GPU, else the CPU.
    max_seq_len
        Longest prompt plus answer that the plan makes room for, in tokens; default what the budget allows. It may be
        more than the model was trained on, where positions are calculated and not looked up.
    batch_size
        Sequences that run at once (beams count), for the plan.
    prefetching
        ``False`` reads and copies each unit only when it is needed. An integer bounds how many units ahead.
    direct_io
        Read files past the system's page cache; default: when the model is larger than RAM and that is not slower.
    profiling_mode
        Log a table of time per stage after every generation.
    exact
        The native loop, a dynamic cache and no graph: every operation as transformers runs it, and as slowly.
    delete_original
        After the store is written **and verified**, delete the source weights (with compression only).
    hf_token
        Token for gated or private repositories; default ``$HF_TOKEN`` or the saved login.
    revision, local_files_only
        As in ``huggingface_hub``.
    trust_remote_code
        Accepted for compatibility; code of a repository is never run, so ``True`` only changes the error message.
    """

    compression: str | None = _option(
        "--compression", choices=COMPRESSIONS, metavar="|".join(COMPRESSIONS),
        help="write a compressed store once, and stream from it",
        check=lambda value, name: _known(value, name, COMPRESSIONS, "None, '4bit' or '8bit'"),
    )  # fmt: skip
    vram_budget: int | None = _option(
        "--vram", metavar="SIZE", session=True, check=parse_bytes,
        help="memory budget on the GPU, such as 4GiB; default: what is free",
    )  # fmt: skip
    ram_budget: int | None = _option(
        "--ram", metavar="SIZE", session=True, check=parse_bytes,
        help="budget for weights in RAM, such as 8GiB; default: what is free",
    )  # fmt: skip
    layer_shards_saving_path: Path | None = _option(  # noqa: RUF009
        "--shards", metavar="DIR", help="folder for the compressed store",
        check=lambda value, _: expanded(value) if value else value,
    )  # fmt: skip
    adapter: str | Path | None = _option(  # noqa: RUF009
        "--adapter", metavar="DIR", action="append", check=_one_adapter,
        help="apply a LoRA adapter (PEFT format): its folder or its Hub id",
    )  # fmt: skip
    dtype: str | None = _option(
        "--dtype", choices=DTYPES, metavar="TYPE", help="float32, float16 or bfloat16; default: the model's",
        check=lambda value, name: _known(str(value).removeprefix("torch."), name, DTYPES),
    )  # fmt: skip
    attn_implementation: str | None = _option(
        "--attn", choices=ATTENTIONS, metavar="NAME", help="how attention is computed, as in transformers: %(choices)s",
        check=lambda value, name: _known(value, name, ATTENTIONS),
    )  # fmt: skip
    device: str | None = _option(
        "--device", metavar="DEVICE", check=_device, help="cuda, cuda:1 or cpu; default: the first GPU, else the CPU"
    )
    max_seq_len: int | None = _option(
        "--max-seq-len", type=int, metavar="N", check=_count, help="keep room for prompt and answer of this many tokens"
    )
    batch_size: int = _option(default=1, check=_count)
    prefetching: bool | int = _option(
        "--no-prefetch", default=True, action="store_false", help="read and copy weights only when they are needed",
        check=_must("True, False or a number of units ahead", lambda n: isinstance(n, int) and n >= 0),
    )  # fmt: skip
    direct_io: bool | None = _option(
        "--direct-io", action=argparse.BooleanOptionalAction, help="read past the page cache; default: what is faster",
        check=_must("True, False or None", lambda given: given in (True, False)),
    )  # fmt: skip
    profiling_mode: bool = _option("--profile", default=False, action="store_true", help="time each stage and layer")
    exact: bool = _option("--exact", default=False, action="store_true", help="native loop, dynamic cache, no graph")
    delete_original: bool = _option(
        "--delete-original", default=False, action="store_true",
        help="delete the source weights once the store is verified",
    )  # fmt: skip
    # As a flag, the variable of the environment that holds it.
    hf_token: str | None = _option(
        "--token-env", metavar="NAME", repr=False, help="environment variable with the Hub token; default: HF_TOKEN"
    )
    revision: str | None = _option("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    local_files_only: bool = _option(
        "--offline", default=False, action="store_true", help="use only what is on this machine"
    )
    trust_remote_code: bool = _option(default=False)

    @classmethod
    def create(cls, **given: Any) -> LoadOptions:
        """Validate keywords and normalise their values.

        Raises
        ------
        OptionError
            For an unknown keyword (the nearest known one is named) or a value that cannot be used.
        """
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known)}"
                raise OptionError(f"unknown option {name!r}; {hint}")
        return cls(**given)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, check = getattr(self, option.name), option.metadata["check"]
            if check is not None and not (value is None and option.default is None):
                object.__setattr__(self, option.name, check(value, option.name))
        if self.delete_original and self.compression is None:
            raise OptionError("delete_original=True needs compression='4bit' or '8bit': uncompressed weights stream "
                              "from the original files")  # fmt: skip

    @property
    def depth(self) -> int | None:
        """Units that may be in flight ahead of compute: 0 without prefetching, ``None`` for as many as fit."""
        if self.prefetching is True:
            return None
        return int(self.prefetching)


LOADING = tuple(one.metadata["flag"].but(dest=one.name) for one in fields(LoadOptions) if one.metadata["flag"])
