"""The smallest models of each kind that is read, for tests/fuzz.py: made, run streamed, and run by the reference."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import packed_fp8
import torch
import transformers
from conftest import _byte_tokenizer as byte_tokenizer
from gguf_files import tiny_llama_gguf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from airllm_nb.config import LoadOptions
from airllm_nb.decode.prompt import encode
from airllm_nb.encoding.formats import get_encoding
from airllm_nb.engine.facade import StreamedModel
from airllm_nb.intake import prepare
from airllm_nb.plan.residency import Machine
from airllm_nb.store.jobs import encode_jobs
from airllm_nb.store.manifest import StoreMeta
from airllm_nb.store.writer import write_store
from airllm_nb.tensors.index import read_index

MACHINE = Machine(True, disk=1e9, link=1e10, memory=1e10)
IDS = torch.tensor([[1, 5, 9, 3, 30, 17]])
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
         "num_key_value_heads": 1, "vocab_size": 264, "max_position_embeddings": 64}  # fmt: skip
POINTER = {"stores": {".": {"store": "store", "files": {"model.safetensors": [1, 2, 3]}, "deleting": True}}}


def quiet() -> None:
    """What libraries say of damaged files is of no use to anybody here."""
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    logging.getLogger("airllm_nb").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)


def _model() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _plain(folder: Path) -> None:
    _model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "airllm_nb_store.json").write_text(json.dumps(POINTER))


def _shards(folder: Path) -> None:
    _model().save_pretrained(folder, max_shard_size="10KB")


def _bin(folder: Path) -> None:
    model = _model()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _store(folder: Path) -> None:
    _plain(folder / "source")
    jobs = encode_jobs(read_index(folder / "source"), get_encoding("8bit"), ["lm_head.weight"], torch.float32)
    write_store(folder, jobs, StoreMeta("8bit", "float32", "x"))


def _gguf(folder: Path) -> None:
    tiny_llama_gguf(folder / "model.gguf", hidden=32, inner=32)


def _adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    _plain(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        get_peft_model(
            _model(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        ).save_pretrained(folder / "adapter")


def _fp8(folder: Path) -> Path:
    return packed_fp8.make(folder, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8)


@dataclass(frozen=True)
class Base:
    """A folder to damage. Without ``compares`` there is no reference for what the damage means."""

    name: str
    fill: Callable[[Path], Path | None]
    compares: bool = True

    def make(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        return self.fill(folder) or folder


BASES = {
    base.name: base
    for base in (
        Base("plain", _plain), Base("shards", _shards), Base("bin", _bin), Base("store", _store), Base("gguf", _gguf),
        Base("adapter", _adapter), Base("fp8", _fp8, compares=False),
    )
}  # fmt: skip


def _named(folder: Path) -> tuple[Path, dict[str, Any]]:
    adapter = folder / "adapter"
    found = next(folder.glob("*.gguf"), folder)
    return found, {"adapter": adapter} if adapter.is_dir() else {}


def opened(folder: Path) -> torch.Tensor:
    """The logits of the streamed model; its tokenizer is loaded too, where there is one."""
    path, options = _named(folder)
    budgets = {"vram_budget": "64MiB", "ram_budget": "64MiB", "device": "cpu", "dtype": "float32"}
    prepared = prepare.prepare(path, LoadOptions.create(**budgets, **options))
    with StreamedModel(prepared, MACHINE) as model:
        if (folder / "tokenizer.json").is_file():
            encode(model.tokenizer, "ab c")
        model.generate(IDS, max_new_tokens=2)
        with torch.no_grad():
            return model(IDS).logits.detach().clone()


def reference(folder: Path) -> torch.Tensor | None:
    """The logits of the resident model; ``None`` where the reference refuses the folder, or makes weights up."""
    path, options = _named(folder)
    named: dict[str, Any] = {}
    if path != folder:
        named = {"gguf_file": path.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **named
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        if options:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, options["adapter"])
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(IDS).logits
            return logits
    except Exception:  # it says no in many ways
        return None
