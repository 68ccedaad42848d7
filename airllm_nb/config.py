"""Options: every default of the package, validated once, with no heavy import."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk import expanded
from .errors import OptionError, PromptError

COMPRESSIONS = (None, "4bit", "8bit")
DTYPES = ("float32", "float16", "bfloat16")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

MiB = 1 << 20
GiB = 1 << 30

_UNITS = {
    "": 1, "B": 1,
    "K": 1 << 10, "KIB": 1 << 10, "KB": 10**3,
    "M": 1 << 20, "MIB": 1 << 20, "MB": 10**6,
    "G": 1 << 30, "GIB": 1 << 30, "GB": 10**9,
    "T": 1 << 40, "TIB": 1 << 40, "TB": 10**12,
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


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded. Names and defaults are AirLLM's where AirLLM has the option.

    Parameters
    ----------
    compression
        ``None``, ``"4bit"`` (nf4, blocks of 64) or ``"8bit"`` (block-wise int8).
    profiling_mode
        Log a table of time per stage after every generation.
    layer_shards_saving_path
        Folder for the store that compression writes; default :func:`cache_dir`.
    hf_token
        Token for gated or private repositories; default ``$HF_TOKEN`` or the saved login.
    prefetching
        ``False`` reads and copies each unit only when it is needed. An integer bounds how many units ahead.
    delete_original
        After the store is written **and verified**, delete the source weights (with compression only).
    device
        ``"cuda"``, ``"cuda:1"``, ``"cpu"``; default the first GPU, else the CPU.
    dtype
        ``"bfloat16"``, ``"float16"``, ``"float32"`` or a torch dtype; default the checkpoint's, float16 where the
        GPU has no bfloat16.
    attn_implementation
        ``"eager"``, ``"sdpa"``, ``"flash_attention_2"`` … as in transformers, whose own choice is the default.
    max_seq_len
        Longest prompt plus answer that the plan makes room for, in tokens; default what the budget allows. It may be
        more than the model was trained on, where positions are calculated and not looked up.
    vram_budget, ram_budget
        Bytes or a size such as ``"4GiB"``; default what is free, less a margin.
    batch_size
        Sequences that run at once (beams count), for the plan.
    direct_io
        Read files past the system's page cache; default: when the model is larger than RAM and that is not slower.
    adapter
        A LoRA adapter in PEFT's format, applied unmerged: its folder, or its Hub id.
    revision, local_files_only
        As in ``huggingface_hub``.
    trust_remote_code
        Accepted for compatibility; code of a repository is never run, so ``True`` only changes the error message.
    """

    compression: str | None = None
    profiling_mode: bool = False
    layer_shards_saving_path: Path | None = None
    hf_token: str | None = dataclasses.field(default=None, repr=False)
    prefetching: bool | int = True
    delete_original: bool = False
    device: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    max_seq_len: int | None = None
    vram_budget: int | None = None
    ram_budget: int | None = None
    batch_size: int = 1
    direct_io: bool | None = None
    adapter: str | Path | None = None
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    @classmethod
    def create(cls, **given: Any) -> LoadOptions:
        """Validate keywords and normalise their values.

        Raises
        ------
        OptionError
            For an unknown keyword (the nearest known one is named) or a value that cannot be used.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known)}"
                raise OptionError(f"unknown option {name!r}; {hint}")
        return cls(**given)

    def __post_init__(self) -> None:
        normal: dict[str, Any] = {
            name: parse_bytes(getattr(self, name), name) for name in ("vram_budget", "ram_budget")
        }
        if self.layer_shards_saving_path:
            normal["layer_shards_saving_path"] = expanded(self.layer_shards_saving_path)
        if self.dtype is not None:
            normal["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.device is not None:
            normal["device"] = str(self.device)
        if self.adapter is not None:
            normal["adapter"] = _one_adapter(self.adapter)
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise OptionError(f"compression={self.compression!r} is not known; use None, '4bit' or '8bit'")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"dtype={self.dtype!r} is not known; use one of {', '.join(DTYPES)}")
        if self.attn_implementation not in (None, *ATTENTIONS):
            raise OptionError(f"attn_implementation={self.attn_implementation!r} is not known; use one of "
                              f"{', '.join(ATTENTIONS)}")  # fmt: skip
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise OptionError(f"device={self.device!r} is not known; use 'cuda', 'cuda:0' or 'cpu'")
        for name in ("max_seq_len", "batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise OptionError(f"{name}={value!r} must be a whole number of 1 or more")
        if not isinstance(self.prefetching, (bool, int)) or self.prefetching < 0:
            raise OptionError(f"prefetching={self.prefetching!r} must be True, False or a number of units ahead")
        if self.direct_io not in (None, True, False):
            raise OptionError(f"direct_io={self.direct_io!r} must be True, False or None")
        if self.delete_original and self.compression is None:
            raise OptionError("delete_original=True needs compression='4bit' or '8bit': uncompressed weights stream "
                              "from the original files")  # fmt: skip

    @property
    def depth(self) -> int | None:
        """Units that may be in flight ahead of compute: 0 without prefetching, ``None`` for as many as fit."""
        if self.prefetching is True:
            return None
        return int(self.prefetching)


def _one_adapter(given: Any) -> str:
    adapters = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(adapters) != 1:
        raise OptionError(f"{len(adapters)} adapters were given, and one can be applied; join them first (peft: "
                          "add_weighted_adapter, then save_pretrained)")  # fmt: skip
    if not isinstance(adapters[0], (str, os.PathLike)) or not os.fspath(adapters[0]).strip():
        raise OptionError(f"adapter={adapters[0]!r} names no adapter; give its folder or its Hub id")
    return os.fspath(adapters[0])


def sampling(max_new_tokens: int, temperature: float, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """What ``generate`` needs to sample, or not: greedy without a temperature. Messages name the flags.

    Raises
    ------
    OptionError
        If a value makes no sense, or chooses what to sample from while nothing is sampled.
    """
    limits = {"top_p": top_p, "top_k": top_k}
    chosen = {name: value for name, value in limits.items() if value is not None}
    if max_new_tokens < 1:
        raise OptionError(f"-n {max_new_tokens}: ask for 1 token or more")
    if temperature < 0:
        raise OptionError(f"-t {temperature}: a temperature is 0 (greedy) or more, such as 0.7")
    if top_p is not None and not 0 < top_p <= 1:
        raise OptionError(f"--top-p {top_p}: a probability is above 0 and at most 1")
    if top_k is not None and top_k < 1:
        raise OptionError(f"--top-k {top_k}: sample from 1 token or more")
    if temperature == 0 and chosen:
        raise OptionError("--top-p and --top-k choose what to sample from, but without -t nothing is sampled; "
                          "add a temperature, such as -t 0.7")  # fmt: skip
    return {"do_sample": True, "temperature": temperature, **chosen} if temperature else {"do_sample": False}
