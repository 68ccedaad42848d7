"""Replayed steps give what eager ones give, whatever is asked between them; on a CPU, a tape stands for the graph."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StaticCache

from airllm_nb.config import LoadOptions
from airllm_nb.decode import fixed, fixed_layers, graph, recording, steps
from airllm_nb.engine.facade import StreamedModel
from airllm_nb.errors import GenerationStopped
from airllm_nb.intake import prepare
from airllm_nb.model.device import Budgets
from tests import tiny_models
from tests.tape import on_tape

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = tiny_models.IDS
PADDED = torch.ones(2, 12, dtype=torch.long)
PADDED[0, :5] = 0
PAIR = torch.cat([IDS, IDS.flip(1)])
# Windows of 8 positions in some or all layers, sinks, experts, latents, states; all with positions up to 128.
KINDS = ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3", "phi3",
         "cohere2", "llama4_text", "falcon", "bloom", "glm4", "exaone4", "olmo3", "qwen3_next", "lfm2",
         "bamba"]  # fmt: skip


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape records; fixed caches begin with 16 rows, so that they are outgrown."""
    monkeypatch.setattr(steps, "recorder", lambda device: on_tape)
    monkeypatch.setattr(steps, "SMALLEST", 16)


@contextlib.contextmanager
def opened(folder: Path, **options: Any) -> Iterator[StreamedModel]:
    """Everything on a device, which this CPU stands for."""
    ample = {"vram_budget": "1GiB", "ram_budget": "1GiB", "max_seq_len": 128, "dtype": "float32"}
    prepared = prepare.prepare(folder, LoadOptions.create(**ample, **options))
    with StreamedModel(prepared, tiny_models.MACHINE, Budgets(1 << 30, 1 << 30)) as model:
        yield model


def tokens(model: Any, ids: torch.Tensor = IDS, length: int = 40, **options: Any) -> Any:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": length, "min_new_tokens": length}
    return model.generate(ids, **(settings | {"do_sample": False} | options))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_same_across_windows_and_growth(kind: str, tiny: Callable[[str], Path]) -> None:
    native = tiny_models.resident(tiny(kind))
    with opened(tiny(kind)) as model:
        assert torch.equal(tokens(model), tokens(native))
        # Three records, of 16, 32 and 64 rows, each after two eager steps.
        assert model.trace.replayed == 40 - 1 - 3 * 2
        assert torch.equal(tokens(model, PAIR, attention_mask=PADDED), tokens(native, PAIR, attention_mask=PADDED))
        assert model.trace.replayed > 30
        assert torch.equal(
            tokens(model, PAIR, 20, attention_mask=PADDED), tokens(native, PAIR, 20, attention_mask=PADDED)
        )
        assert model.trace.replayed == 19, "what is recorded serves the next generation too"


@pytest.fixture
def llama(tiny: Callable[[str], Path]) -> Iterator[tuple[StreamedModel, Any]]:
    with opened(tiny("llama")) as model:
        yield model, tiny_models.resident(tiny("llama"))


@pytest.mark.parametrize("options", [
    {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True}, {"use_cache": False},
    {"num_return_sequences": 3, "do_sample": True}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 5},
    {"cache_implementation": "static"}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, {"max_time": 60.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("ids", [IDS, PAIR], ids=["one", "two"])
def test_every_way_of_decoding(llama: tuple[StreamedModel, Any], ids: torch.Tensor, options: dict[str, Any]) -> None:
    if "prompt_lookup_num_tokens" in options and len(ids) > 1:
        return
    found = []
    for model in llama:
        torch.manual_seed(0)
        found.append(tokens(model, ids, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_beams_over_windows_and_states(kind: str, tiny: Callable[[str], Path], options: dict[str, Any]) -> None:
    with opened(tiny(kind)) as model:
        found = []
        for one in (model, tiny_models.resident(tiny(kind))):
            torch.manual_seed(0)
            found.append(tokens(one, PAIR, attention_mask=PADDED, **options))
        assert torch.equal(*found) and model.trace.replayed > 20


def test_what_is_asked_for_beside_tokens(llama: tuple[StreamedModel, Any]) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for more in ({}, {"output_attentions": True}, {"output_hidden_states": True}):
        found, expected = (tokens(model, **wanted, **more) for model in llama)
        assert torch.equal(found.sequences, expected.sequences)
        for name in ("scores", "logits"):
            for one, other in zip(found[name], expected[name], strict=True):
                assert torch.allclose(one, other, atol=1e-4), "each its own, though they came from one place"
        for name in ("attentions", "hidden_states"):
            assert (found.get(name) is None) == (expected.get(name) is None)
            assert llama[0].trace.replayed == 0 or not more


def contents(layer: Any) -> list[torch.Tensor]:
    return [layer.keys, layer.values] if hasattr(layer, "keys") else fixed_layers.states_of(layer)


def same_cache(one: Any, other: Any) -> None:
    assert type(one) is type(other) is DynamicCache
    assert one.get_seq_length() == other.get_seq_length()
    for mine, its in zip(one.layers, other.layers, strict=True):
        assert type(mine) is type(its)
        assert len(contents(mine)) == len(contents(its)) > 0
        for one_state, other_state in zip(contents(mine), contents(its), strict=True):
            assert torch.allclose(one_state, other_state, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next", "lfm2"])
def test_the_cache_that_comes_back_is_an_ordinary_one(kind: str, tiny: Callable[[str], Path]) -> None:
    native = tiny_models.resident(tiny(kind))
    with opened(tiny(kind)) as model:
        caches, answers = [], []
        for one in (model, native):
            first = tokens(one, return_dict_in_generate=True)
            caches.append(first.past_key_values)
            longer = torch.cat([first.sequences, IDS[:, :3]], 1)
            answers.append(tokens(one, longer, 30, past_key_values=first.past_key_values))
        same_cache(*caches)
        assert torch.equal(*answers) and model.trace.replayed > 20
        with torch.no_grad():
            logits = [
                one(IDS[:, :4], past_key_values=cache).logits
                for one, cache in zip((model, native), caches, strict=True)
            ]
        assert torch.allclose(*logits, atol=1e-4)
        tokens(model, IDS.flip(1))
        same_cache(*caches)
        if kind == "llama":
            for cache in caches:
                cache.crop(-60)
            same_cache(*caches)


@pytest.mark.parametrize("made", [
    lambda native: DynamicCache(config=native.config), lambda native: DynamicCache(),
    lambda native: StaticCache(config=native.config, max_cache_len=80),
], ids=["dynamic", "dynamic without a config", "static"])  # fmt: skip
def test_a_cache_of_the_caller(llama: tuple[StreamedModel, Any], made: Callable[[Any], Any]) -> None:
    caches = [made(llama[1]) for _ in llama]
    found = [tokens(model, past_key_values=cache) for model, cache in zip(llama, caches, strict=True)]
    assert torch.equal(*found)
    assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length())


class Between:
    """Calls ``change`` once ``at`` tokens are there."""

    def __init__(self, at: int, change: Callable[[], Any]):
        self.at, self.change = at, change

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == IDS.shape[1] + self.at:
            self.change()
        return scores


def scale(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)


def replace(model: Any) -> None:
    old = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(old.detach() * -1.5, requires_grad=old.requires_grad)


def swap_data(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data * -1.5


def put_in(model: Any) -> None:
    model.model.layers[2].mlp = torch.nn.Sequential(model.model.layers[2].mlp, torch.nn.Hardtanh(-0.1, 0.1))


def hook(model: Any) -> None:
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * -0.5)


def train(model: Any) -> None:
    model.model.layers[0].mlp.train()


@pytest.mark.parametrize("change", [scale, replace, swap_data, put_in, hook, train])
@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_model_that_is_changed_between_tokens(
    tiny: Callable[[str], Path], change: Callable[[Any], None], at: int
) -> None:
    found = []
    with opened(tiny("llama")) as streamed:
        unchanged = tokens(streamed)
        for model in (streamed, tiny_models.resident(tiny("llama"))):
            between = LogitsProcessorList([Between(at, lambda model=model: change(model))])  # type: ignore[misc]
            found.append(tokens(model, logits_processor=between))
            found.append(tokens(model))
        if change is not scale:
            streamed._residence._refuse_to_lose = lambda: None  # type: ignore[method-assign]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert change is train or not torch.equal(found[1], unchanged)


def test_hooks_of_the_user_are_called_at_every_step(llama: tuple[StreamedModel, Any]) -> None:
    model, calls = llama[0], list[int]()
    tokens(model)
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: calls.append(1))
    tokens(model, length=20)
    assert len(calls) == 20 and model.trace.replayed == 0
    handle.remove()
    tokens(model)
    assert model.trace.replayed > 20 and len(calls) == 20


def test_a_switch_that_only_python_reads_is_seen_by_the_next_generation(llama: tuple[StreamedModel, Any]) -> None:
    model, native = llama
    tokens(model)
    for one in llama:
        one.model.layers[0].input_layernorm.variance_epsilon = 0.5
    assert torch.equal(tokens(model), tokens(native)) and model.trace.replayed > 20


def test_adapters_of_peft_come_and_go(llama: tuple[StreamedModel, Any]) -> None:
    peft = pytest.importorskip("peft")
    tokens(llama[0])
    found = []
    for model in llama:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        with_it = tokens(adapted)
        with adapted.disable_adapter():
            without = tokens(adapted)
        found.append((with_it, without, tokens(adapted)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1]) and llama[0].trace.replayed > 20


def test_exact_profiled_and_streamed_models_run_as_ever(tiny: Callable[[str], Path]) -> None:
    for options in ({"exact": True}, {"profiling_mode": True}):
        with opened(tiny("llama"), **options) as model:
            tokens(model)
            assert model.trace.replayed == 0 and model._residence.steps is None
    with tiny_models.streamed(tiny("llama"), max_seq_len=128) as model:
        tokens(model)
        assert model.trace.replayed == 0 and model._residence.steps is None


def test_without_room_steps_run_as_ever(llama: tuple[StreamedModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, native = llama
    monkeypatch.setattr(steps, "POOL", 1 << 30)
    assert torch.equal(tokens(model), tokens(native)) and model.trace.replayed == 0
    monkeypatch.setattr(steps, "POOL", 0)
    assert torch.equal(tokens(model), tokens(native)) and model.trace.replayed > 20
    assert model._residence.steps is not None
    model._residence.budgets = model._residence.budgets._replace(vram=model.plan.device_bytes - model.plan.needs.total)
    assert torch.equal(tokens(model), tokens(native)) and model.trace.replayed == 0
    assert model._residence.steps._graph is None, "its memory is given back"


def test_short_answers_are_not_recorded(llama: tuple[StreamedModel, Any]) -> None:
    assert torch.equal(*(tokens(model, length=steps.FEWEST) for model in llama))
    assert llama[0].trace.replayed == 0


@pytest.mark.parametrize("kind", ["longcat_flash", "gpt_neo", "jetmoe", "mamba2", "zamba2", "rwkv"])
def test_what_cannot_be_recorded_runs_as_ever_and_is_asked_once(
    kind: str, tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "airllm_nb.decode")
    native = tiny_models.resident(tiny(kind))
    with opened(tiny(kind)) as model:
        assert torch.equal(tokens(model), tokens(native)) and torch.equal(tokens(model), tokens(native))
        assert model.trace.replayed == 0
    assert sum("not recorded" in record.message for record in caplog.records) <= 1


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next"])
def test_a_check_that_fails_leaves_the_cache_as_it_was(
    kind: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_CLOSE", -1.0)
    with opened(tiny(kind)) as model:
        native = tiny_models.resident(tiny(kind))
        found, expected = (tokens(one, return_dict_in_generate=True) for one in (model, native))
        assert model.trace.replayed == 0 and torch.equal(found.sequences, expected.sequences)
    for mine, its in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert type(mine) is type(its)
        assert all(torch.equal(one, other) for one, other in zip(contents(mine), contents(its), strict=True))


def test_an_error_while_recording_leaves_all_as_it_was(
    llama: tuple[StreamedModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Callable[[], Any]) -> recording.Recorded:
        run()
        raise RuntimeError("no graph on this device")

    monkeypatch.setattr(steps, "recorder", lambda device: broken)
    llama[0]._residence._build()
    assert torch.equal(*(tokens(model) for model in llama)) and llama[0].trace.replayed == 0


def test_a_stop_is_heard_between_replayed_steps(llama: tuple[StreamedModel, Any]) -> None:
    model, cancel, seen = llama[0], threading.Event(), list[int]()

    class Stream:
        def put(self, value: torch.Tensor) -> None:
            seen.append(value.numel())
            if len(seen) == 20:
                cancel.set()

        def end(self) -> None:
            pass

    tokens(model)
    with pytest.raises(GenerationStopped):
        model.run({"input_ids": IDS, "max_new_tokens": 60, "min_new_tokens": 60, "streamer": Stream()}, cancel)
    assert len(seen) == 20 and model.trace.replayed > 10
    assert torch.equal(tokens(model), tokens(llama[1]))


def test_a_cache_is_lent_once_a_generation(llama: tuple[StreamedModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lent, borrow = list[int](), fixed.FixedCache.borrow
    monkeypatch.setattr(fixed.FixedCache, "borrow", lambda *args: (lent.append(1), borrow(*args))[1])
    for _ in range(3):
        tokens(llama[0])
    assert len(lent) == 2, "the first one is lent when it is recorded"


def test_the_trace_has_a_sweep_a_token(llama: tuple[StreamedModel, Any]) -> None:
    model = llama[0]
    tokens(model)
    tokens(model)
    assert (model.trace.sweeps, model.trace.summary()["replayed"]) == (40, 39)
    assert len(model.trace.sweep_seconds) == 40 and all(seconds > 0 for seconds in model.trace.sweep_seconds)
