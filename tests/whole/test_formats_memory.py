"""Packed checkpoints of hundreds of megabytes run in a fraction of it: anonymous memory, as the system counts it.

Neither a packed file nor an unpacked model is ever there whole, but where the RAM budget has room for it.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import blocks

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

RUN = 512 << 20
MIB = 1 << 20
# What a forward takes beside matrices and budgets: activations, the parts of a matrix that are unpacked at once, and
# what PyTorch, bitsandbytes and the allocator keep.
ALLOWANCE = 48 * MIB
HIDDEN, INNER, VOCABULARY, KV = 2048, 8192, 4096, 512
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
# Bytes in bfloat16 of the largest matrix, of a layer, and of a table.
LARGEST, UNPACKED = 2 * HIDDEN * INNER, sum(2 * rows * columns for rows, columns in LAYER.values())
TABLE = 2 * VOCABULARY * HIDDEN
LAYERS = {"bitsandbytes": 6, "FP8": 3, "GPTQ": 6, "Q4_K": 6}

# One fresh process a checkpoint; each of the options is a model that is opened, run once and closed.
MEASURE = """
import gc, json, sys, threading
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama, transformers.generation.utils
from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import open_model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def measured(options):
    gc.collect()
    rest = peak = anonymous()
    over = threading.Event()

    def sample():
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    with open_model(sys.argv[1], LoadOptions.create(max_seq_len=16, **options)) as model:
        finite = bool(model(torch.tensor([[1, 5, 9]])).logits.isfinite().all())
        plan = model.plan.as_dict()
    gc.collect()
    after = anonymous()  # with the closed model still at hand, as in a notebook's variable
    over.set()
    sampler.join()
    kept = [module.scratch_bytes for module in model.native.modules() if getattr(module, "keeps", False)]
    return {"peak": peak - rest, "after": after - rest, "finite": finite, "kept": sum(kept), "ring": plan["ring_bytes"],
            "device": plan["device_bytes"], **{tier: found["bytes"] for tier, found in plan["tiers"].items()}}

torch.set_num_threads(1)
torch.ones(512, 512) @ torch.ones(512, 512)
print(json.dumps([measured(options) for options in json.loads(sys.argv[2])]))
"""


def measured(path: Path, *options: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), json.dumps(options)], capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(one["finite"] for one in found)
    return found


@pytest.fixture(params=LAYERS)
def kind(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def make(tmp_path: Path, kind: str) -> Iterator[Callable[[int], Path]]:
    """``make(layers)``: a Llama of packed noise, deleted after the test."""
    yield lambda layers: (write_gguf if kind == "Q4_K" else write_safetensors)(tmp_path, kind, layers)
    shutil.rmtree(tmp_path)


def weight_bytes(path: Path) -> int:
    return (path / "model.safetensors" if path.is_dir() else path).stat().st_size


def test_neither_the_file_nor_the_model_is_in_memory(make: Callable[[int], Path], kind: str) -> None:
    path, ram, vram = make(LAYERS[kind]), 64 * MIB, 176 * MIB
    stored, unpacked = weight_bytes(path), LAYERS[kind] * UNPACKED
    assert stored > 200 * MIB and unpacked > 340 * MIB
    host, device = measured(path, {"ram_budget": ram}, {"ram_budget": ram, "vram_budget": vram})
    assert host["kept"] == device["kept"] == 0
    assert host["disk"] > stored - 2 * TABLE and device["disk"] > stored / 2
    # On the host, disk units are read through a mapping of the file: the budget itself is not even taken.
    assert host["peak"] <= LARGEST + ALLOWANCE < stored - ram
    assert device["device"] <= vram and device["ring"] <= ram
    assert device["peak"] <= device["device"] + device["ring"] + ALLOWANCE < stored + LARGEST + ram
    assert max(host["after"], device["after"]) <= ALLOWANCE


def test_what_is_kept_unpacked_is_within_the_budget(make: Callable[[int], Path], kind: str) -> None:
    """All matrices are unpacked once where the budget holds them beside the whole checkpoint; else none is."""
    path = make(2)
    packed_head = TABLE if kind == "Q4_K" else 0
    stored, unpacked = weight_bytes(path), 2 * UNPACKED + packed_head
    # Beside them room is left for what a run needs.
    ample, short = stored + unpacked + RUN, stored + unpacked - 4 * MIB
    kept, none = measured(path, {"ram_budget": ample}, {"ram_budget": short})
    assert kept["kept"] == unpacked and kept["ram"] + kept["kept"] <= ample and kept["disk"] == 0
    # The packed bytes are the page cache's.
    assert unpacked < kept["peak"] <= unpacked + LARGEST + ALLOWANCE
    assert none["kept"] == 0 and none["ram"] + none["disk"] == kept["ram"]
    assert none["peak"] <= LARGEST + ALLOWANCE
    # Of what was unpacked; the C library keeps a part of what passed through its heap.
    assert max(kept["after"], none["after"]) <= ALLOWANCE + LARGEST < unpacked / 2, "closing gives the memory back"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def bitsandbytes(name: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """nf4, double quantisation: name → dtype, shape and what it is filled with, cyclically."""
    count = rows * columns
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns],
             "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}  # fmt: skip
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {
        f"{name}.weight": ("U8", (count // 2, 1), NOISE),
        f"{name}.weight.absmax": ("U8", (count // 64,), NOISE),
        f"{name}.weight.nested_absmax": ("F32", (count // 64 // 256,), np.float32([0.01])),
        f"{name}.weight.nested_quant_map": ("F32", (256,), np.linspace(-1, 1, 256, dtype=np.float32)),
        f"{name}.weight.quant_map": ("F32", (16,), np.linspace(-1, 1, 16, dtype=np.float32)),
        f"{name}.weight.quant_state.bitsandbytes__nf4": ("U8", raw.shape, raw),
    }


def fp8(name: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    return {
        f"{name}.weight": ("F8_E4M3", (rows, columns), NOISE & 0b10111111),  # below 2, and no NaN
        f"{name}.weight_scale_inv": ("F32", (rows // 128, columns // 128), np.float32([0.02])),
    }


def gptq(name: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    groups = columns // 128
    return {
        f"{name}.qweight": ("I32", (columns // 8, rows), NOISE),
        f"{name}.qzeros": ("I32", (groups, rows // 8), np.uint8([0x77])),
        f"{name}.scales": ("F16", (groups, rows), np.float16([0.004])),
        f"{name}.g_idx": ("I32", (columns,), np.arange(columns, dtype=np.int32) // 128),
    }


NOISE = np.random.default_rng(0).integers(0, 256, MIB, dtype=np.uint8)
SETTINGS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
    },
    "FP8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
}  # fmt: skip
PACKED: dict[str, Callable[..., Any]] = {"bitsandbytes": bitsandbytes, "FP8": fp8, "GPTQ": gptq}


def write_safetensors(folder: Path, kind: str, layers: int) -> Path:
    """A tensor after the other: the model is never in memory as a whole."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=VOCABULARY, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        quantization_config=SETTINGS[kind],
    )  # fmt: skip
    config.save_pretrained(folder)
    one, values = np.uint16([0x3F80]), np.tile(np.uint16([0x3C00, 0xBC20, 0x3B80]), 1 << 16)  # 1; small ones: bfloat16
    tensors = {name: ("BF16", (VOCABULARY, HIDDEN), values) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = ("BF16", (HIDDEN,), one)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = ("BF16", (HIDDEN,), one)
        for name, shape in LAYER.items():
            tensors |= PACKED[kind](f"{prefix}.{name}", *shape)
    sizes = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}
    header, end = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        nbytes = math.prod(shape) * sizes.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + nbytes]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # as the library does, so that integers of 32 bits can be read where they lie
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, (_, _, content) in tensors.items():
            begin, end = header[name]["data_offsets"]
            cycle = np.ascontiguousarray(content).view(np.uint8)
            whole, rest = divmod(end - begin, cycle.size)
            for _ in range(whole):
                file.write(cycle.data)
            file.write(cycle[:rest].data)
    return folder


def write_gguf(folder: Path, kind: str, layers: int) -> Path:
    """Every layer is the same noise, once in memory."""
    names = dict(zip(LAYER, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
                     strict=True))  # fmt: skip
    quantised, rng = getattr(gguf.GGMLQuantizationType, kind), np.random.default_rng(0)
    matrices = {name: blocks(rng, LAYER[old], quantised) for old, name in names.items()}
    writer = gguf.GGUFWriter(folder / "noise.gguf", "llama")
    for key, value in {"block_count": layers, "context_length": 64, "embedding_length": HIDDEN,
                       "feed_forward_length": INNER, "attention.head_count": 16, "attention.head_count_kv": 4,
                       "vocab_size": VOCABULARY}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"t{number}" for number in range(VOCABULARY - 3))])
    writer.add_token_merges(["a b"])
    table = blocks(rng, (VOCABULARY, HIDDEN), quantised)
    one = np.ones(HIDDEN, np.float32)
    writer.add_tensor("token_embd.weight", table, raw_dtype=quantised)
    writer.add_tensor("output.weight", table, raw_dtype=quantised)
    writer.add_tensor("output_norm.weight", one)
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", one)
        for name, data in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "noise.gguf"
