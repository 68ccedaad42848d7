"""A config that asks for more than the weight files hold is refused by its numbers, before anything is built."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
from tiny_models import tiny_config
from transformers import CONFIG_MAPPING

from airllm_nb.checkpoint import sizes
from airllm_nb.checkpoint.sizes import Holds, check_sizes
from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import open_model, plan_model
from airllm_nb.errors import AirLLMError, CheckpointError
from airllm_nb.intake import prepare
from airllm_nb.model.architecture import native_config
from airllm_nb.model.skeleton import build

pytestmark = pytest.mark.usefixtures("one_thread")

HUGE = {"2**31": 2**31, "1e30": 1e30, "text": "2147483648", "a thousand digits": 10**1000, "infinity": float("inf")}
HELD = Holds(21, 260, 100_000)
LLAMA = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
# Fields that repeat or widen something in a class of their own, with all that they are set beside.
CONFIGS: dict[str, dict[str, Any]] = {
    "heads": LLAMA | {"num_attention_heads": 2**40},
    "head_dim": LLAMA | {"head_dim": 10**40},
    "vocab_size": LLAMA | {"vocab_size": 2**62},
    "labels": LLAMA | {"num_labels": 10**9},
    "gpt2's layers": {"model_type": "gpt2", "n_layer": 10**9},
    "gpt2's width": {"model_type": "gpt2", "n_embd": 2**60},
    "a nested list": {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global"], 10**9]]},
    "a mask of positions": {"model_type": "gpt_neo", "num_layers": 2, "num_heads": 2, "hidden_size": 32,
                            "attention_types": [[["global"], 2]], "max_position_embeddings": 10**6},
    "a rotary table": {"model_type": "gptj", "n_layer": 2, "n_head": 2, "n_embd": 32, "rotary_dim": 8,
                       "n_positions": 2**30},
    "a sinusoidal table": {"model_type": "xglm", "num_layers": 2, "attention_heads": 2, "d_model": 32,
                           "max_position_embeddings": 10**9},
    "a table computed in Python": {"model_type": "xlm", "n_layers": 2, "n_heads": 2, "emb_dim": 32,
                                   "max_position_embeddings": 10**9, "sinusoidal_embeddings": True},
    "experts": {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 10**9},
    "text": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 10**9}},
    "images": {"model_type": "gemma3", "vision_config": {"num_hidden_layers": 10**9}},
    "kernels": {"model_type": "mamba", "num_hidden_layers": 2, "conv_kernel": 10**9},
    "an encoder": {"model_type": "bart", "encoder_layers": 10**9, "is_decoder": True},
    "two factors": {"model_type": "reformer", "attn_layers": ["local"] * 2, "axial_pos_shape": [10**6, 10**6],
                    "is_decoder": True},
    "many more layers than weights": LLAMA | {"num_hidden_layers": 250, "attention_bias": True, "mlp_bias": True},
}  # fmt: skip
# Values that no model can be made of, whatever the files hold.
WRONG: dict[str, Any] = {
    "num_key_value_heads": 0, "vocab_size": -1, "hidden_act": "nope", "rope_parameters": {"rope_type": "nope"},
    "num_attention_heads": 0, "pad_token_id": 10**9, "text_config": {}, "num_hidden_layers": 2.5,
    "rms_norm_eps": "small", "sliding_window": "x", "attention_chunk_size": [1],
    "is_encoder_decoder": 2**31, "architectures": 5, "model_type": 7,
}  # fmt: skip


def built(config: dict[str, Any], held: Holds | None = HELD) -> Any:
    return build(native_config(config, False, lambda: held), torch.float32, torch.device("cpu"), holds=lambda: held)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a file of some kilobytes, without building five thousand weights first."""
    monkeypatch.setattr(sizes, "PARAMETERS", 50)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("small_limits")
def test_what_asks_for_more_than_the_files_hold_costs_nothing(name: str) -> None:
    built(LLAMA)  # what is imported once
    before, start = peak(), time.process_time()
    with pytest.raises(CheckpointError, match="do not belong together") as error:
        built(CONFIGS[name])
    assert time.process_time() - start < 5  # of the processor, where building it would take minutes or all memory
    assert peak() - before < 300 << 20
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("held", [HELD, None], ids=["headers", "nothing known"])
@pytest.mark.parametrize("value", HUGE)
def test_so_do_layers_of_any_spelling(value: str, held: Holds | None) -> None:
    fields = {"llama": "num_hidden_layers", "gpt_neo": "num_layers", "bloom": "n_layer", "mpt": "n_layers"}
    for model_type, field in fields.items():
        with pytest.raises(CheckpointError, match=field):
            built({"model_type": model_type, field: HUGE[value]}, held)


@pytest.mark.parametrize("field", WRONG)
def test_values_that_give_no_model_are_one_line(field: str) -> None:
    with pytest.raises(AirLLMError) as error:
        built(LLAMA | {field: WRONG[field]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["nope", 2.5, {"a": 1}, "int64", "Tensor"], ids=str)
def test_a_dtype_that_is_none(value: Any, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_config(tiny_llama(), tmp_path / "model", dtype=value)
    with pytest.raises(CheckpointError) as error:
        prepare.prepare(folder, LoadOptions.create(device="cpu"))
    assert "\n" not in str(error.value)


def with_config(folder: Path, target: Path, **entries: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | entries))
    return target


def test_parts_in_parts_without_end() -> None:
    config: dict[str, Any] = dict(LLAMA)
    for _ in range(900):
        config = {"model_type": "gemma3", "text_config": config}
    with pytest.raises(CheckpointError, match="deep"):
        check_sizes(config, lambda: HELD)


def test_every_architecture_at_its_own_size_is_let_through() -> None:
    """Of what transformers has, no config's defaults are taken for damage where no header is known."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    for model_type in CAUSAL:
        if model_type in CONFIG_MAPPING and model_type != "gemma4_assistant":  # whose defaults are no config
            check_sizes(CONFIG_MAPPING[model_type]().to_dict(), lambda: None)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neo", "mixtral", "gptj", "xglm", "albert"])
def test_what_the_files_hold_is_built(model_type: str) -> None:
    if model_type == "albert":  # one layer's weights, used by all: more layers than tensors
        check_sizes({"model_type": "albert", "num_hidden_layers": 200}, lambda: Holds(25, 30_000, 10**6))
        return
    config = tiny_config(model_type).to_dict()
    assert built(config, Holds(30, 260, 10**6)).config.model_type == model_type


def test_numbers_that_size_nothing_may_be_large() -> None:
    seen = {
        "rope_theta": 1e12,
        "num_params": 7 * 10**9,
        "model_max_length": 10**30,
        "max_position_embeddings": 10**7,
        "train_batch_tokens": 10**12,
        "seed": 2**63,
        "time_step_limit": [0.0, float("inf")],
        "transformers_version": "5.23.0",
        "dataset_size": 10**12,
        "rope_parameters": {"rope_theta": 10**11},
    }
    check_sizes(LLAMA | seen, lambda: HELD)


@pytest.mark.parametrize("way", ["load", "plan", "4bit"])
def test_a_folder(way: str, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_config(tiny_llama(), tmp_path / "model", num_hidden_layers=2**31)
    options = LoadOptions.create(compression="4bit" if way == "4bit" else None, device="cpu")
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=2,147,483,648.* hold \d+ tensors"):
        (plan_model if way == "plan" else open_model)(folder, options)


@pytest.mark.parametrize("field", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"])
def test_a_gguf_file(field: str, tmp_path: Path) -> None:
    path = gguf_files.tiny_llama_gguf(tmp_path / "tiny.gguf", more={field: 2_000_000_000})
    with pytest.raises(CheckpointError, match=field.rpartition(".")[2]):
        prepare.prepare(path, LoadOptions.create(device="cpu"))
