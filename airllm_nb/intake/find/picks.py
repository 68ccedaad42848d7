"""Which of several GGUF files suits a machine: pure functions over names, sizes and room."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from ...checkpoint.gguf.split import part_names, whole_name
from ...config import GiB, format_bytes
from ...errors import CheckpointError

# Left on a disk beside a download.
DISK_MARGIN = GiB
# Memory that a model takes, over the size of its weights: cache and activations.
IN_MEMORY = 1.1
# Bits a weight that stream best where memory holds no file whole: below, answers get worse fast; above, tokens slow.
STREAMED_BITS, STREAMED_WINDOW = 4.5, 0.5
# Files whose sizes differ by less are equally good by size.
TIE = 0.03

_QUANTISATION = re.compile(
    r"(?<![A-Z0-9])(I?Q\d(_([K01]|NL))?(_(XXS|XS|S|M|L|XL))?|TQ\d_\d|MXFP4(_MOE)?|NVFP4|BF16|FP?16|FP?32)(?![A-Z0-9])"
)
# Beside a model: its eyes, what its quantisation was weighed by, adapters, bare tokenizers; layouts of ARM alone.
NOT_A_MODEL = re.compile(r"mmproj|imatrix|(^|[^a-z])lora([^a-z]|$)|ggml-vocab|q4_0_[48]_[48]")
# What drafts tokens for a model; also models that have such layers inside, which count where there is no other.
_DRAFT = re.compile(r"(^|[^a-z])(draft(er)?|mtp|eagle\d?)([^a-z]|$)")
# Said of a quantisation in file names, not of the model; the second ones only behind it.
_MARKS = frozenset({"ud", "i1", "imat", "imatrix", "pure"})
_MARKS_BEHIND = frozenset({"l", "xl", "embed", "embd", "emb", "output", "out"})
_SPELLED = {"FP16": "F16", "FP32": "F32"}
# By the first digit after Q: enough to tell how many weights a file has.
_BITS = {1: 1.9, 2: 2.9, 3: 3.7, 4: 4.7, 5: 5.6, 6: 6.6, 8: 8.5}


@dataclass(frozen=True)
class Room:
    """Bytes that a machine has for a model; ``None`` where nobody tells.

    Attributes
    ----------
    disk
        Free where it would be downloaded.
    ram, vram
        The budgets.
    """

    disk: int | None = None
    ram: int | None = None
    vram: int | None = None

    @property
    def memory(self) -> int | None:
        """RAM and VRAM together."""
        return None if self.ram is None and self.vram is None else (self.ram or 0) + (self.vram or 0)

    def stores(self, nbytes: int) -> bool:
        """Whether the disk takes so many bytes, and keeps a margin."""
        return self.disk is None or nbytes == 0 or nbytes + DISK_MARGIN <= self.disk

    def holds(self, nbytes: int) -> bool:
        """Whether memory holds weights of this size, and what they are computed with."""
        return self.memory is not None and nbytes * IN_MEMORY <= self.memory


def models(sizes: Mapping[str, int]) -> dict[str, int]:
    """The GGUF files that are models, with their bytes; of one in several parts the first stands for all.

    Those of which a part is missing are not among them, see :func:`missing_parts`.
    """
    found = {name: size for name, size in sizes.items() if _is_model(name) and name == part_names(name)[0]}
    found = {name: sum(sizes.get(part, 0) for part in part_names(name)) for name in sorted(found)}
    whole = {name: size for name, size in found.items() if not missing_parts(name, sizes)}
    return {name: size for name, size in whole.items() if not _DRAFT.search(name.lower())} or whole


def missing_parts(name: str, names: Collection[str]) -> list[str]:
    """What of the parts of a model is not among ``names``."""
    return [part for part in part_names(name) if part not in names]


def incomplete(names: Collection[str]) -> str:
    """One line about a model in parts that lacks some of them; empty where there is none."""
    for name in sorted(names):
        if missing := missing_parts(name, names):
            parts = part_names(name)
            return (f"{name} is one of {len(parts)} parts, of which {missing[0]} is missing ({len(missing)} in all); "
                    "bring it into the same folder")  # fmt: skip
    return ""


def _is_model(name: str) -> bool:
    # The folder of what is beside a model may say more than the file's own name.
    folders = PurePosixPath(name.lower()).parts[:-1]
    return (name.endswith(".gguf") and not NOT_A_MODEL.search(_base(name).lower())
            and not any("mmproj" in folder for folder in folders))  # fmt: skip


def quantisation(name: str) -> str:
    """``"Q4_K_M"`` of ``"Some-Model-Q4_K_M.gguf"``; empty where the name says nothing.

    Of several that of the fewest bits: tables are often kept in another type, which the name says too.
    """
    found = [_SPELLED.get(match[0], match[0]) for match in _QUANTISATION.finditer(_base(name).upper())]
    return min(found, key=_nominal, default="")


def pick(sizes: Mapping[str, int], room: Room, where: str, here: Collection[str] = ()) -> tuple[str, str]:
    """Pick one of several GGUF files of one model, and say why in one line.

    - Files that are here already go before any download, so that a name means the same file tomorrow and offline.
    - The disk is the hard limit: what does not fit there, with a margin, is not taken.
    - Of the rest, the best quality (the largest file) that RAM and VRAM hold whole.
    - If they hold none, or nobody tells, the one nearest 4.5 bits a weight: any size can stream from the disk.
    - Among equals K-quants go before the older ones, and these before the IQ ones. 32 bits are never better than 16.

    Parameters
    ----------
    sizes
        Bytes by name, as :func:`models` gives them.
    where
        The folder or the Hub id, for messages.
    here
        The names of those that need no disk.

    Returns
    -------
    tuple of str
        The name, and the reason; without a choice that is empty.

    Raises
    ------
    CheckpointError
        If the names are those of several models.
    """
    if len(sizes) == 1:
        return next(iter(sizes)), ""
    _refuse_several_models(sizes, where)
    cached = {name: size for name, size in sizes.items() if not missing_parts(name, here)}
    stored = cached or {name: size for name, size in sizes.items() if room.stores(size)}
    pool = _not_wasteful(stored or sizes)
    name, reason = _best(pool, room) if stored else (min(sizes, key=lambda name: (sizes[name], name)), "the smallest")
    if not stored:
        reason += f"; none leaves room on the disk, which has {format_bytes(room.disk or 0)} free"
    elif cached and len(cached) < len(sizes):
        reason = "it is here already" if len(cached) == 1 else f"of the {len(cached)} that are here already {reason}"
    elif len(stored) < len(sizes):
        reason += f" and the {format_bytes(room.disk or 0)} free on disk"
    parts = f", {len(part_names(name))} parts" if len(part_names(name)) > 1 else ""
    return name, (f"took {whole_name(name)} ({format_bytes(sizes[name])}{parts}) of {len(sizes)} GGUF files: {reason}; "
                  f"name another as {where}:FILE.gguf")  # fmt: skip


def listed(names: Collection[str]) -> str:
    """Up to eight names, for a message."""
    shown = sorted(names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _best(sizes: Mapping[str, int], room: Room) -> tuple[str, str]:
    if held := {name: size for name, size in sizes.items() if room.holds(size)}:
        least = max(held.values()) * (1 - TIE)
        equal = [name for name, size in held.items() if size >= least]
        name = min(equal, key=lambda name: (_family(name), -sizes[name], name))
        return name, f"the best that fits {format_bytes(room.memory or 0)} of memory"
    bits = _bits(sizes)

    def distance(name: str) -> tuple[float, int, int, str]:
        beyond = max(0.0, abs(bits[name] - STREAMED_BITS) - STREAMED_WINDOW)
        return round(beyond, 2), _family(name), -sizes[name], name

    nearest = f"the one nearest {STREAMED_BITS} bits a weight"
    if room.memory is None:
        return min(sizes, key=distance), f"{nearest} that fits"
    return min(sizes, key=distance), f"{nearest}, as {format_bytes(room.memory)} of memory holds none whole"


def _not_wasteful(sizes: Mapping[str, int]) -> Mapping[str, int]:
    """Without 32 bits a weight, where there is another."""
    return {name: size for name, size in sizes.items() if quantisation(name) != "F32"} or sizes


def _family(name: str) -> int:
    """How the quantisations rank among files of the same size."""
    kind = quantisation(name)
    if kind == "BF16":
        return 0  # what most models were trained in; float16 may have overflowed
    if kind in ("F16", "F32") or "_K" in kind or kind.startswith(("MX", "NV")):
        return 1
    return 2 if kind.startswith("Q") else 3


def _bits(sizes: Mapping[str, int]) -> dict[str, float]:
    """Bits a weight of each file by its size, which counts what a name leaves out: tables that are packed less."""
    known = {name: bits for name in sizes if (bits := _nominal(quantisation(name)))}
    if not known:
        return dict.fromkeys(sizes, STREAMED_BITS)
    # The more bits, the nearer all tensors of a file are to what its name says.
    surest = max(known, key=lambda name: (known[name], sizes[name]))
    weights = sizes[surest] * 8 / known[surest] or 1
    return {name: size * 8 / weights for name, size in sizes.items()}


def _nominal(kind: str) -> float:
    if kind in ("F32", "F16", "BF16"):
        return 32.0 if kind == "F32" else 16.0
    digit = re.search(r"\d", kind)
    return _BITS.get(int(digit[0]), 0.0) if digit else 0.0


def _refuse_several_models(sizes: Mapping[str, int], where: str) -> None:
    if len({_model(name) for name in sizes}) > 1:
        first = min(sizes)
        raise CheckpointError(f"{where} holds {len(sizes)} GGUF files; name one of them, as {where}:{first} (their "
                              f"names are not those of one model in several sizes): {listed(sizes)}")  # fmt: skip


def _model(name: str) -> str:
    """A file's name without what it says of the quantisation."""
    stem = whole_name(_base(name)).removesuffix(".gguf").lower()
    found = list(_QUANTISATION.finditer(stem.upper()))
    before = stem[: found[0].start()] if found else stem
    behind = _QUANTISATION.sub("", stem[len(before) :].upper()).lower()
    return "-".join([*_words(before, _MARKS), *_words(behind, _MARKS | _MARKS_BEHIND)])


def _words(text: str, without: Collection[str]) -> list[str]:
    return [word for word in re.split(r"[-._\s]+", text) if word and word not in without]


def _base(name: str) -> str:
    return PurePosixPath(name).name
