"""What generate goes by is looked at before anything runs: an answer is one text, and settings are what they can be."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from airllm_nb import AutoModel
from airllm_nb.decode.prefill import of_generation
from airllm_nb.decode.settings import as_whole, complaint
from airllm_nb.engine.facade import StreamedModel
from airllm_nb.errors import AirLLMError, BudgetError, OptionError

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS: dict[str, Any] = {
    "num_beams": 4, "num_return_sequences": 3, "num_beam_groups": 2, "penalty_alpha": 0.6, "dola_layers": "low",
    "constraints": [object()], "force_words_ids": [[5]], "custom_generate": "some/repo",
}  # fmt: skip
WRONG: list[tuple[str, Any]] = [
    ("temperature", "hot"), ("temperature", float("nan")), ("temperature", -1), ("temperature", True),
    ("temperature", float("inf")), ("top_p", 1.5), ("top_p", "0.9"), ("top_k", -1), ("top_k", 2.5), ("min_p", 2),
    ("repetition_penalty", 0), ("repetition_penalty", -2.0), ("length_penalty", float("nan")), ("do_sample", "yes"),
    ("use_cache", 5), ("eos_token_id", "2"), ("eos_token_id", [2, "3"]), ("eos_token_id", 2.5), ("pad_token_id", [0]),
    ("suppress_tokens", ["a"]), ("min_new_tokens", -1), ("min_length", "many"), ("max_time", -1),
    ("no_repeat_ngram_size", 1.5), ("stop_strings", 7), ("stop_strings", ["x", ""]), ("num_beams", 0),
    ("num_return_sequences", "3"), ("watermarking_config", "x"), ("max_length", "long"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Iterator[StreamedModel]:
    with AutoModel.from_pretrained(tiny_llama(), device="cpu") as made:
        yield made


def with_defaults(folder: Path, target: Path, text: str | None = None, **defaults: Any) -> Path:
    shutil.copytree(folder, target)
    file = target / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults) if text is None else text, "utf-8")
    return target


def plain(folder: Path, prompt: str, tokenizer: Any, **options: Any) -> list[int]:
    """What the resident model writes, one token after the other."""
    native = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    return native.generate(**ids, max_new_tokens=5, do_sample=False, **options)[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("way", ["argument", "config"])
def test_what_makes_no_single_text_is_refused_of_a_caller(name: str, way: str, model: StreamedModel) -> None:
    config = GenerationConfig()
    setattr(config, name, NUMBERS[name])
    given = {name: NUMBERS[name]} if way == "argument" else {"generation_config": config}
    with pytest.raises(OptionError, match=rf"{name}=.*model\.generate"):
        model.answer("Hello", max_new_tokens=3, **given)
    assert not model.busy


@pytest.mark.parametrize("defaults", [
    {"num_beams": 4}, {"num_return_sequences": 3, "do_sample": True}, {"num_beams": 4, "num_return_sequences": 3},
    {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}, {"num_beams": 4, "num_beam_groups": 2,
                                                                 "diversity_penalty": 0.5},
], ids=str)  # fmt: skip
def test_what_the_checkpoint_has_so_is_left_aside(
    defaults: dict[str, Any], tiny_llama: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_defaults(tiny_llama(), tmp_path / "model", **defaults)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        expected = plain(tiny_llama(), "Hello", model.tokenizer)
        for config in (None, GenerationConfig(do_sample=False)):
            result = model.answer("Hello", max_new_tokens=5, do_sample=False, generation_config=config)
            assert list(result.token_ids) == expected
        assert next(iter(defaults)) in caplog.text and "left aside" in caplog.text
        if defaults == {"num_beams": 4}:  # what is transformers' own goes by it
            assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)
            assert model.native.generation_config.num_beams == 4


def test_a_callers_one_beam_stands_above_the_checkpoints_four(
    tiny_llama: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_defaults(tiny_llama(), tmp_path / "model", num_beams=4)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert len(model.answer("Hello", max_new_tokens=2, num_beams=1).token_ids) == 2
    assert "left aside" not in caplog.text


def test_texts_that_end_an_answer_may_be_the_checkpoints(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    with AutoModel.from_pretrained(tiny_llama(), device="cpu") as model:
        whole = model.answer("Hello", max_new_tokens=12).text
    stop = whole[4]
    folder = with_defaults(tiny_llama(), tmp_path / "model", stop_strings=[stop])
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert model.answer("Hello", max_new_tokens=12).text == whole[: whole.index(stop)]
        assert model.answer("Hello", max_new_tokens=12, stop=whole[1]).text == whole[: whole.index(whole[1])]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_values_that_cannot_be(name: str, value: Any, model: StreamedModel) -> None:
    with pytest.raises(OptionError, match=f"{name}=.*must be") as error:
        model.answer("Hello", max_new_tokens=3, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 2.5, "many", True, None, float("nan")], ids=str)
def test_how_many_tokens(value: Any, model: StreamedModel) -> None:
    with pytest.raises(OptionError, match=r"max_new_tokens=.*must be"):
        model.answer("Hello", max_new_tokens=value)
    with pytest.raises(OptionError, match="min_new_tokens=9 is more than max_new_tokens=3"):
        model.answer("Hello", max_new_tokens=3, min_new_tokens=9)
    with pytest.raises(OptionError, match="stop="):
        model.answer("Hello", stop=[b"x"])


def test_temperature_zero_is_greedy(model: StreamedModel) -> None:
    greedy = model.answer("Hello", max_new_tokens=4, do_sample=False).token_ids
    assert model.answer("Hello", max_new_tokens=4, do_sample=True, temperature=0.0).token_ids == greedy


def test_values_of_the_checkpoint_that_cannot_be_are_left_out_by_name(
    tiny_llama: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {name: value for name, value in WRONG if value == value and value is not True}
    folder = with_defaults(tiny_llama(), tmp_path / "model", **wrong)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert list(model.answer("Hello", max_new_tokens=5).token_ids) == plain(tiny_llama(), "Hello", model.tokenizer)
        assert model.native.generation_config.eos_token_id == 2  # the config's stands in
    assert all(f"{name}=" in caplog.text for name in wrong)


DAMAGED = ["", "{", "[1]", "\ufeff{}", '{"a": 1', "null", '{"cache_implementation": "nope"}',
           '{"watermarking_config": {"bias": "x"}}', '{"transformers_version": 5}']  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=repr)
def test_a_damaged_generation_config_stops_nothing(text: str, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_defaults(tiny_llama(), tmp_path / "model", text)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert list(model.answer("Hello", max_new_tokens=5).token_ids) == plain(tiny_llama(), "Hello", model.tokenizer)


@pytest.mark.parametrize("given", [
    {"num_beams": 100_000, "max_new_tokens": 100}, {"num_beams": 10**9}, {"num_beams": 10**30},
    {"num_return_sequences": 10**9, "do_sample": True}, {"max_new_tokens": 10**12}, {"max_length": 10**12},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("place", ["a CPU", "a rehearsed budget"])
def test_more_than_any_memory_is_refused_before_it_runs(
    given: dict[str, Any], place: str, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a machine of one size: a hundred thousand beams of so small a model might fit a large one.
    monkeypatch.setattr("airllm_nb.intake.planning.total_ram", lambda: 1 << 30)
    options = {} if place == "a CPU" else {"vram_budget": "64MiB"}
    with AutoModel.from_pretrained(tiny_llama(), device="cpu", **options) as model:
        start = time.process_time()
        with pytest.raises(BudgetError):
            model.generate(
                torch.tensor([[5, 6, 7]]), **(given if "max_length" in given else {"max_new_tokens": 100} | given)
            )
        assert time.process_time() - start < 5
        assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape == (1, 5)


def test_what_is_right_has_no_complaint() -> None:
    good = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "eos_token_id": [1, 2], "do_sample": True, "max_time": 5,
            "stop_strings": ["x"], "suppress_tokens": [], "pad_token_id": 0, "epsilon_cutoff": 0.0, "unknown": object(),
            "forced_eos_token_id": [1], "eos_token_id ": None}  # fmt: skip
    assert not any(complaint(name, value) for name, value in good.items())
    assert not any(complaint(name, value) for name, value in GenerationConfig().to_dict().items())
    assert complaint("eos_token_id", torch.tensor([1, 2])) == ""


def test_every_error_is_of_the_package(model: StreamedModel) -> None:
    for given in ({"cache_implementation": "nope"}, {"logits_processor": 5}, {"nonsense": 3}):
        try:
            model.answer("Hello", max_new_tokens=2, **given)
        except (AirLLMError, ValueError, TypeError):  # transformers' own words for its own arguments
            assert not model.busy
    assert len(model.answer("Hello", max_new_tokens=2).token_ids) == 2


# ---- numbers of other libraries --------------------------------------------------------------------------------------

KINDS_OF_NUMBER = {
    "numpy": lambda value: np.float64(value) if isinstance(value, float) else np.int64(value),
    "short numpy": lambda value: np.float32(value) if isinstance(value, float) else np.uint8(value),
    "an array": lambda value: np.asarray(value),
    "torch": lambda value: torch.tensor(value),
    "a fraction": lambda value: Fraction(value) if isinstance(value, float) else value,
}


@pytest.mark.parametrize("kind", KINDS_OF_NUMBER)
def test_numbers_of_other_libraries_are_numbers(model: StreamedModel, kind: str) -> None:
    made = KINDS_OF_NUMBER[kind]
    whole = {"max_new_tokens": 3, "top_k": 2, "eos_token_id": 2, "num_beams": 1}
    given = {name: made(value) for name, value in whole.items()} | {"temperature": made(0.75), "do_sample": True}
    assert not any(complaint(name, value) for name, value in given.items())
    assert complaint("top_k", made(0.5)) and complaint("temperature", made(-1.0)) and complaint("num_beams", made(0))
    assert complaint("suppress_tokens", [made(3), made(4)]) == "" and complaint("suppress_tokens", [made(0.5)])
    torch.manual_seed(0)
    expected = model.answer("Hello", **whole, temperature=0.75, do_sample=True)
    torch.manual_seed(0)
    assert model.answer("Hello", **given).token_ids == expected.token_ids
    with model.stream("Hello", max_new_tokens=made(2)) as generation:
        list(generation)
    assert generation.result is not None and len(generation.result.token_ids) <= 2


@pytest.mark.parametrize("kind", KINDS_OF_NUMBER)
def test_a_plan_counts_numbers_of_other_libraries(model: StreamedModel, kind: str) -> None:
    made = KINDS_OF_NUMBER[kind]
    works = [
        of_generation(model.native, {"input_ids": torch.tensor([[5]]), "max_new_tokens": one(100), "num_beams": one(4)})
        for one in (made, int)
    ]
    assert works[0] == works[1] and (works[0].length, works[0].batch) == (101, 4)
    assert as_whole(made(7), 20) == 7
    assert [as_whole(value, 20) for value in (None, True, "x", float("nan"), np.float64("inf"), 10**400)] == [
        20, 20, 20, 20, 20, 10**400]  # fmt: skip


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize("wrong", [{"pad_token_id": -1}, {"bos_token_id": 10**6}, {"bos_token_id": -1}], ids=str)
def test_tokens_of_a_config_that_are_none(
    tiny_llama: Callable[..., Path], tmp_path: Path, wrong: dict[str, int], with_file: bool
) -> None:
    folder = with_defaults(tiny_llama(), tmp_path / "model", **wrong)
    config = json.loads((folder / "config.json").read_text()) | wrong
    (folder / "config.json").write_text(json.dumps(config))
    if not with_file:
        (folder / "generation_config.json").unlink()
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert getattr(model.native.generation_config, next(iter(wrong))) is None
        assert list(model.answer("Hello", max_new_tokens=5).token_ids) == plain(tiny_llama(), "Hello", model.tokenizer)
        assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)
