"""What a folder or a repository is that is no checkpoint of transformers, and the way out: by names or its config."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...disk import read_json
from ...errors import CheckpointError, UnsupportedModelError

_TRANSFORMERS = "use the transformers version of the model (with config.json and model.safetensors)"
_OF_OTHERS: tuple[tuple[str, str], ...] = (
    (r"consolidated.*|original/.*\.pth|.*/consolidated.*", f"holds the original consolidated weights; {_TRANSFORMERS}"),
    (r".*\.engine", f"holds TensorRT-LLM engines, which run on the GPU they were built for only; {_TRANSFORMERS}"),
    (r".*\.llamafile", "holds a llamafile; use the GGUF version of the model"),
    (r".*\.(ggml|ggmlv\d)\.bin|ggml-.*\.bin|.*\.ggjt", "holds GGML files, which came before GGUF; use a GGUF version"),
    (r"(.*/)?openvino_.*\.(xml|bin)", f"holds weights of OpenVINO only; {_TRANSFORMERS}"),
    (r".*\.(mlpackage|mlmodelc)/.*|.*\.mlmodel", f"holds weights of CoreML only; {_TRANSFORMERS}"),
    (r"(.*/)?weights(\..*)?\.npz", f"holds weights of MLX only; {_TRANSFORMERS}"),
    (r".*\.onnx(_data)?", f"holds weights of ONNX only; {_TRANSFORMERS}"),
    (r".*\.h5|.*\.ckpt\.(index|data-.*)|.*saved_model\.pb",
     "holds weights of TensorFlow only; convert them to safetensors with transformers first"),
    (r".*\.msgpack", "holds weights of Flax only; convert them to safetensors with transformers first"),
    (r".*\.(tflite|task|litertlm)", f"holds weights of LiteRT only; {_TRANSFORMERS}"),
    (r".*\.nemo", f"holds a NeMo archive; {_TRANSFORMERS}"),
    (r"(?!(.*/)?(optimizer|scheduler|rng_state)).*\.(pth|pt|ckpt)",
     f"holds PyTorch pickles in a layout of their own (.pth, .pt, .ckpt); {_TRANSFORMERS}"),
    (r".*mmproj.*\.gguf", "holds only a vision part (mmproj); name the repository or the file of the model itself"),
    (r".*imatrix.*(\.gguf|\.dat)", "holds only an importance matrix, not a model; use a GGUF version of the model"),
)  # fmt: skip
_DATA = re.compile(r".*\.(parquet|arrow|jsonl(\.gz|\.zst)?|csv|tsv)|dataset_infos\.json|dataset_dict\.json")


def why_not(names: Collection[str], where: str, base: str = "") -> str:
    """What a checkpoint without loadable weights is, and the way out, as the rest of a sentence."""
    if "adapter_config.json" in names:
        model = f"its base model {base}" if base else "its base model"
        return f"holds a LoRA adapter (adapter_config.json), not a model; load {model} with --adapter {where}"
    if "model_index.json" in names:
        return "is a diffusers pipeline, not a causal language model"
    for pattern, line in _OF_OTHERS:
        if any(re.fullmatch(pattern, name) for name in names):
            return line
    if "config.json" in names:
        return "holds a config.json but no weights (model.safetensors, pytorch_model.bin or a .gguf file); add them"
    if "params.json" in names:
        return f"holds a params.json, which the original layout has beside its weights; {_TRANSFORMERS}"
    if any(_DATA.fullmatch(name) for name in names) and not any(name.endswith(".safetensors") for name in names):
        return "is a data set, not a model; name the folder or the id of a model"
    return "holds no config.json, so it is no checkpoint; name the folder or the id that has one"


def with_hint(error: CheckpointError, folder: Path, names: Collection[str]) -> CheckpointError:
    """Name what was probably meant: an adapter's base model, or a folder below (a snapshot in the Hub's cache)."""
    if any(name.endswith(".gguf") for name in names):
        return error
    if "adapter_config.json" in names and (base := _base_model(folder)):
        return CheckpointError(f"{folder} {why_not(names, str(folder), base)}")
    if "config.json" in names:
        return error
    below = sorted({path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/config.json")})
    if not below:
        return error
    return CheckpointError(f"{folder} holds no config.json, but {below[0]} does; name that folder"
                           + (f" or one of {len(below) - 1} others below" if below[1:] else ""))  # fmt: skip


def refuse_foreign(config: Mapping[str, Any], where: str) -> None:
    """Refuse safetensors that another program packed, from ``config.json`` alone.

    Raises
    ------
    UnsupportedModelError
        With the program's name and the remedy.
    """
    said = [config.get(name) for name in ("quantization_config", "quantization")]
    settings = [part for part in said if isinstance(part, Mapping) and part]
    methods = {str(part.get("quant_method") or "") for part in settings}
    program = next((name for method, name in (("exl2", "EXL2"), ("exl3", "EXL3")) if method in methods), "")
    if not any(methods) and any({"group_size", "bits"} <= part.keys() for part in settings):
        program = "MLX"
    if program:
        raise UnsupportedModelError(f"{where} is packed for {program}, which cannot be streamed; load the model that "
                                    "it was made from, with compression='4bit', or a GGUF version")  # fmt: skip


def _base_model(folder: Path) -> str:
    """The model that an adapter in this folder was made for; empty where it does not say."""
    try:
        said = read_json(folder / "adapter_config.json")
        return str(said.get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        return ""
