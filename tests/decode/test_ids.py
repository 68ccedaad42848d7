"""A token, a position or a mask that the model has no place for is said before anything runs, with its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import save_tiny
from transformers import AutoTokenizer, DynamicCache

from airllm_nb import AutoModel
from airllm_nb.decode import ids as ids_module
from airllm_nb.decode import prefill
from airllm_nb.engine.facade import StreamedModel
from airllm_nb.errors import OptionError, PromptError

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = torch.tensor([[1, 17, 42], [5, 6, 7]])
STREAMED = {"vram_budget": "700KiB", "ram_budget": "1MiB", "max_seq_len": 48}


@pytest.fixture(scope="module", params=["in place", "streamed"])
def model(request: pytest.FixtureRequest, tiny_llama: Callable[..., Path]) -> Iterator[StreamedModel]:
    options = STREAMED if request.param == "streamed" else {}
    with AutoModel.from_pretrained(tiny_llama(), device="cpu", **options) as made:
        yield made


def changed(row: int, column: int, value: int) -> torch.Tensor:
    ids = GOOD.clone()
    ids[row, column] = value
    return ids


@pytest.mark.parametrize("value", [260, 100_000, -1, -100, 2**40])
@pytest.mark.parametrize("way", ["generate", "input_ids", "forward", "keyword"])
def test_a_token_that_the_model_does_not_have(value: int, way: str, model: StreamedModel) -> None:
    bad = changed(1, 2, value)
    call = {"generate": lambda: model.generate(bad, max_new_tokens=2),
            "input_ids": lambda: model.generate(input_ids=bad, max_new_tokens=2),
            "forward": lambda: model(bad), "keyword": lambda: model(input_ids=bad)}[way]  # fmt: skip
    with pytest.raises(PromptError, match=rf"token {value} at \[1, 2\]; the model has 260"):
        call()
    assert model(GOOD).logits.shape == (2, 3, 260)  # it goes on as before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.complex64])
def test_numbers_that_are_no_tokens(dtype: torch.dtype, model: StreamedModel) -> None:
    with pytest.raises(PromptError, match=r"input_ids is a tensor of .*\.long"):
        model(GOOD.to(dtype))
    with pytest.raises(PromptError, match=r"\.long"):
        model.generate(input_ids=GOOD.to(dtype), max_new_tokens=2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_numbers_that_are(dtype: torch.dtype, model: StreamedModel) -> None:
    assert torch.equal(model(GOOD.to(dtype).long()).logits, model(GOOD).logits)


def test_labels(model: StreamedModel) -> None:
    assert torch.isfinite(model(GOOD, labels=changed(0, 0, -100)).loss)  # transformers' own: no loss there
    for value in (260, -1, -99):
        with pytest.raises(PromptError, match=rf"labels has the token {value} at \[0, 1\]"):
            model(GOOD, labels=changed(0, 1, value))


def test_masks_and_embeddings_of_another_shape(model: StreamedModel) -> None:
    for mask in (torch.ones(2, 4), torch.ones(1, 3), torch.ones(2, 2)):
        with pytest.raises(PromptError, match="attention_mask has the shape"):
            model(GOOD, attention_mask=mask.long())
        with pytest.raises(PromptError, match="attention_mask has the shape"):
            model.generate(GOOD, attention_mask=mask.long(), max_new_tokens=2)
    for shape in ((1, 3, 63), (3, 64), (1, 3, 64, 1)):
        with pytest.raises(PromptError, match=r"the model takes \[batch, tokens, 64\]"):
            model(inputs_embeds=torch.zeros(shape))
    first = model(GOOD, use_cache=True)
    after = model(GOOD[:, :1], past_key_values=first.past_key_values, attention_mask=torch.ones(2, 4).long())
    assert after.logits.shape == (2, 1, 260)


SETTINGS: dict[str, Any] = {
    "bad_words_ids": [[5], [6, 260]],
    "sequence_bias": {(5, 999): -1.0}, "forced_bos_token_id": 260, "forced_eos_token_id": 9999, "pad_token_id": 260,
    "bos_token_id": -1, "decoder_start_token_id": 1000,
}  # fmt: skip


@pytest.mark.parametrize("call", [lambda m, ids: m.model(ids), lambda m, ids: m.get_decoder()(input_ids=ids),
                                  lambda m, ids: m.base_model(ids, use_cache=False)])  # fmt: skip
def test_a_part_that_is_called_by_itself_has_no_other_tokens(call: Any, model: StreamedModel) -> None:
    assert call(model, GOOD).last_hidden_state.shape[:2] == GOOD.shape
    for token in (260, -1):
        bad = GOOD.clone()
        bad[0, 1] = token
        with pytest.raises(PromptError, match=f"{token} at"):
            call(model, bad)
    assert call(model, GOOD).last_hidden_state.shape[:2] == GOOD.shape


@pytest.mark.parametrize("model_type", ["git", "gemma3", "phi4_multimodal"])
def test_positions_of_images_are_not_those_of_text(tmp_path: Path, model_type: str) -> None:
    tiny_models.save_tiny(model_type, tmp_path)
    with tiny_models.streamed(tmp_path) as model:
        assert model(torch.full((1, 24), 5)).logits.shape[1] == 24


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_name_such_a_token(name: str, model: StreamedModel) -> None:
    with pytest.raises(OptionError, match=f"{name} names the token .*260"):
        model.generate(GOOD, max_new_tokens=2, **{name: SETTINGS[name]})
    with pytest.raises(OptionError, match=f"{name} names the token .*260"):
        model.answer("Hi", max_new_tokens=2, **{name: SETTINGS[name]})


def test_settings_that_name_tokens_of_the_model(model: StreamedModel) -> None:
    model.generate(GOOD, max_new_tokens=2, bad_words_ids=[[5]], sequence_bias={(5, 9): -1.0},
                   suppress_tokens=[3, 400], begin_suppress_tokens=[-1],
                   eos_token_id=[2, 100_000], forced_eos_token_id=[2])  # fmt: skip


def test_a_tokenizer_with_more_tokens_than_the_model(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        with pytest.raises(PromptError, match=r"token 260 at \[0, 2\]; the model has 260.*added"):
            model.answer("Hi<tool>", max_new_tokens=2)
        assert not model.busy
        assert len(model.answer("Hi", max_new_tokens=2).token_ids) == 2


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_positions_that_were_never_learned(kind: str, tmp_path: Path) -> None:
    config = save_tiny(kind, tmp_path).config
    longest = config.max_position_embeddings
    with AutoModel.from_pretrained(tmp_path, device="cpu") as model:
        ids = torch.full((1, longest), 7)
        assert model(ids).logits.shape[1] == longest
        with pytest.raises(PromptError, match=f"{longest + 1} .*{longest}"):
            model(torch.full((1, longest + 1), 7))
        for value in (longest, -1):
            with pytest.raises(PromptError, match=f"position_ids has {value}"):
                model(ids[:, :2], position_ids=torch.tensor([[0, value]]))
        with pytest.raises(PromptError, match=str(longest)):
            model.generate(ids[:, :-2], max_new_tokens=9, min_new_tokens=9)


def test_the_check_costs_one_way_to_the_device(monkeypatch: pytest.MonkeyPatch, model: StreamedModel) -> None:
    asked: list[int] = []
    real = ids_module._limits
    monkeypatch.setattr(ids_module, "_limits", lambda values: (asked.append(1), real(values))[1])
    model(GOOD)
    assert len(asked) == 1


def test_a_generation_does_not_wait_to_look_at_what_it_sampled(
    monkeypatch: pytest.MonkeyPatch, model: StreamedModel
) -> None:
    looked: list[torch.Size] = []
    real, padded = ids_module._limits, prefill._is_padded

    def look_at_mask(mask: Any) -> bool:
        if mask is not None:
            looked.append(mask.shape)
        return padded(mask)

    monkeypatch.setattr(prefill, "_is_on_host", lambda value: not isinstance(value, torch.Tensor))  # as on a GPU
    monkeypatch.setattr(ids_module, "_limits", lambda values: (looked.append(values.shape), real(values))[1])
    monkeypatch.setattr(prefill, "_is_padded", look_at_mask)
    for options in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        counts = []
        for tokens in (4, 12):
            looked.clear()
            model.generate(GOOD[:1], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
            counts.append(len(looked))
        assert counts[0] == counts[1], "only what is given is looked at"


@pytest.mark.parametrize("cached", [False, True])
def test_what_a_processor_gives_is_looked_at(cached: bool, model: StreamedModel) -> None:
    def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=model.config) if cached else None
        if cached:
            model(GOOD, past_key_values=cache)
        with pytest.raises(PromptError, match=r"token 260 at \[1, 2\]"):
            model(changed(1, 2, 260), past_key_values=cache)
        asked.append(1)
        return scores

    asked: list[int] = []
    model.generate(GOOD, max_new_tokens=2, logits_processor=[processor])
    assert asked


def test_names_of_arguments_are_those_of_the_native_class(model: StreamedModel) -> None:
    names = list(prefill._parameters(model))
    assert names[0] == "input_ids" and "logits_to_keep" in names and "self" not in names
    assert prefill._parameters(model) is prefill._parameters(model)
