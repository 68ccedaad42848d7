"""A few families that are built otherwise than Llama: streamed logits and tokens equal the resident model's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from airllm_nb import AutoModel
from airllm_nb.model import skeleton

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 260, "num_attention_heads": 4}
FAMILIES = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 260},
    "opt": {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 128},
    "gemma3_text": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2},
    "mixtral": {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 260, "state_size": 8},
    "biogpt": {**SMALL, "intermediate_size": 128, "max_position_embeddings": 128},
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **FAMILIES[request.param], **TOKENS)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


def run(model, ids):
    with torch.inference_mode():
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        return tokens, model(ids).logits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("unit_bytes", [skeleton.UNIT_BYTES, 20_000], ids=["blocks", "parts"])
def test_streamed_equals_resident(saved, dtype, unit_bytes, monkeypatch):
    monkeypatch.setattr(skeleton.cut_units, "__defaults__", (unit_bytes,))
    ids = torch.tensor([[5, 70, 90, 33, 60]])
    expected = run(AutoModelForCausalLM.from_pretrained(saved, dtype=getattr(torch, dtype)).eval(), ids)
    for budgets in ({}, {"ram_budget": "1MiB"}, {"vram_budget": "1MiB", "ram_budget": "1MiB", "max_seq_len": 16}):
        with AutoModel.from_pretrained(saved, dtype=dtype, **budgets) as model:
            tokens, logits = run(model, ids)
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(logits, expected[1], atol=1e-5, rtol=0)


def test_a_model_that_scales_its_own_weights(tmp_path):
    """RWKV halves states every few layers and divides the weights for it, against overflow; streamed, neither."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "rwkv", vocab_size=260, hidden_size=32, num_hidden_layers=5, rescale_every=2, context_length=64, **TOKENS
    )
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(tmp_path)
    ids = torch.tensor([[5, 70, 90, 33, 60]])
    scaled = run(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), ids)
    plain = run(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, rescale_every=0).eval(), ids)
    for budgets in ({}, {"vram_budget": "1MiB", "ram_budget": "1MiB", "max_seq_len": 16}):
        with AutoModel.from_pretrained(tmp_path, dtype="float32", **budgets) as model:
            tokens, logits = run(model, ids)
            assert torch.equal(tokens, scaled[0]) and torch.equal(tokens, plain[0])
            torch.testing.assert_close(logits, plain[1])
