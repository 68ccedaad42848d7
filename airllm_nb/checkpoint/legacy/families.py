"""The families that are mapped, and the questions that the other rooms ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...tensors.index import TensorInfo
from . import baichuan, chatglm, internlm, internlm2, qwen
from .family import ATTENTION, Family

__all__ = ["ATTENTION", "FAMILIES", "family_of", "native_dict", "native_tensors", "normalised"]

FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in (chatglm, qwen, baichuan, internlm, internlm2)}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a ``config.json``; ``None`` where transformers' own classes are asked."""
    return FAMILIES.get(config.get("model_type", ""))


def native_dict(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``config``, or the native one that it stands for.

    Raises
    ------
    UnsupportedModelError
        If it is of a family that is mapped, but of a variant that is not.
    """
    family = family_of(config)
    return family.native_config(config) if family else config


def native_tensors(index: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Mapping[str, TensorInfo]:
    """The tensors of a checkpoint by the names that its native class, or transformers' own mapping, knows."""
    family = family_of(config)
    return family.native_tensors(index, config) if family else index


def normalised(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Native names of the matrices whose rows are brought to length 1 before use."""
    family = family_of(config)
    return family.normalised(config) if family else ()
