"""A LoRA adapter at rest, in PEFT's format: ``adapter_config.json`` beside ``adapter_model.safetensors`` (or ``.bin``).

What it adapts is read from the names of its tensors, which PEFT has matched already; the config gives the scale of
each (https://arxiv.org/abs/2106.09685) and says what kind it is. What would change the result silently is refused.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import LoadOptions, format_bytes
from ...disk import read_json
from ...errors import CheckpointError, UnsupportedModelError
from ...progress import ProgressCallback, silent
from ...tensors.index import TensorInfo
from ..patterns import Patterns
from .files import CONFIG_FILE, AdapterFiles, find_adapter, read_tensors

PREFIX = "base_model.model."
# Of r and lora_alpha: more than any layer has columns.
LARGEST = 1 << 24
_FLOATS = ("F64", "F32", "F16", "BF16")
# Older versions of PEFT wrote the name "default" of the only adapter.
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.(weight|bias)")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")
_BASE = ".base_layer."
_MODEL = re.compile(r"\bmodel\.")

_MERGE = ("merge it into its base model (peft: merge_and_unload, then save_pretrained of what it returns) and load "
          "that folder")  # fmt: skip
# peft_type of adapters that add tokens or keys to the prompt instead of changing matrices.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
            "CARTRIDGE")  # fmt: skip
# Options of LoraConfig under which the output is not base + scale · B A x, and what they are.
_VARIANTS = {
    "use_dora": "uses DoRA (use_dora), which rescales the columns of the whole merged matrix",
    "target_parameters": "adapts expert parameters (target_parameters), which are not used by calling a layer",
    "trainable_token_indices": "has new vectors for single tokens (trainable_token_indices)",
    "layer_replication": "repeats layers of its base model (layer_replication)",
    "use_qalora": "pools its inputs (use_qalora)",
    "use_bdlora": "is block-diagonal (use_bdlora)",
    "arrow_config": "chooses between adapters (arrow_config)",
    "alora_invocation_tokens": "begins at an invocation within the prompt (alora_invocation_tokens)",
    "velora_config": "uses VeLoRA (velora_config)",
    "monteclora_config": "uses MonteCLoRA (monteclora_config)",
    "kasa_config": "uses KaSA (kasa_config)",
}
# Ways to begin that take something out of the base model's own weights.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Pair:
    """What one module gets: ``scale · B(A x)``.

    Attributes
    ----------
    module
        The module's name as the adapter has it, without PEFT's prefix.
    a, b
        ``[rank, in_features]`` and ``[out_features, rank]``.
    bias
        ``[out_features]``, added to what B gives.
    is_embedding
        The input is ids: A has a column for each row of the table.
    """

    module: str
    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo
    bias: TensorInfo | None = None
    is_embedding: bool = False

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(info for info in (self.a, self.b, self.bias) if info is not None)


@dataclass(frozen=True)
class Adapter:
    """An adapter that was found and checked; nothing of its weights is read.

    Attributes
    ----------
    weights
        Parameter name → what the adapter has in the place of the base model's: biases, ``modules_to_save``.
    copies
        Those of ``weights`` that PEFT saved because LoRA is around them.
    own
        ``modules_to_save``: modules whose weights are no longer tied to any other.
    base
        What it was trained on, as it says; empty where it does not.
    """

    name: str
    file: Path
    pairs: tuple[Pair, ...]
    weights: Mapping[str, TensorInfo] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    own: tuple[str, ...] = ()
    base: str = ""
    keeps_ties: bool = False

    @property
    def nbytes(self) -> int:
        """Of all its tensors, as they are stored."""
        return sum(info.nbytes for pair in self.pairs for info in pair.tensors) + sum(
            info.nbytes for info in self.weights.values()
        )

    def __str__(self) -> str:
        ranks = sorted({pair.rank for pair in self.pairs})
        rank = "–".join(str(each) for each in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "none"
        own = f", {len(self.weights)} weights of its own" if self.weights else ""
        return f"{self.name}: r={rank}, {len(self.pairs)} modules{own}, {format_bytes(self.nbytes)}"


def read_adapter(
    adapter: str | Path, options: LoadOptions, *, progress: ProgressCallback = silent, weights: bool = True
) -> Adapter:
    """Find an adapter on this machine or on the Hub, and check all that can be checked without its base model.

    Parameters
    ----------
    adapter
        A folder as PEFT's ``save_pretrained`` writes it, or the Hub id of one.
    weights
        ``False`` downloads only the config and the header: the extents then lie where the file will be.

    Raises
    ------
    SourceError
        If it cannot be found or downloaded.
    CheckpointError
        If it is damaged or no adapter.
    UnsupportedModelError
        If it is not of a kind that can be applied; the message says what to do.
    """
    files = find_adapter(adapter, options)
    settings = read_json(files.folder / CONFIG_FILE)
    _check(settings, files.name)
    return _Reader(files, settings).read(read_tensors(files, options, progress, weights))


def _check(settings: Mapping[str, Any], name: str) -> None:
    """Refuse what cannot be applied, before its weights are downloaded."""
    kind = str(settings.get("peft_type")).upper()
    if kind in _PROMPTS:
        raise UnsupportedModelError(f"{name} is a {kind} adapter: it puts learned vectors beside the prompt; only "
                                    "LORA adapters are applied here, run this one with peft itself")  # fmt: skip
    if kind != "LORA":
        raise UnsupportedModelError(f"{name} is a {kind} adapter; only LORA adapters are applied here: {_MERGE}")
    for option, what in _VARIANTS.items():
        if settings.get(option):
            raise UnsupportedModelError(f"{name} {what}, so it is no plain LoRA; {_MERGE}")
    began = settings.get("init_lora_weights")
    if isinstance(began, str) and began.lower().startswith(_CHANGES_BASE):
        raise UnsupportedModelError(f"{name} was begun with init_lora_weights={began!r}, which changes the weights of "
                                    "the base model too; save it as plain LoRA (peft: save_pretrained(..., "
                                    "path_initial_model_for_weight_conversion=...)) and load that folder")  # fmt: skip


class _Reader:
    """Sorts the tensors of one adapter."""

    def __init__(self, files: AdapterFiles, settings: Mapping[str, Any]):
        self._files, self._name, self._where = files, files.name, files.folder / CONFIG_FILE
        self._settings = settings
        self._ranks, self._alphas = (
            Patterns(settings.get(option) or {}, (self._where, option)) for option in ("rank_pattern", "alpha_pattern")
        )
        self._targets, self._left_out = self._chosen("target_modules"), self._chosen("exclude_modules")
        saved = settings.get("modules_to_save") or ()
        self._own = tuple(saved) if isinstance(saved, (list, tuple)) else (str(saved),)

    def read(self, tensors: Mapping[str, TensorInfo]) -> Adapter:
        parts: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
        weights: dict[str, TensorInfo] = {}
        copies = set()
        for key, info in tensors.items():
            if info.dtype not in _FLOATS:
                raise self._damaged(f"{key} has dtype {info.dtype}, not one of {', '.join(_FLOATS)}")
            name = key.removeprefix(PREFIX)
            if found := _LORA.fullmatch(name):
                part = "bias" if found[3] == "bias" else found[2]
                parts.setdefault((found[1], False), {})[part if found[2] == "B" else found[2]] = info
            elif found := _EMBEDDING.fullmatch(name):
                parts.setdefault((found[1], True), {})[found[2]] = info
            elif ".lora_" in name:
                raise UnsupportedModelError(f"{self._name} holds {name}, which is no part of plain LoRA; {_MERGE}")
            else:
                plain = name.replace(_BASE, ".")
                weights[plain] = info
                copies |= {plain} if _BASE in name else set()
        if not parts and not weights:
            raise self._damaged("it holds no tensors")
        pairs = tuple(self._pair(module, is_table, found) for (module, is_table), found in parts.items())
        return Adapter(
            self._name, self._files.weights, pairs, weights, frozenset(copies), self._own,
            str(self._settings.get("base_model_name_or_path") or ""), bool(self._settings.get("ensure_weight_tying")),
        )  # fmt: skip

    def _pair(self, module: str, is_table: bool, found: Mapping[str, TensorInfo]) -> Pair:
        for part in "AB":
            if part not in found:
                raise self._damaged(f"{module} has no lora_{part}")
        # PEFT would leave it out. Of experts the names have changed: whoever looks for them says more.
        if ".experts." not in module and not self._is_target(module):
            raise self._damaged(f"it adapts {module}, which target_modules in {CONFIG_FILE} does not name")
        a, b, bias = found["A"], found["B"], found.get("bias")
        if len(a.shape) != 2 or len(b.shape) != 2:
            shape = list(a.shape if len(a.shape) != 2 else b.shape)
            raise UnsupportedModelError(f"{self._name} adapts {module} by a tensor of shape {shape}: only linear "
                                        f"layers and embeddings are adapted here; {_MERGE}")  # fmt: skip
        rank, alpha = self._numbers(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise self._damaged(f"{module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG_FILE} "
                                f"says r={rank}")  # fmt: skip
        if bias is not None and tuple(bias.shape) != b.shape[:1]:
            raise self._damaged(f"{module} has a bias of shape {list(bias.shape)} beside lora_B {list(b.shape)}")
        scale = alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)
        return Pair(module, rank, scale, a, b, bias, is_table)

    def _is_target(self, module: str) -> bool:
        """Whether the config names a module, as PEFT decides it (``check_target_module_exists``)."""
        if not self._targets(module) or self._left_out(module):
            return False
        layers = self._settings.get("layers_to_transform")
        number = next((int(word) for word in module.split(".") if word.isdecimal()), None)
        return layers in (None, []) or number in (layers if isinstance(layers, list) else [layers])

    def _chosen(self, option: str) -> Callable[[str], bool]:
        """What tells whether an entry that is a list of names, or one expression, chooses a module."""
        said = self._settings.get(option)
        if said == "all-linear" and option == "target_modules":
            return lambda module: True
        if isinstance(said, str):
            pattern = Patterns({said: True}, (self._where, option), whole=True)
            # Versions of transformers differ in where "model." stands in a name.
            return lambda module: any(pattern.first(name, False) for name in (module, _MODEL.sub("", module)))
        if said is None or (isinstance(said, list) and all(isinstance(name, str) for name in said)):
            return lambda module: any(f".{module}".endswith(f".{name}") for name in said or ())
        raise CheckpointError(f"{self._where} is damaged: {option} is {reprlib.repr(said)}, no list of names and no "
                              "expression; download it again")  # fmt: skip

    def _numbers(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module: of the first pattern that fits the end of its name, as PEFT has it."""
        rank, alpha = self._settings.get("r", 8), self._settings.get("lora_alpha", 8)
        rank, alpha = self._ranks.first(module, rank), self._alphas.first(module, alpha)
        is_rank = isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank < LARGEST
        if not is_rank or not isinstance(alpha, (int, float)) or not -LARGEST < alpha < LARGEST:
            raise CheckpointError(f"{self._where} is damaged: r={reprlib.repr(rank)} and lora_alpha="
                                  f"{reprlib.repr(alpha)} of {module}; download it again")  # fmt: skip
        return rank, float(alpha)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._files.weights} is damaged or of another adapter: {what}; download it again")
