"""Checkpoint names → native parameters: the mapped bytes are what transformers itself would load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from airllm_nb.checkpoint.mapping import map_checkpoint
from airllm_nb.engine.facade import open_model
from airllm_nb.errors import CheckpointError, UnsupportedModelError
from airllm_nb.model import skeleton
from airllm_nb.stream.mapped import MappedFiles
from airllm_nb.tensors.index import TensorInfo, read_index

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}

MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64},
    "gpt_neox": SMALL,
    "phi3": GROUPED | {"pad_token_id": 0},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen2_moe": GROUPED
    | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": GROUPED | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": SMALL
    | {"moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
       "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
       "first_k_dense_replace": 1, "num_key_value_heads": 4},
}  # fmt: skip


def made(model_type: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **MODELS[model_type] | settings)
        ).eval()


def mapped(folder: Path, native: Any) -> dict[str, TensorInfo]:
    empty = skeleton.build(native.config, torch.float32, torch.device("cpu"))
    return map_checkpoint(read_index(folder), empty)


def assert_equal(infos: dict[str, TensorInfo], native: Any) -> None:
    files, state = MappedFiles(), native.state_dict()
    tied = set(native.all_tied_weights_keys or ()) if native.config.tie_word_embeddings else set()
    assert set(state) - tied <= set(infos) <= set(state)
    for name, info in infos.items():
        assert info.shape == tuple(state[name].shape), name
        assert files.tensor(info, state[name].dtype).equal(state[name]), name


@pytest.mark.parametrize("model_type", MODELS)
def test_what_save_pretrained_writes_maps_onto_the_same_model(tmp_path: Path, model_type: str) -> None:
    native = made(model_type)
    native.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_equal(mapped(tmp_path, native), native)


@pytest.mark.parametrize(
    "model_type", ["llama", "mixtral", "qwen2_moe", "deepseek_v3", "gpt2", "gpt_neox", "gemma2", "phi3"]
)
def test_every_layout_streams_to_the_same_logits(tmp_path: Path, model_type: str) -> None:
    from airllm_nb.config import LoadOptions

    native, ids = made(model_type), torch.tensor([[1, 5, 9, 33, 60]])
    native.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = native(ids).logits
    with open_model(tmp_path, LoadOptions.create(dtype="float32")) as model:
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


def test_per_expert_matrices_are_merged_without_a_copy(tmp_path: Path) -> None:
    native = made("mixtral")
    native.save_pretrained(tmp_path)
    stored = set(read_index(tmp_path))
    infos = mapped(tmp_path, native)
    merged = {name: info for name, info in infos.items() if name not in stored}
    assert merged, "nothing is stored per expert any more: this test tests nothing"
    assert all(len(info.extents) > 1 for name, info in merged.items() if "experts" in name and "gate_up" in name)
    assert sum(info.nbytes for info in infos.values()) == read_index(tmp_path).nbytes


@pytest.mark.parametrize("prefix", ["", "model.", "transformer.model."])
def test_checkpoints_of_the_base_model_alone(tmp_path: Path, prefix: str) -> None:
    """Saved from the base class there is no ``model.`` in front; the head is tied or missing."""
    native = made("llama", tie_word_embeddings=True)
    state = {name.removeprefix("model."): value.contiguous() for name, value in native.state_dict().items()}
    state.pop("lm_head.weight")
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "model.safetensors")
    native.config.save_pretrained(tmp_path)
    if prefix == "transformer.model.":
        with pytest.raises(CheckpointError, match="lacks"):
            open_model(tmp_path)
        return
    assert_equal(mapped(tmp_path, native), native)


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_heads_are_found_under_either_name(tmp_path: Path, stored: str) -> None:
    from airllm_nb.config import LoadOptions

    native, ids = made("llama", tie_word_embeddings=True), torch.tensor([[1, 5, 9]])
    state = {name: value.clone() for name, value in native.state_dict().items()}
    if stored != "both":
        state.pop("lm_head.weight" if stored == "embedding" else "model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors")
    native.config.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = native(ids).logits
    with open_model(tmp_path, LoadOptions.create(dtype="float32")) as model:
        assert model(ids).logits.equal(expected)


def test_a_tensor_that_the_model_does_not_know_is_left_out(tmp_path: Path) -> None:
    native = made("llama")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "nonsense": torch.ones(1)}
    save_file(dict(native.state_dict()) | extra, tmp_path / "model.safetensors")
    assert_equal(mapped(tmp_path, native), native)


def test_a_missing_weight_is_named(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    state = load_file(folder / "model.safetensors")
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        open_model(tmp_path)


def test_a_weight_of_another_shape_is_named(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has shape \[128, 64\].*asks for \[96, 64\]"):
        open_model(tmp_path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    native = made("mixtral")
    native.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(state) if "experts.1" in name)
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert "experts" in str(caught.value)


def test_experts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    native = made("mixtral")
    native.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(state) if "experts.1" in name)
    state[name] = state[name][:-1].contiguous()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_transposing_conversion_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.conversion_mapping as conversions
    from transformers.core_model_loading import Transpose, WeightConverter

    native = made("llama")
    native.save_pretrained(tmp_path)
    turned = WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", operations=[Transpose(0, 1)])
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda *_, **__: [turned])
    with pytest.raises(UnsupportedModelError, match=r"down_proj.*Transpose.*save_pretrained") as caught:
        mapped(tmp_path, native)
    assert "\n" not in str(caught.value)
