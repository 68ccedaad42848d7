"""The encodings by name: those that we write, and the formats of checkpoints that others have packed.

Of these: which one a config names, and what of its tensors lies packed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from ..errors import CheckpointError, OptionError, UnsupportedModelError
from ..tensors.index import TensorInfo
from .affine8 import Affine8
from .base import Encoded, Encoding, Plain
from .bnb import STATE
from .nf4 import NF4

# What the option ``compression`` and stores call it → what we write.
_WRITTEN: dict[str, Encoding] = {each.compression: each for each in (Plain(), NF4(), Affine8())}
# What config.json calls the method → the module that knows it, imported when it is met. GGUF files have no config.
FORMATS = {
    "bitsandbytes": "bnb", "fp8": "fp8", "fbgemm_fp8": "fp8", "compressed-tensors": "fp8", "modelopt": "fp8",
    "gptq": "gptq", "awq": "awq", "mxfp4": "mxfp4",
}  # fmt: skip
# Where AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt wrote it before config.json had a place for it → the method.
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# What a weight of floating point has at rest only where something beside it says what its numbers mean.
FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
CODED = (*FP8, "F8_E8M0", "I8", "U8", "I32")
# What names of packed tensors have in them → who packs so.
_MARKS = {
    r"\.qweight$": "GPTQ or AWQ", re.escape(STATE): "bitsandbytes", r"\.(absmax|SCB)$": "bitsandbytes",
    r"_blocks$": "MXFP4", r"\.weight_packed$": "compressed-tensors", r"\.weight_scale_2$": "NVFP4",
}  # fmt: skip


class UnknownShapeError(Exception):
    """A weight that the model needs lies packed in a shape that only its file knows, and that is not here."""

    def __init__(self, name: str):
        super().__init__(f"the shape of {name} is packed in a file that is not here")


def get_encoding(compression: str | None) -> Encoding:
    """What weights are written as: by the option's ``None``, ``"none"``, ``"4bit"`` or ``"8bit"``."""
    name = "none" if compression is None else compression
    if name not in _WRITTEN:
        raise OptionError(f"compression={compression!r} is not known; use None, '4bit' or '8bit'")
    return _WRITTEN[name]


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a ``config.json`` says of how the checkpoint is quantised, ``quant_method`` included; empty if it is not."""
    for part in (config, config.get("text_config")):
        for name in ("quantization_config", "compression_config"):
            given = part.get(name) if isinstance(part, Mapping) else None
            if isinstance(given, Mapping) and given:
                method = given.get("quant_method") or _of_old(given) or name
                return {**given, "quant_method": str(method)}
    return {}


def beside(file: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What ``given``, the content of one of the files :data:`BESIDE` config.json, would be in a config.json."""
    said = given.get("quantization", given)
    said = said if isinstance(said, Mapping) else {}
    return {"quant_method": "awq" if "w_bit" in said else BESIDE[file], **said}


def _format(settings: Mapping[str, Any]) -> Any:
    return import_module(f"{__package__}.{FORMATS[settings['quant_method']]}")


def _of_old(settings: Mapping[str, Any]) -> str:
    """The method of a config that was written before there was a ``quant_method``."""
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else ""


def check(config: Mapping[str, Any], name: str) -> None:
    """Refuse a quantisation that cannot be streamed, from ``config.json`` alone.

    Raises
    ------
    UnsupportedModelError
        With the reason; ``name`` is the model's, for the message.
    """
    settings = quantisation(config)
    if not settings:
        return
    method = settings["quant_method"]
    if method not in FORMATS:
        raise UnsupportedModelError(f"{name} is quantised with {method}, which cannot be streamed (these can: "
                                    f"{', '.join(FORMATS)}, GGUF); load the unquantised checkpoint, with "
                                    "compression='4bit' if it should be small")  # fmt: skip
    _format(settings).check(settings)


def find(
    config: Mapping[str, Any], index: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, TensorInfo], dict[str, Encoded]]:
    """The tensors of a checkpoint, apart: those that are weights as they are, and the weights that lie packed.

    Parameters
    ----------
    config
        The checkpoint's ``config.json``.
    index
        All its tensors.
    shapes
        Native shapes, for what only the model knows.

    Raises
    ------
    CheckpointError
        If the config names a quantisation and no tensor is packed.
    """
    settings = quantisation(config)
    if not settings:
        return dict(index), {}
    packed = _format(settings).find(settings, index, shapes)
    if index and not packed and are_here(index.values()):
        raise CheckpointError(f"config.json says that the weights are quantised ({settings['quant_method']}), but none "
                              "of them is; the two do not belong together: download the checkpoint again, or take "
                              "quantization_config out of config.json")  # fmt: skip
    taken = {info.name for weight in packed.values() for info in weight.parts.values()} | packed.keys()
    return {name: info for name, info in index.items() if name not in taken}, packed


def unknown(plain: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Those of the tensors left over by :func:`find` that are packed weights, in shapes that the headers do not say."""
    weights = {name.partition(STATE)[0] for name in plain if STATE in name}
    return {name: plain[name] for name in sorted(weights & plain.keys())}


def coded(plain: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Those of the tensors left over by :func:`find` that are no weights as they lie: a scale should be beside them."""
    return {name: info for name, info in sorted(plain.items()) if info.dtype in CODED}


def look_packed(index: Mapping[str, TensorInfo]) -> bool:
    """Whether some of a checkpoint's tensors are what one of the formats has."""
    return any(info.dtype in FP8 or layout(name) for name, info in index.items())


def layout(name: str) -> str:
    """Who packs weights into tensors of such a name; empty where nobody does."""
    return next((who for mark, who in _MARKS.items() if re.search(mark, name)), "")


def first_packed(names: Iterable[str]) -> str | None:
    """The first of the names that only packed tensors have."""
    return next((name for name in names if layout(name)), None)


def scale_of(names: Iterable[str], index: Iterable[str]) -> tuple[str, str] | None:
    """The first of the weights that has a tensor beside it that is called a scale, and that one."""
    scales = {name.rpartition(".")[0]: name for name in index if "scale" in name.rpartition(".")[2]}
    found = ((name, scales.get(name.rpartition(".")[0])) for name in names)
    return next(((name, scale) for name, scale in found if scale), None)


def are_here(tensors: Iterable[TensorInfo]) -> bool:
    """Whether all the files are on this machine, so that what is in them can be read."""
    return all(path.is_file() for path in {extent.path for info in tensors for extent in info.extents})
