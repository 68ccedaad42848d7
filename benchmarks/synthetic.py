"""Write a checkpoint of a known shape with random weights: what speed depends on, without a download.

python benchmarks/synthetic.py FOLDER --shape llama-2-70b --layers 8
"""

from __future__ import annotations

import argparse
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
    sizes = SHAPES[shape]
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    head = hidden // sizes["num_attention_heads"]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
              "head_dim": head, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
              "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."),
              "bos_token_id": 1, "eos_token_id": 2, **sizes}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * 0.02).to(dtype).cpu()

    files, weight_map, total = layers + 1, {}, 0

    def dump(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        name = f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    kv = sizes["num_key_value_heads"] * head
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": random(*shape) for name, shape in matrices.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        dump(layer + 1, tensors)
    dump(files, {"model.embed_tokens.weight": random(vocabulary, hidden), "lm_head.weight": random(vocabulary, hidden),
                 "model.norm.weight": torch.ones(hidden, dtype=dtype)})  # fmt: skip
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder, vocabulary)
    return total


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
    given = parser.parse_args()
    start = time.perf_counter()
    size = write(given.folder, given.shape, given.layers, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")
