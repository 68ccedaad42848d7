"""The model is a transformers model: what clients of transformers do with one works, or says in one line why not."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import within
from test_equality import ROOM, budgets_for, open_in
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    pipeline,
)

from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import StreamedModel, open_model
from airllm_nb.errors import AirLLMError, BusyError, ClosedError, OptionError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[1, 70, 90, 33, 60, 70, 90]])
KINDS = {"in place": "ram", "disk": "disk", "device": "gpu|ram|disk", "resident": "gpu"}
STREAMED = ["disk", "device"]


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(dtype="float32", num_hidden_layers=10)


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.fixture(scope="module")
def tied(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(dtype="float32", num_hidden_layers=10, tied=True)


@functools.cache
def budgets(folder: Path, kind: str) -> dict[str, Any]:
    """Found by planning some times: once is enough."""
    return budgets_for(folder, KINDS[kind], dtype="float32")


def opened(folder: Path, kind: str = "disk", **options: Any) -> StreamedModel:
    if "compression" in options:
        return open_in(folder, KINDS[kind], dtype="float32", **options)
    return open_model(folder, LoadOptions.create(**ROOM, **budgets(folder, kind), dtype="float32", **options))


@pytest.fixture(scope="module", params=list(KINDS))
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(folder, request.param) as model:
        yield model


@pytest.fixture(scope="module", params=STREAMED)
def streamed(folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(folder, request.param) as model:
        yield model


def same_logits(model: Any, resident: Any) -> bool:
    with torch.no_grad():
        return torch.equal(model(IDS).logits, resident(IDS).logits)


def refuses(call: Callable[[], Any], kind: type[Exception] = OptionError) -> str:
    with pytest.raises(kind) as refusal:
        call()
    assert isinstance(refusal.value, AirLLMError)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# ---- what it is ------------------------------------------------------------------------------------------------------


def test_it_is_of_its_native_class(model: Any, resident: Any) -> None:
    assert isinstance(model, (type(resident), PreTrainedModel, GenerationMixin))
    assert type(model).__name__ == type(resident).__name__ and model.can_generate()
    assert inspect.signature(model.forward) == inspect.signature(resident.forward)
    assert inspect.signature(model.generate) == inspect.signature(resident.generate)
    assert model.native is model and type(model.config) is type(resident.config)
    assert {name for name, _ in model.named_modules()} == {name for name, _ in resident.named_modules()}
    assert model.get_input_embeddings().num_embeddings == resident.get_input_embeddings().num_embeddings
    assert model.name_or_path and model.generation_config.pad_token_id == resident.generation_config.pad_token_id
    assert not model.training


def test_generate_is_called_in_every_way(model: Any, resident: Any) -> None:
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0, eos_token_id=2)
    expected = resident.generate(IDS, config)
    assert model.generate(IDS, config).equal(expected)
    assert model.generate(inputs=IDS, generation_config=config).equal(expected)
    assert model.generate(input_ids=IDS, max_new_tokens=6).equal(expected)
    scored = model.generate(IDS, config, return_dict_in_generate=True, output_scores=True)
    mine = model.compute_transition_scores(scored.sequences, scored.scores, normalize_logits=True)
    other = resident.generate(IDS, config, return_dict_in_generate=True, output_scores=True)
    assert mine.equal(resident.compute_transition_scores(other.sequences, other.scores, normalize_logits=True))


def test_a_pipeline_takes_it(model: Any, resident: Any) -> None:
    said = [
        pipeline("text-generation", model=each, tokenizer=model.tokenizer)("Hello", max_new_tokens=5, do_sample=False)
        for each in (model, resident)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["folder", "tied"])
def test_parameters_are_counted_as_transformers_does(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    native = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    for kind in KINDS:
        with opened(path, kind) as model:
            assert model.num_parameters() == native.num_parameters()
            assert model.num_parameters(exclude_embeddings=True) == native.num_parameters(exclude_embeddings=True)
            assert model.get_memory_footprint() == native.get_memory_footprint()
            assert model.num_parameters(only_trainable=True) == (0 if kind in STREAMED else native.num_parameters())


@pytest.mark.parametrize("options", [{"compression": "4bit"}, {"compression": "8bit"}], ids=str)
def test_packed_parameters_are_counted_as_what_they_are(tied: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    native = AutoModelForCausalLM.from_pretrained(tied, dtype="float32")
    with opened(tied, "disk", layer_shards_saving_path=tmp_path, **options) as model:
        assert model.num_parameters() == native.num_parameters()


def test_an_assistant_is_either(model: Any, resident: Any, tiny_llama: Callable[..., Path]) -> None:
    small = tiny_llama(dtype="float32", num_hidden_layers=2, seed=4)
    expected = resident.generate(IDS, max_new_tokens=12)
    with opened(small, "in place") as draft:
        assert model.generate(IDS, max_new_tokens=12, assistant_model=draft).equal(expected)
        assert resident.generate(IDS, max_new_tokens=12, assistant_model=draft).equal(expected)
        assert draft.generate(IDS, max_new_tokens=12, assistant_model=model).equal(
            draft.generate(IDS, max_new_tokens=12)
        )


def test_attention_is_chosen_at_load(folder: Path) -> None:
    for name in ("eager", "sdpa"):
        native = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation=name).eval()
        with opened(folder, "disk", attn_implementation=name) as model:
            assert model.config._attn_implementation == name
            assert same_logits(model, native)
    assert "flash_attention_2" in refuses(lambda: LoadOptions.create(attn_implementation="flash"))
    if not importlib.util.find_spec("flash_attn"):
        refuses(lambda: open_model(folder, LoadOptions.create(attn_implementation="flash_attention_2")))


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_outputs_are_ordinary_tensors(model: Any) -> None:
    outputs = model(IDS, output_hidden_states=True)
    outputs.logits.data[:, -1] = 0
    probe = torch.nn.Linear(outputs.hidden_states[-1].shape[-1], 2)
    probe(outputs.hidden_states[-1].detach()).sum().backward()
    assert probe.weight.grad is not None and probe.weight.grad.abs().sum() > 0
    made = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    made.logits[0][:, 0] += 1
    assert not made.sequences.is_inference()
    hidden = model.model(IDS).last_hidden_state.detach()
    hidden += 1


def test_logits_of_what_streams_are_edited_in_place(streamed: Any) -> None:
    logits = streamed(IDS).logits
    logits[:, -1] = 0
    assert not logits.requires_grad and logits[:, -1].abs().sum() == 0


# ---- one thread at a time --------------------------------------------------------------------------------------------


def test_a_processor_calls_the_model(model: Any, resident: Any) -> None:
    class Contrast(LogitsProcessor):
        def __init__(self, native: Any):
            self.native = native

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return scores - 0.5 * self.native(input_ids[:, -1:]).logits[:, -1]

    said = [
        each.generate(IDS, max_new_tokens=6, logits_processor=LogitsProcessorList([Contrast(each)]))
        for each in (model, resident)
    ]
    assert said[0].equal(said[1])


def test_a_hook_that_calls_the_model_within_its_forward_is_refused(streamed: Any, resident: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: streamed(IDS), lambda: streamed.generate(IDS, max_new_tokens=2),
        lambda: streamed.model.layers[8](LAYER[0], position_embeddings=LAYER[1]),
    ]  # fmt: skip
    tiers = dict(zip((unit.name for unit in streamed.plan.units), streamed.plan.tiers, strict=True))
    if "gpu" in (tiers["model.layers.2"], tiers["model.layers.8"]):
        del calls[2]  # what is resident may be called: it pushes nothing out
    for call in calls:
        hook = streamed.model.layers[2].self_attn.register_forward_pre_hook(lambda *_, call=call: (call(), None)[1])
        try:
            refuses(lambda: streamed(IDS), BusyError)
        finally:
            hook.remove()
        assert not streamed.busy and same_logits(streamed, resident)


LAYER = torch.ones(1, 2, 64), (torch.ones(1, 2, 16), torch.zeros(1, 2, 16))
PARTS: dict[str, Callable[[Any], Any]] = {
    "the model": lambda m: m(IDS).logits,
    "its generate": lambda m: m.generate(IDS, max_new_tokens=2),
    "its decoder": lambda m: m.model(IDS).last_hidden_state,
    "a layer": lambda m: m.model.layers[4](LAYER[0], position_embeddings=LAYER[1])[0],
    "its head": lambda m: m.lm_head(torch.ones(1, 64)),
    "its table": lambda m: m.get_input_embeddings()(IDS),
    "its forward": lambda m: m.forward(IDS).logits,
}


@pytest.mark.parametrize("part", [part for part in PARTS if part != "its table"])
def test_another_thread_is_refused_through_whichever_object(streamed: Any, part: str) -> None:
    with streamed.stream("Hello", max_new_tokens=100, min_new_tokens=100) as generation:
        next(generation)
        refuses(lambda: PARTS[part](streamed), BusyError)
        next(generation)
    with torch.no_grad():
        PARTS[part](streamed)


@pytest.mark.parametrize("part", PARTS)
def test_two_threads_get_what_is_right_or_are_refused(streamed: Any, resident: Any, part: str) -> None:
    wrong: list[Any] = []

    def work(call: Callable[[Any], torch.Tensor]) -> None:
        right = call(resident).detach()  # by this thread: how many compute may change the last bit
        for _ in range(10):
            try:
                if not torch.equal(call(streamed), right):
                    wrong.append("off")
            except BusyError:
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(PARTS[each],)) for each in (part, "the model")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not streamed.busy


def test_a_part_does_not_hear_of_an_earlier_stop(streamed: Any, resident: Any) -> None:
    with streamed.stream("Hello", max_new_tokens=100, min_new_tokens=100) as generation:
        next(generation)
        streamed.stop()
        list(generation)
    with torch.no_grad():
        assert streamed.model(IDS).last_hidden_state.equal(resident.model(IDS).last_hidden_state)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_part_that_fails_leaves_the_model_to_others(streamed: Any, resident: Any, error: type[BaseException]) -> None:
    def fails(*_: Any) -> None:
        raise error

    for place in (streamed.model.layers[3].self_attn, streamed.model.layers[3].mlp.down_proj):
        hook = place.register_forward_hook(fails)
        for call in (streamed.model, streamed):
            with pytest.raises(error):
                call(IDS)
        hook.remove()
        outcome: list[Any] = []
        thread = threading.Thread(target=lambda: outcome.append(same_logits(streamed, resident)))  # noqa: B023
        thread.start()
        thread.join()
        assert outcome == [True]
        assert same_logits(streamed, resident)


def test_a_closed_model_says_so_through_every_part(folder: Path) -> None:
    for kind in KINDS:
        model = opened(folder, kind)
        model.close()
        for part in (*PARTS.values(), lambda m: m.answer("Hi")):
            assert "load it again" in refuses(functools.partial(part, model), ClosedError)


def test_it_is_closed_by_what_its_generation_calls(folder: Path) -> None:
    model: Any = opened(folder)

    class Closes(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            model.close()
            return scores

    with pytest.raises(AirLLMError):
        model.generate(IDS, max_new_tokens=5, logits_processor=LogitsProcessorList([Closes()]))
    assert model.closed and not model.busy and model._executor is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [part for part in PARTS if part != "its generate"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_it_is_closed_by_what_its_parts_call(folder: Path, kind: str, part: str, place: str) -> None:
    model: Any = opened(folder, kind)
    ends = {"its head": [model.lm_head], "its table": [model.get_input_embeddings()],
            "a layer": [model.model.layers[4].self_attn, model.model.layers[4].mlp.down_proj]}  # fmt: skip
    module = ends.get(part, [model.model.layers[0], model.model.layers[9].mlp])[0 if place == "first" else -1]
    module.register_forward_hook(lambda *_: model.close())
    with contextlib.suppress(AirLLMError), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, about hooks that fail
        within(60, lambda: PARTS[part](model))
    assert model.closed and not model.busy and model._executor is None
    for each in PARTS.values():
        refuses(functools.partial(each, model), ClosedError)


def test_it_is_closed_after_ctrl_c_in_a_part(folder: Path) -> None:
    for kind in KINDS:
        model: Any = opened(folder, kind)
        interrupted(model, model.model)
        within(60, model.close)
        assert not model.busy and model._executor is None
        model = opened(folder, kind)
        interrupted(model, model.model)
        model.close()  # by the thread that was interrupted
        assert not model.busy and model._executor is None


def interrupted(model: Any, part: Any) -> None:
    """Ctrl-C in the middle of a forward of ``part``: no hook is called then."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[3].mlp.down_proj.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        part(IDS)
    hook.remove()


@pytest.mark.parametrize("part", PARTS)
def test_ctrl_c_in_a_part_leaves_nothing_behind(model: Any, resident: Any, part: str) -> None:
    for failed in (model.model, model, model.model):
        interrupted(model, failed)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(PARTS[part](model), PARTS[part](resident))
    assert not model.busy


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_copies_are_refused(model: Any, resident: Any) -> None:
    for call in (copy.copy, copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        assert "cannot be copied" in refuses(lambda call=call: call(model))  # type: ignore[misc]
    for call in (copy.deepcopy, pickle.dumps):
        refuses(lambda call=call: call(model.model))  # type: ignore[misc]
    assert same_logits(model, resident)
