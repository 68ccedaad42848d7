"""Checkpoints of every packed format: random bytes in the layouts that the formats' libraries write."""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from airllm_nb.bench import synthetic
from airllm_nb.bench.shapes import shape_config, tensors_by_file
from airllm_nb.tensors.index import ITEMSIZE

GROUP = 128
Tensors = dict[str, tuple[str, tuple[int, ...]]]
# Any bytes with these bits are finite in float8, float16 and float32, and below 1.
MASK = 0x3B
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "nested_blocksize": 256, "nested_dtype": "float32",
         "nested_offset": 0.01}  # fmt: skip
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


# --- what each format makes of a matrix: name → dtype and shape


def fp8(name: str, rows: int, columns: int) -> Tensors:
    blocks = (-(-rows // 128), -(-columns // 128))
    return {f"{name}.weight": ("F8_E4M3", (rows, columns)), f"{name}.weight_scale_inv": ("F32", blocks)}


def bitsandbytes(name: str, rows: int, columns: int) -> Tensors:
    blocks = rows * columns // 64
    state = json.dumps(STATE | {"shape": [rows, columns]})
    return {
        f"{name}.weight": ("U8", (rows * columns // 2, 1)),
        f"{name}.weight.absmax": ("U8", (blocks,)),
        f"{name}.weight.nested_absmax": ("F32", (-(-blocks // 256),)),
        f"{name}.weight.nested_quant_map": ("F32", (256,)),
        f"{name}.weight.quant_map": ("F32", (16,)),
        f"{name}.weight.quant_state.bitsandbytes__nf4": ("U8", (len(state),)),
    }


def gptq(name: str, rows: int, columns: int) -> Tensors:
    groups = columns // GROUP
    return {f"{name}.qweight": ("I32", (columns // 8, rows)), f"{name}.qzeros": ("I32", (groups, rows // 8)),
            f"{name}.scales": ("F16", (groups, rows))}  # fmt: skip


def gptq_ordered(name: str, rows: int, columns: int) -> Tensors:
    return gptq(name, rows, columns) | {f"{name}.g_idx": ("I32", (columns,))}


def awq(name: str, rows: int, columns: int) -> Tensors:
    return gptq(name, rows, columns) | {f"{name}.qweight": ("I32", (columns, rows // 8))}


FORMATS: dict[str, tuple[Callable[[str, int, int], Tensors], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    "bitsandbytes": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                    "bnb_4bit_use_double_quant": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}),
    "gptq-g_idx": (gptq_ordered, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True,
                                  "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}  # fmt: skip
GGUF_TYPES = ("Q3_K", "IQ4_XS", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
KINDS = ("nf4", *FORMATS, *GGUF_TYPES)


# --- writing


@functools.cache
def _block() -> memoryview:
    """Its length is prime, so that no two rows are the same."""
    values = np.random.default_rng(0).integers(0, 256, 67_108_859, dtype=np.uint8)
    return memoryview(values & MASK)


def noise(name: str, nbytes: int) -> Iterator[memoryview]:
    """Bytes from a place in the block that the name gives."""
    block, at = _block(), zlib.crc32(name.encode()) % len(_block())
    while nbytes > 0:
        chunk = block[at : at + nbytes]
        yield chunk
        nbytes, at = nbytes - len(chunk), 0


def write_safetensors(folder: Path, shape: str, layers: int, kind: str) -> None:
    """One file a layer, config and tokenizer as a synthetic checkpoint of this shape has them."""
    pack, settings = FORMATS[kind]
    config = shape_config(shape, layers)
    *blocks, rest = tensors_by_file(config)
    synthetic._write_companions(folder, config | {"quantization_config": settings}, {})
    for number, group in enumerate([*blocks, rest]):
        tensors: Tensors = {}
        sizes = {name: info.shape for name, info in group.items()}
        for name, size in sizes.items():
            is_packed = len(size) == 2 and group is not rest
            packed = pack(name.removesuffix(".weight"), *size) if is_packed else {name: ("BF16", size)}
            tensors |= packed
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            _write_tensors(file, tensors, sizes)


def _write_tensors(file: Any, tensors: Tensors, group: dict[str, tuple[int, ...]]) -> None:
    table, cursor = {}, 0
    for name, (dtype, size) in tensors.items():
        end = cursor + math.prod(size) * ITEMSIZE[dtype]
        table[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [cursor, end]}
        cursor = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, (dtype, size) in tensors.items():
        nbytes = math.prod(size) * ITEMSIZE[dtype]
        weight, mark, _ = name.partition(".quant_state.")
        if mark:
            file.write(json.dumps(STATE | {"shape": list(group[weight])}).encode())
        elif name.endswith(".quant_map"):
            from bitsandbytes.functional import get_4bit_type

            file.write(get_4bit_type("nf4", device="cpu").numpy().tobytes())
        elif name.endswith(".g_idx"):  # neighbours in different groups, each group whole
            file.write((np.arange(size[0]) * 37 % size[0] // GROUP).astype(np.int32).tobytes())
        else:
            for chunk in noise(name, nbytes):
                file.write(chunk)


def write_gguf(path: Path, shape: str, layers: int, kind: str) -> None:
    """A Llama or a Qwen3 mixture in one type; table and head too, as in a file that is quantised throughout."""
    import gguf

    config = shape_config(shape, layers)
    architecture = {"llama": "llama", "qwen3_moe": "qwen3moe"}[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _gguf_sizes(config).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{architecture}.rope.freq_base", config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    words = [*map(chr, range(33, 127)), "ab", "cd"]
    writer.add_token_list([*words, *(f"t{number}" for number in range(config["vocab_size"] - len(words)))])
    writer.add_token_merges(["a b", "c d"])  # transformers takes a list of one for its only entry
    made = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[made]
    for name, size in _gguf_shapes(config).items():
        if len(size) == 1 or name.endswith("ffn_gate_inp.weight"):  # norms are ones, routers are random
            value = np.ones(size) if len(size) == 1 else np.random.default_rng(0).normal(0, 0.02, size)
            writer.add_tensor(name, value.astype(np.float32))
        else:
            writer.add_tensor(name, _rows((*size[:-1], size[-1] // block * nbytes)), raw_dtype=made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def _rows(shape: tuple[int, ...]) -> np.ndarray:
    """Bytes for tensors of one shape, the same for all of them: a file may be larger than memory."""
    return np.frombuffer(b"".join(noise(str(shape), math.prod(shape))), dtype=np.uint8).reshape(shape)


def _gguf_sizes(config: dict[str, Any]) -> dict[str, int]:
    sizes = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "vocab_size": config["vocab_size"],
    }  # fmt: skip
    if config["model_type"] == "qwen3_moe":
        sizes |= {"expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"],
                  "expert_feed_forward_length": config["moe_intermediate_size"],
                  "attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}  # fmt: skip
    return sizes


def _gguf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape; the experts of a layer are one tensor for each of their matrices."""
    rest = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight"}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for file in tensors_by_file(config):
        for name, info in file.items():
            if name in rest:
                shapes[rest[name]] = info.shape
                continue
            _, _, number, within = name.removesuffix(".weight").split(".", 3)
            if within.startswith("mlp.experts."):
                matrix = within.rpartition(".")[2].removesuffix("_proj")
                shapes[f"blk.{number}.ffn_{matrix}_exps.weight"] = (config["num_experts"], *info.shape)
            else:
                shapes[f"blk.{number}.{GGUF_NAMES[within]}.weight"] = info.shape
    return shapes


def make(folder: Path, shape: str, layers: int, kind: str) -> Path:
    """The checkpoint of a format, written unless it is there."""
    target = folder / f"{shape}-{layers}-{kind}"
    model = target / "model.gguf" if kind in GGUF_TYPES else target
    if target.exists():
        return model
    if kind == "nf4":
        synthetic.write(target, shape, layers, "4bit")
        return model
    made = target.with_name(f"{target.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    if kind in GGUF_TYPES:
        write_gguf(made / "model.gguf", shape, layers, kind)
    else:
        write_safetensors(made, shape, layers, kind)
    made.rename(target)
    return model
