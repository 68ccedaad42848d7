"""Seconds a sweep of every packed format beside the nf4 store, at the same number of bytes; writes RESULTS.md.

    python benchmarks/formats.py FOLDER [--shape llama-2-70b] [--layers 8] [--only fp8 Q4_K] [--keep]

The checkpoints have random bytes in the layouts that the formats' libraries write. `airllm-nb bench` measures each in a
process of its own, on one machine, one after the other; the last column is (seconds / byte) over that of nf4.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from results import machine_line, write_section

from airllm_nb.checkpoint import synthetic
from airllm_nb.checkpoint.index import ITEMSIZE
from airllm_nb.checkpoint.shapes import shape_config, weights_by_file

ROOT = Path(__file__).parents[1]
OPTIONS = "--vram 4GiB --cap --max-seq-len 256 --ram 100GiB"
GROUP = 128
Tensors = dict[str, tuple[str, tuple[int, ...]]]
# Any bytes with these bits are finite in float8, float16 and float32, and below 1.
MASK = 0x3B
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "nested_blocksize": 256, "nested_dtype": "float32",
         "nested_offset": 0.01}  # fmt: skip
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
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


def awq(name: str, rows: int, columns: int) -> Tensors:
    return gptq(name, rows, columns) | {f"{name}.qweight": ("I32", (columns, rows // 8))}


FORMATS: dict[str, tuple[Callable[[str, int, int], Tensors], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    "bitsandbytes": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                    "bnb_4bit_use_double_quant": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}  # fmt: skip
GGUF_TYPES = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


# --- writing


def noise(name: str, nbytes: int) -> Iterator[bytes]:
    """Bytes that differ by the name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    block = (generator.integers(0, 256, min(nbytes, 64 << 20), dtype=np.uint8) & MASK).tobytes()
    while nbytes > 0:
        yield block[:nbytes]
        nbytes -= len(block)


def write_safetensors(folder: Path, shape: str, layers: int, kind: str) -> None:
    """One file a layer, config and tokenizer as a synthetic checkpoint of this shape has them."""
    pack, settings = FORMATS[kind]
    config = shape_config(shape, layers)
    *blocks, rest = weights_by_file(config)
    synthetic._write_companions(folder, config | {"quantization_config": settings}, {})
    for number, group in enumerate([*blocks, rest]):
        tensors: Tensors = {}
        for name, size in group.items():
            is_packed = len(size) == 2 and group is not rest
            packed = pack(name.removesuffix(".weight"), *size) if is_packed else {name: ("BF16", size)}
            tensors |= packed
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            _write_tensors(file, tensors, group)


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
        else:
            for chunk in noise(name, nbytes):
                file.write(chunk)


def write_gguf(path: Path, shape: str, layers: int, kind: str) -> None:
    """A Llama in one type; table and head too, as they are in a file that is quantised throughout."""
    config = shape_config(shape, layers)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": layers, "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "vocab_size": config["vocab_size"],
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    words = [*map(chr, range(33, 127)), "ab"]
    writer.add_token_list([*words, *(f"t{number}" for number in range(config["vocab_size"] - len(words)))])
    writer.add_token_merges(["a b"])
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}  # fmt: skip
    sizes = {_gguf_name(name, names): size for group in weights_by_file(config) for name, size in group.items()}
    made = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[made]
    for name, size in sizes.items():
        if len(size) == 1:
            writer.add_tensor(name, np.ones(size, dtype=np.float32))
            continue
        row = size[1] // block * nbytes
        raw = np.frombuffer(b"".join(noise(name, size[0] * row)), dtype=np.uint8).reshape(size[0], row)
        writer.add_tensor(name, raw, raw_dtype=made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str, names: dict[str, str]) -> str:
    if name in names:
        return names[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


# --- measuring


def make(folder: Path, shape: str, layers: int, kind: str) -> Path:
    """The checkpoint of a format, written unless it is there."""
    target = folder / f"{shape}-{layers}-{kind}"
    model = target / "model.gguf" if kind in GGUF_TYPES else target
    if target.exists():
        return model
    if kind == "nf4":
        synthetic.write_packed(target, shape, layers, "4bit")
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


def measure(model: Path, options: str) -> dict[str, Any]:
    """What `airllm-nb bench --json` says, or ``{"error": …}``."""
    os.sync()  # what is still being written would take its share of the link
    command = [sys.executable, "-m", "airllm_nb", "bench", str(model), "--json", *options.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(done.stdout))


def rows(found: dict[str, dict[str, Any]]) -> list[str]:
    """The table, nf4 first."""
    base = None
    lines = []
    for kind, result in found.items():
        if "error" in result:
            lines.append(f"| {kind} | failed: {result['error']} | | | | |")
            continue
        seconds, nbytes = result["sweep_seconds"], result["links"].get("link", {}).get("bytes", 0)
        each = seconds / nbytes if nbytes else 0
        base = base or each
        share = f"{each / base:.2f}" if base else ""
        peak = f"{result['peak_bytes'] / 2**30:.2f} GiB"
        rate = f"{nbytes / seconds / 1e9:.1f}"
        lines.append(f"| {kind} | {seconds:.4f} | {nbytes / 1e9:.2f} | {rate} | {peak} | {share} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoints are, or are written")
    parser.add_argument("--shape", default="llama-2-70b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--options", default=OPTIONS, help=f"of airllm-nb bench; default: {OPTIONS}")
    parser.add_argument("--only", nargs="+", choices=[*FORMATS, *GGUF_TYPES], help="these formats, beside nf4")
    parser.add_argument("--keep", action="store_true", help="keep each checkpoint after it was measured")
    given = parser.parse_args()
    found = {}
    for kind in ["nf4", *(given.only or [*FORMATS, *GGUF_TYPES])]:
        model = make(given.folder, given.shape, given.layers, kind)
        found[kind] = measure(model, given.options)
        print(json.dumps({"format": kind, **found[kind]}), flush=True)
        if not given.keep:
            shutil.rmtree(given.folder / f"{given.shape}-{given.layers}-{kind}", ignore_errors=True)
    head = [
        "| format | seconds a sweep | GB moved | GB/s | peak VRAM | seconds a byte, of nf4's |",
        "|---|---|---|---|---|---|",
    ]
    what = f"`benchmarks/formats.py`, {given.shape} cut to {given.layers} layers, `{given.options}`:"
    text = "\n".join([machine_line(), "", what, "", *head, *rows(found)])
    print(text, flush=True)
    write_section("formats", text)


if __name__ == "__main__":
    main()
