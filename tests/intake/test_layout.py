"""Checkpoints have the names and the layout of their time: each loads in place, and says what it should."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import resident, run, streamed

from airllm_nb.config import cache_dir
from airllm_nb.errors import UnsupportedModelError
from airllm_nb.model.units import ModelUnit

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, torch.Tensor]

# Names in the files that save_pretrained writes: those of the time, by transformers' own table.
PER_EXPERT = {
    "mixtral": "block_sparse_moe.experts.3.w1.weight",
    "phimoe": "block_sparse_moe.experts.3.w1.weight",
    "minimax": "block_sparse_moe.experts.3.w1.weight",
    "qwen2_moe": "mlp.experts.3.gate_proj.weight",
    "qwen3_moe": "mlp.experts.3.gate_proj.weight",
    "qwen3_next": "mlp.experts.3.gate_proj.weight",
    "olmoe": "mlp.experts.3.gate_proj.weight",
    "deepseek_v2": "mlp.experts.3.gate_proj.weight",
    "deepseek_v3": "mlp.experts.3.gate_proj.weight",
    "glm4_moe": "mlp.experts.3.gate_proj.weight",
    "ernie4_5_moe": "mlp.experts.3.gate_proj.weight",
    "kimi_linear": "block_sparse_moe.experts.3.w1.weight",
    "jamba": "feed_forward.experts.3.gate_proj.weight",
}


def renamed(*pairs: tuple[str, str]) -> Callable[[State], State]:
    def rewrite(state: State) -> State:
        for pattern, new in pairs:
            state = {re.sub(pattern, new, name): tensor for name, tensor in state.items()}
        return state

    return rewrite


def extended(**shapes: tuple[int, ...]) -> Callable[[State], State]:
    """With tensors that no model of today knows, one of each a layer."""
    return lambda state: (
        state
        | {
            name.replace("__", ".").replace("LAYER", str(layer)): torch.rand(shape)
            for name, shape in shapes.items()
            for layer in range(tiny_models.LAYERS)
        }
    )


def in_turn(*rewrites: Callable[[State], State]) -> Callable[[State], State]:
    def rewrite(state: State) -> State:
        for each in rewrites:
            state = each(state)
        return state

    return rewrite


def with_next_token_layer(state: State) -> State:
    """DeepSeek's files end with a layer that proposes the next token but one."""
    last = f"model.layers.{tiny_models.LAYERS - 1}."
    new = f"model.layers.{tiny_models.LAYERS}."
    extra = {name.replace(last, new): tensor.clone() for name, tensor in state.items() if name.startswith(last)}
    return state | extra | {f"{new}eh_proj.weight": torch.rand(64, 128), f"{new}enorm.weight": torch.rand(64)}


# name: type, and what its files were
OLD = {
    "gpt2 of the base class, masks in the file": (
        "gpt2",
        in_turn(
            renamed((r"^transformer\.", "")),
            extended(h__LAYER__attn__bias=(1, 1, 128, 128), h__LAYER__attn__masked_bias=(1,)),
        ),
    ),
    "bloom of the base class": ("bloom", renamed((r"^transformer\.", ""))),
    "opt without its outer name": ("opt", renamed((r"^model\.", ""))),
    "gpt_neox with masks and angles": (
        "gpt_neox",
        extended(
            gpt_neox__layers__LAYER__attention__bias=(1, 1, 128, 128),
            gpt_neox__layers__LAYER__attention__masked_bias=(1,),
            gpt_neox__layers__LAYER__attention__rotary_emb__inv_freq=(2,),
        ),
    ),
    "llama with angles": ("llama", extended(model__layers__LAYER__self_attn__rotary_emb__inv_freq=(8,))),
    "falcon, its tied head in the file": (
        "falcon",
        lambda state: state | {"lm_head.weight": state["transformer.word_embeddings.weight"].clone()},
    ),
    "gemma2, its tied head in the file": (
        "gemma2",
        lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()},
    ),
    "bert with gamma and beta": (
        "bert",
        renamed((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")),
    ),
    "deepseek_v3 with its layer for the next token but one": ("deepseek_v3", with_next_token_layer),
    "gemma3 as the class is today": (
        "gemma3",
        renamed((r"^language_model\.model\.", "model.language_model."), (r"^(vision_tower|multi_modal)", r"model.\1")),
    ),
}  # fmt: skip


def rewritten(model_type: str, folder: Path, rewrite: Callable[[State], State]) -> None:
    tiny_models.save_tiny(model_type, folder)
    file = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in rewrite(load_file(file)).items()}, file, metadata={"format": "pt"})


def assert_streams(folder: Path) -> None:
    """Equal to the resident model, from the folder's own files: nothing is written anywhere."""
    before = {path for path in cache_dir().rglob("*.safetensors")}
    expected = run(resident(folder))
    with streamed(folder) as model:
        tokens, logits = run(model)
        assert torch.equal(logits, expected[1])
        assert torch.equal(tokens, expected[0])
        paths = {piece.extent.path.parent for unit in model._prepared.units for piece in unit.stream.pieces}
        assert paths == {folder}
    assert {path for path in cache_dir().rglob("*.safetensors")} == before


@pytest.mark.parametrize("model_type", PER_EXPERT)
def test_per_expert_matrices_are_merged_as_extents(model_type: str, tmp_path: Path) -> None:
    tiny_models.save_tiny(model_type, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith(PER_EXPERT[model_type]) for name in stored), sorted(stored)
    assert_streams(tmp_path)
    with streamed(tmp_path) as model:
        merged = experts(model._prepared.units)
    assert merged
    # Two matrices an expert in one parameter, one in the other; neighbours in the file are one extent.
    assert all(1 < count <= 2 * 4 for count in merged.values()), merged


def experts(units: list[ModelUnit]) -> Mapping[str, int]:
    bindings = [binding for unit in units for binding in unit.bindings]
    return {b.weight.name: len(b.weight.info.extents) for b in bindings if len(b.weight.info.shape) == 3
            and "experts" in b.weight.name}  # fmt: skip


@pytest.mark.parametrize("model_type", PER_EXPERT)
def test_experts_saved_as_the_class_has_them_load_too(model_type: str, tmp_path: Path) -> None:
    native = tiny_models.save_tiny(model_type, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    native.save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(name.endswith(PER_EXPERT[model_type]) for name in stored)
    assert_streams(tmp_path)


def test_transposed_experts_are_refused_with_what_helps(tmp_path: Path) -> None:
    def transposed(state: State) -> State:
        return {name: t.transpose(1, 2) if "experts" in name else t for name, t in state.items()}

    rewritten("qwen3_vl_moe", tmp_path, transposed)
    with pytest.raises(UnsupportedModelError, match=r"Transpose.*save_original_format=False"):
        streamed(tmp_path)
    native = resident(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    native.save_pretrained(tmp_path, save_original_format=False)
    assert_streams(tmp_path)


@pytest.mark.parametrize("name", OLD)
def test_old_layouts_stream(name: str, tmp_path: Path) -> None:
    model_type, rewrite = OLD[name]
    rewritten(model_type, tmp_path, rewrite)
    assert_streams(tmp_path)


def test_experts_in_several_files_are_merged(tmp_path: Path) -> None:
    native = tiny_models.save_tiny("mixtral", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    native.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 4
    assert_streams(tmp_path)
