"""GPTQ checkpoints that AutoGPTQ packed, and the model that GPTQModel dequantises from them.

Both libraries lie in ``build/formats`` (``make formats``). Of each one module is imported, by its own source; their
packages would also import what only quantising a real model needs.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FORMATS = Path(__file__).parents[1] / "build" / "formats"
QUANTISED = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")


@functools.cache
def library(module: str, *instead: ModuleType) -> Any:
    """One module of a library, without what the packages above it import.

    ``instead`` is imported in place of its modules of those names. Nothing of the library stays in ``sys.modules``,
    where transformers would take it for installed.
    """
    root, *_ = parts = module.split(".")
    if not (FORMATS / root).is_dir():
        raise RuntimeError(f"{FORMATS / root} is missing; run: make formats")
    before = set(sys.modules)
    parents = [_package(".".join(parts[:count])) for count in range(1, len(parts))]
    sys.modules.update({stand_in.__name__: stand_in for stand_in in (*parents, *instead)})
    try:
        return importlib.import_module(module)
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == root:
                del sys.modules[name]


def _package(name: str) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = [str(FORMATS.joinpath(*name.split(".")))]
    return package


@functools.cache
def gptqmodel() -> Any:
    """``gptqmodel.utils.model_dequant``; its logger and its look for an NPU need packages that are compiled."""
    logger, devices = ModuleType("gptqmodel.utils.logger"), ModuleType("gptqmodel.utils.torch")
    logger.setup_logger = logging.getLogger  # type: ignore[attr-defined]
    devices.HAS_NPU = False  # type: ignore[attr-defined]
    return library("gptqmodel.utils.model_dequant", _package("gptqmodel.quantization"), logger, devices)


def tiny_qwen2_moe(folder: Path, tokenizer: Path) -> Path:
    """A plain Qwen2-MoE of four experts, whose matrices have names of their own in the file."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        shared_expert_intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    copy_settings(tokenizer, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Qwen2MoeForCausalLM(config).save_pretrained(folder)
    return folder


def copy_settings(source: Path, folder: Path) -> None:
    """Everything of a checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)


def plain_tensors(source: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as float16 as such checkpoints have them."""
    return {name: value.half() for file in source.glob("*.safetensors") for name, value in load_file(file).items()}


def save(folder: Path, source: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    """A checkpoint like that of ``source`` with other tensors."""
    copy_settings(source, folder)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config |= {"dtype": "float16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def load_plain(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    """The model of a folder as transformers loads it from other, unpacked tensors: float32, on the CPU."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / "plain"
        copy_settings(folder, plain)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        del config["quantization_config"]
        (plain / "config.json").write_text(json.dumps(config), "utf-8")
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()


def make(
    folder: Path, source: Path, *, bits: int = 4, group_size: int = 32, sym: bool = True, desc_act: bool = False,
    checkpoint_format: str = "gptq", lm_head: bool = False,
) -> Path:  # fmt: skip
    """``source`` with every projection rounded to the nearest and packed by AutoGPTQ."""
    tensors = plain_tensors(source)
    for name in [name for name in tensors if QUANTISED.search(name) or (lm_head and name == "lm_head.weight")]:
        weight = tensors.pop(name).float()
        packed = pack(weight, bits, group_size, sym, _order(name, weight.shape[1], group_size) if desc_act else None)
        if checkpoint_format == "gptq_v2":
            packed["qzeros"] = gptqmodel()._correct_gptq_v1_qzeros(packed["qzeros"], bits)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in packed.items()}
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act,
        "static_groups": False, "true_sequential": True, "damp_percent": 0.01, "lm_head": lm_head,
        "checkpoint_format": checkpoint_format,
    }  # fmt: skip
    return save(folder, source, tensors, settings)


def pack(
    weight: torch.Tensor, bits: int, group_size: int, sym: bool, order: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of ``[out, in]``; ``order`` is the group of each input."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = torch.arange(columns) // size if order is None else order
    count, most = -(-columns // size), (1 << bits) - 1
    scale, zero = torch.empty(rows, count), torch.empty(rows, count)
    for group in range(count):
        scale[:, group], zero[:, group] = grid(weight[:, groups == group], bits, sym)
    steps = (weight / scale[:, groups]).round() + zero[:, groups]
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = (steps.clamp(0, most) - zero[:, groups]) * scale[:, groups]
    layer = library("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear(bits, size, columns, rows, False)
    layer.pack(linear, scale, zero.clone(), groups.int())
    return {name: value.half() if name == "scales" else value for name, value in layer.state_dict().items()}


def grid(weight: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, as float16 holds it, and zero point of each row."""
    most = (1 << bits) - 1
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        return (2 * high / most).half().float(), torch.full_like(high, (most + 1) // 2)
    scale = ((high - low) / most).half().float()
    return scale, (-low / scale).round().clamp(1, most)


def _order(name: str, columns: int, group_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    size = columns if group_size == -1 else group_size
    return torch.randperm(columns, generator=generator) // size


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint in float32, as GPTQModel dequantises it."""
    settings = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return gptqmodel().convert_gptq_file(folder / "model.safetensors", torch.float32, settings, "cpu")


def reference(folder: Path) -> Any:
    """The dequantised model: float32, on the CPU."""
    return load_plain(folder, weights(folder))
