"""How long a sequence may be: as long as transformers runs it, or as long as was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoConfig

from airllm_nb import AutoModel
from airllm_nb.errors import OptionError, PromptError
from airllm_nb.plan.needs import check_positions, context_length

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(5))
FACTORS = [1.0] * 8
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALED: dict[str, tuple[int, dict[str, Any]]] = {
    "yarn, as Qwen2.5 says": (128, YARN),
    "yarn of half the length": (64, YARN | {"original_max_position_embeddings": 16}),
    "linear": (128, {"rope_type": "linear", "factor": 4.0}),
    "linear, as older files say": (128, {"type": "linear", "factor": 4.0}),
    "dynamic": (64, {"rope_type": "dynamic", "factor": 2.0}),
    "llama3": (128, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16}),
    "longrope": (32, {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "factor": 2.0,
                      "original_max_position_embeddings": 16}),
    "default": (32, {"rope_type": "default"}),
    "none": (32, {}),
}  # fmt: skip


def config(rope: dict[str, Any], kind: str = "llama", **fields: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 32}  # fmt: skip
    scaling = {"rope_parameters": {"rope_theta": 1e4, **rope}} if rope else {}
    return AutoConfig.for_model(kind, **sizes | scaling | fields)


def saved(folder: Path, made: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny_models.full_class(made).from_config(made, dtype=torch.float32).eval()
        tiny_models.randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("length", "rope"), SCALED.values(), ids=SCALED)
def test_scaled_positions_reach_as_far_as_their_type_says(length: int, rope: dict[str, Any]) -> None:
    assert context_length(config(rope)) == length


def test_where_layers_differ_all_of_them_must_reach() -> None:
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    layers = {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert context_length(config(layers, "gemma3_text", head_dim=16)) == 32
    both = dict.fromkeys(layers, scaled)
    assert context_length(config(both, "gemma3_text", head_dim=16)) == 256


@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": "4"}, {"rope_type": "linear", "factor": 1e30},
                                  {"rope_type": "dynamic", "factor": float("nan")}])  # fmt: skip
def test_factors_that_make_no_sense_are_not_followed(rope: dict[str, Any]) -> None:
    made = config({})
    made.rope_parameters = rope
    assert context_length(made) == 32


@pytest.mark.parametrize("name", ["yarn, as Qwen2.5 says", "linear", "dynamic", "llama3", "longrope", "none"])
def test_what_runs_beyond_is_what_transformers_runs(tmp_path: Path, name: str) -> None:
    length, rope = SCALED[name]
    resident = tiny_models.resident(saved(tmp_path, config(rope)))
    # By itself as far as the model reaches; further where that was asked for.
    for asked in (None, 128) if length > 64 else (128,):
        resident = tiny_models.resident(tmp_path)
        with AutoModel.from_pretrained(tmp_path, device="cpu", dtype="float32", max_seq_len=asked) as model:
            # A long one, a short one and a long one: dynamic frequencies grow, are reset, and grow again.
            for ids in (LONG, LONG[:, :9], LONG[:, :50]):
                assert torch.equal(tiny_models.generated(model, ids), tiny_models.generated(resident, ids))


def test_without_a_wish_the_context_ends_where_the_model_does(tmp_path: Path) -> None:
    folder = saved(tmp_path, config({}))
    with AutoModel.from_pretrained(folder, device="cpu") as model, pytest.raises(PromptError, match="the context 32"):
        model.generate(LONG)


def test_the_plan_has_room_for_what_was_asked(tmp_path: Path) -> None:
    folder, sizes = saved(tmp_path, config({})), []
    for asked in (32, 4096):
        with AutoModel.from_pretrained(folder, device="cpu", max_seq_len=asked) as model:
            assert model._prepared.planned.length == asked
            sizes.append(model.plan.needs.kv_cache)
    assert sizes[1] == 128 * sizes[0]


def test_an_answer_grows_past_the_training(tiny_llama: Any, tmp_path: Path) -> None:
    """By text, too; and it says how many tokens it has."""
    folder = tiny_llama(max_position_embeddings=32, rope_parameters={"rope_theta": 1e4, **YARN})
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", max_seq_len=128) as model:
        result = model.answer("Once upon a time", max_new_tokens=50, min_new_tokens=50)
        assert result.tokens == len(result.token_ids) == 50 and result.stopped_by == "length"


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bart", "bert", "codegen", "gptj", "ctrl", "gpt_neo", "marian"])
def test_a_table_of_positions_has_an_end(kind: str) -> None:
    made = tiny_models.tiny_config(kind)
    native = tiny_models.full_class(made).from_config(made).eval()
    check_positions(native, 128)
    check_positions(native, None)
    with pytest.raises(OptionError, match=r"max_seq_len=129 is more than the 128 positions"):
        check_positions(native, 129)
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        native(torch.full((1, 129), 5))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bloom", "mamba", "falcon", "xglm", "deepseek_v4", "cohere2"])
def test_what_is_calculated_has_none(kind: str) -> None:
    made = tiny_models.tiny_config(kind)
    native = tiny_models.full_class(made).from_config(made).eval()
    check_positions(native, 140)
    with torch.no_grad():
        native(torch.full((1, 140), 5))


def test_a_wish_beyond_the_table_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    made = tiny_models.tiny_config("gpt2")
    folder = saved(tmp_path, made)
    with pytest.raises(OptionError, match="at most 128"):
        AutoModel.from_pretrained(folder, device="cpu", max_seq_len=1024).close()
