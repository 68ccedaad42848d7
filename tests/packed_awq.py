"""AWQ checkpoints that AutoAWQ packed, and the model that it dequantises from them (``make formats``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from packed_gptq import QUANTISED, grid, library, load_plain, plain_tensors, save
from safetensors.torch import load_file


def make(folder: Path, source: Path, *, group_size: int = 32, zero_point: bool = True) -> Path:
    """``source`` with every projection rounded to the nearest and packed by AutoAWQ's ``WQLinear_GEMM``."""
    tensors = plain_tensors(source)
    for name in [name for name in tensors if QUANTISED.search(name)]:
        packed = pack(tensors.pop(name).float(), group_size, zero_point)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in packed.items()}
    settings = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": zero_point, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    return save(folder, source, tensors, settings)


def pack(weight: torch.Tensor, group_size: int, zero_point: bool) -> dict[str, torch.Tensor]:
    """``qweight``, ``qzeros`` and ``scales`` of ``[out, in]``."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    scale, zero = (part.view(rows, -1) for part in grid(weight.reshape(-1, size), 4, sym=not zero_point))
    wide, middle = scale.repeat_interleave(size, 1), zero.repeat_interleave(size, 1)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = (((weight / wide).round() + middle).clamp(0, 15) - middle) * wide
    layer = library("awq.modules.linear.gemm").WQLinear_GEMM.from_linear(
        linear, 4, size, scales=scale.t().contiguous(), zeros=zero.t().contiguous()
    )
    return layer.state_dict()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint in float32, as AutoAWQ dequantises it."""
    group_size = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]["group_size"]
    stored = load_file(folder / "model.safetensors")
    tensors = {name: value.float() for name, value in stored.items() if value.is_floating_point()}
    for name in [name.removesuffix("qweight") for name in stored if name.endswith(".qweight")]:
        scales = tensors.pop(f"{name}scales")
        words, zeros = stored[f"{name}qweight"], stored[f"{name}qzeros"]
        size = len(words) if group_size == -1 else group_size
        weight = library("awq.utils.packing_utils").dequantize_gemm(words, zeros, scales, 4, size)
        tensors[f"{name}weight"] = weight.t().contiguous()
    return tensors


def reference(folder: Path) -> Any:
    """The dequantised model: float32, on the CPU."""
    return load_plain(folder, weights(folder))
