"""What a family of checkpoints with code of its own is, as data: which native class it stands for and how it maps.

A family says how its config reads in the native class, which rows of which tensors make up each native parameter (so
that splits and renames are extents, not copies), what its tokenizer is, and which variants are refused. Nothing of a
repository's code is run, and nothing is subclassed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UnsupportedModelError
from ...tensors.index import TensorInfo

Config = Mapping[str, Any]
ATTENTION = "airllm_attention"
# For each target of a split, the ranges of rows that it takes.
Rows = Callable[[Config], Sequence[Sequence[tuple[int, int]]]]


@dataclass(frozen=True)
class Conversion:
    """Tensors whose whole name matches ``source`` become ``targets`` (templates, as in ``re.Match.expand``).

    ``rows`` says from the config which rows each target takes; ``None`` for a mere renaming.
    """

    source: str
    targets: tuple[str, ...]
    rows: Rows | None = None


@dataclass(frozen=True)
class Refusal:
    """A variant that is not mapped: ``applies`` to a config, and what to say of it."""

    applies: Callable[[Config], Any]
    reason: str


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes
    ----------
    model_type
        As in its config.json.
    architectures
        The classes that are causal language models, the base model's included.
    native
        The ``model_type`` that it is mapped onto.
    refusals
        Checked in order, before anything is downloaded or converted.
    translate
        Its config → the native one, as a dict. What is under ``ATTENTION`` in it asks for a way to attend that the
        native class lacks; ``airllm_nb.model.attention`` has them.
    conversions
        The first that matches a name is taken; names that none matches stay.
    tokenizer
        Folder and config → a tokenizer.
    normalised
        Native names of the matrices whose rows are brought to length 1 before use: these are written once.
    """

    model_type: str
    architectures: tuple[str, ...]
    native: str
    refusals: tuple[Refusal, ...]
    translate: Callable[[Config], dict[str, Any]]
    conversions: tuple[Conversion, ...]
    tokenizer: Callable[[Path, Config], Any]
    normalised: Callable[[Config], tuple[str, ...]] = lambda _: ()

    def native_config(self, config: Config) -> dict[str, Any]:
        """The native config.

        Raises
        ------
        UnsupportedModelError
            If the variant is not mapped.
        CheckpointError
            If the config lacks a value.
        """
        name = next(iter(config.get("architectures") or []), self.architectures[0])
        if name not in self.architectures:
            raise UnsupportedModelError(f"{name} (model_type {self.model_type!r}) is no causal language model that "
                                        f"runs here; of this type {' and '.join(self.architectures)} do")  # fmt: skip
        try:
            for refusal in (*_EVERYWHERE, *self.refusals):
                if refusal.applies(config):
                    raise UnsupportedModelError(f"{name} (model_type {self.model_type!r}): {refusal.reason}")
            return {"model_type": self.native, **self.translate(config)}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"config.json is not one of a {name} ({type(error).__name__}: {error}); download it "
                                  "again") from None  # fmt: skip

    def native_tensors(self, index: Mapping[str, TensorInfo], config: Config) -> dict[str, TensorInfo]:
        """The tensors of a checkpoint by native name: runs of rows of what lies in its files.

        Raises
        ------
        CheckpointError
            If a tensor has not the rows that the config asks for.
        """
        tensors = {}
        for name, info in index.items():
            if name.endswith("inv_freq"):  # a rotary table, not a weight
                continue
            conversion, found = self._conversion(name)
            if conversion is None or found is None:
                tensors[name] = info
                continue
            parts = conversion.rows(config) if conversion.rows else [[(0, info.shape[0])]]
            expected = sum(last - first for part in parts for first, last in part)
            if expected != info.shape[0]:
                raise CheckpointError(f"{info.extents[0].path}: {name} has {info.shape[0]} rows, config.json asks for "
                                      f"{expected}; they do not belong together")  # fmt: skip
            for target, part in zip(conversion.targets, parts, strict=True):
                native = found.expand(target)
                tensors[native] = info.rows(native, part)
        return tensors

    def _conversion(self, name: str) -> tuple[Conversion | None, re.Match[str] | None]:
        for conversion in self.conversions:
            if found := re.fullmatch(conversion.source, name):
                return conversion, found
        return None, None


_EVERYWHERE = (
    Refusal(
        lambda config: config.get("quantization_config"),
        "it is quantised already, which cannot be mapped; load the unquantised checkpoint, with compression='4bit' if "
        "it should be small",
    ),
)


def thirds(rows: int) -> list[list[tuple[int, int]]]:
    """Queries, keys and values of ``rows`` rows each, one after the other."""
    return [[(0, rows)], [(rows, 2 * rows)], [(2 * rows, 3 * rows)]]


def llama_like(config: Config, **changes: Any) -> dict[str, Any]:
    """A config that has Llama's keys, without those that are of its own code; ``changes`` overrides them."""
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    optional = ("hidden_act", "initializer_range", "max_position_embeddings", "use_cache", "torch_dtype", "dtype",
                "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    values = {key: config[key] for key in keys} | {key: config[key] for key in optional if key in config}
    return {**values, "num_key_value_heads": config["num_attention_heads"], "tie_word_embeddings": False, **changes}


# A sequence may be so many times longer than what a model with stretching angles was trained on.
STRETCH = 16


def stretched(trained: int, context: int, base: float, *, growth: str, factor: float = 1.0, logn: bool = False) -> dict:
    """The native settings for angles that stretch with the length of the sequence (dynamic NTK).

    Parameters
    ----------
    trained
        Tokens up to which nothing changes.
    context
        Tokens of the longest sequence.
    growth
        ``"doubling"`` (Qwen) or ``"linear"`` (InternLM).
    logn
        Whether queries past ``trained`` are scaled by the logarithm of their position.
    """
    # The native angles never change below max_position_embeddings, so that keys in a cache stay comparable; the
    # stretching is done when attending.
    rope = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": float(base)}
    attention = {"kind": "ntk", "trained": trained, "growth": growth, "factor": float(factor), "logn": logn}
    return {"rope_parameters": rope, "max_position_embeddings": context, ATTENTION: attention}


def plain_rope(base: float) -> dict[str, Any]:
    """The native settings for angles that never change."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": float(base)}}
