"""Write a checkpoint of a known shape with random weights: what speed depends on, without a download.

python benchmarks/synthetic.py FOLDER --shape llama-2-70b --layers 8
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "llama-2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                    "num_key_value_heads": 8, "vocab_size": 32000},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3.1-405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128,
                       "num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
              "num_key_value_heads": 4, "vocab_size": 4096},
}  # fmt: skip


def write(folder: Path, shape: str, layers: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> int:
    """Write a Llama checkpoint of one file a layer; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, shape, layers, dtype)
    layer_shapes, end_shapes = _shapes(shape)
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return (torch.randn(*shape, generator=generator, device=device) * 0.02).to(dtype).cpu()

    files, weight_map, total = layers + 1, {}, 0
    for number in range(1, files + 1):
        prefix, shapes = (f"model.layers.{number - 1}.", layer_shapes) if number <= layers else ("", end_shapes)
        tensors = {f"{prefix}{name}.weight": random(*size) for name, size in shapes.items()}
        name = f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder, SHAPES[shape]["vocab_size"])
    return total


def write_packed(folder: Path, shape: str, layers: int, compression: str) -> int:
    """Write a finished store of the shape whose layers all hold the same random bytes; returns its bytes."""
    from airllm_nb.checkpoint.codec import get_codec
    from airllm_nb.checkpoint.encoded import Part
    from airllm_nb.checkpoint.shard import Item, ShardJob
    from airllm_nb.checkpoint.store import StoreMeta, write_store

    codec, (layer_shapes, end_shapes) = get_codec(compression), _shapes(shape)

    def item(name: str, size: tuple[int, ...]) -> Item:
        packed = name.startswith("model.layers") and len(size) == 2
        parts = codec.parts(size, "BF16") if packed else (Part("weight", "BF16", size),)
        return Item(name, "BF16", size, parts, lambda: [_random_part(part.dtype, part.shape) for part in parts])

    jobs = [
        ShardJob(f"layer-{n:05d}", tuple(item(f"model.layers.{n}.{k}.weight", s) for k, s in layer_shapes.items()))
        for n in range(layers)
    ]
    jobs.append(ShardJob("rest", tuple(item(f"{name}.weight", size) for name, size in end_shapes.items())))
    store = write_store(folder, jobs, StoreMeta(compression, "bfloat16", "synthetic"))
    _write_config(folder, shape, layers, torch.bfloat16)
    _write_tokenizer(folder, SHAPES[shape]["vocab_size"])
    return store.nbytes


@functools.cache
def _random_part(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes of a part: any packed byte is a weight, scales and norms must be sane."""
    if dtype == "U8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return scale.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype])


def _shapes(shape: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of the weights of a layer, and of the rest."""
    sizes = SHAPES[shape]
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = sizes["num_key_value_heads"] * (hidden // sizes["num_attention_heads"])
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    return layer, {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden), "model.norm": (hidden,)}


def _write_config(folder: Path, shape: str, layers: int, dtype: torch.dtype) -> None:
    sizes = SHAPES[shape]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
              "head_dim": head, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
              "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."),
              "bos_token_id": 1, "eos_token_id": 2, **sizes}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"t{number}": number for number in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-70b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--packed", choices=["4bit", "8bit"])
    given = parser.parse_args()
    start = time.perf_counter()
    if given.packed:
        size = write_packed(given.folder, given.shape, given.layers, given.packed)
    else:
        size = write(given.folder, given.shape, given.layers, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")
