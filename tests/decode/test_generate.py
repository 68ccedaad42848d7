"""All that transformers' ``generate`` does equals the same resident; and a model survives its users."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import within
from test_equality import open_in, placed, wanted

from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import StreamedModel, open_model
from airllm_nb.errors import BusyError, ClosedError, PromptError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[1, 70, 90, 33, 60, 70, 90]])
# How the weights get to compute → where they are.
KINDS = {"in place": "ram", "disk": "disk", "device": "gpu|ram|disk"}


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(dtype="float32", num_hidden_layers=10)


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def opened(folder: Path, kind: str = "disk", **options: Any) -> StreamedModel:
    return open_in(folder, KINDS[kind], dtype="float32", **options)


@pytest.fixture(scope="module", params=list(KINDS))
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[StreamedModel]:
    with opened(folder, request.param) as model:
        assert set(placed(model.plan)) == wanted(KINDS[request.param])
        yield model


@pytest.fixture
def streamed(folder: Path) -> Iterator[StreamedModel]:
    with opened(folder) as model:
        yield model


def both(model: StreamedModel, resident: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    kwargs = {"max_new_tokens": 10} | kwargs
    torch.manual_seed(5)
    expected = resident.generate(*args, **kwargs)
    torch.manual_seed(5)
    return model.generate(*args, **kwargs), expected


# ---- transformers' generate ------------------------------------------------------------------------------------------

PLAIN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 40},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several sequences": {"num_return_sequences": 3, "do_sample": True},
    "several beams": {"num_return_sequences": 2, "num_beams": 3},
    "min_new_tokens": {"min_new_tokens": 10},
    "repetition penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[99], [100, 101]]},
    "forced end": {"forced_eos_token_id": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
    "max_length": {"max_length": 15, "max_new_tokens": None},
    "renormalised": {"do_sample": True, "typical_p": 0.8, "renormalize_logits": True},
    "contrasting eos": {"eos_token_id": [2, 77]},
    "prefill chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("kwargs", PLAIN.values(), ids=PLAIN)
def test_the_same_tokens(model: StreamedModel, resident: Any, kwargs: dict[str, Any]) -> None:
    got, expected = both(model, resident, IDS, **kwargs)
    assert got.equal(expected)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_same_scores_and_states(model: StreamedModel, resident: Any, num_beams: int) -> None:
    got, expected = both(
        model, resident, IDS, return_dict_in_generate=True, output_scores=True, output_logits=True,
        output_hidden_states=True, num_beams=num_beams,
    )  # fmt: skip
    assert type(got) is type(expected)
    assert got.sequences.equal(expected.sequences)
    for mine, theirs in zip((*got.scores, *got.logits), (*expected.scores, *expected.logits), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    for mine, theirs in zip(sum(got.hidden_states, ()), sum(expected.hidden_states, ()), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_batch_with_left_padding_equals_each_prompt_alone(model: StreamedModel, resident: Any) -> None:
    prompts = [[1, 70, 90, 33, 60], [1, 71], [1, 80, 81, 82]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    got, expected = both(model, resident, ids, attention_mask=mask)
    assert got.equal(expected)
    for row, prompt in zip(got, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=10)
        assert row[width:].tolist()[: alone.shape[-1] - len(prompt)] == alone[0, len(prompt) :].tolist()


def test_a_streamer_sees_the_text(model: StreamedModel, resident: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    resident.generate(IDS, max_new_tokens=10, streamer=TextStreamer(model.tokenizer, skip_prompt=True))
    expected = capsys.readouterr().out
    model.generate(IDS, max_new_tokens=10, streamer=TextStreamer(model.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == expected != ""


def test_stopping_criteria_and_logits_processors_are_asked(model: StreamedModel, resident: Any) -> None:
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    class OnlyEven(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, 1::2] = -float("inf")
            return scores

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[-1] >= IDS.shape[-1] + 4)

    got, expected = both(
        model, resident, IDS,
        logits_processor=LogitsProcessorList([OnlyEven()]), stopping_criteria=StoppingCriteriaList([AfterFour()]),
    )  # fmt: skip
    assert got.equal(expected)
    assert got.shape[-1] == IDS.shape[-1] + 4
    assert not (got[:, IDS.shape[-1] :] % 2).any()


def test_stop_strings(model: StreamedModel, resident: Any) -> None:
    free = resident.generate(IDS, max_new_tokens=10)
    stop = model.tokenizer.decode(free[0, IDS.shape[-1] + 3 : IDS.shape[-1] + 5])
    got, expected = both(model, resident, IDS, stop_strings=[stop], tokenizer=model.tokenizer)
    assert got.equal(expected)


@pytest.mark.parametrize("draft", ["native", "streamed", "itself"])
def test_an_assistant_changes_no_token(
    model: StreamedModel, resident: Any, tiny_llama: Callable[..., Path], draft: str
) -> None:
    from transformers import AutoModelForCausalLM

    small = tiny_llama(dtype="float32", num_hidden_layers=2, seed=4)
    expected = resident.generate(IDS, max_new_tokens=16)
    if draft == "native":
        assistant = AutoModelForCausalLM.from_pretrained(small, dtype="float32").eval()
        assert model.generate(IDS, max_new_tokens=16, assistant_model=assistant).equal(expected)
    elif draft == "itself":
        assert model.generate(IDS, max_new_tokens=16, assistant_model=resident).equal(expected)
    else:
        with opened(small, "in place") as assistant:
            assert model.generate(IDS, max_new_tokens=16, assistant_model=assistant).equal(expected)
            assert assistant.generate(IDS, max_new_tokens=4).shape[-1] == IDS.shape[-1] + 4


def test_embeddings_as_input(model: StreamedModel, resident: Any) -> None:
    embeds = resident.get_input_embeddings()(IDS).detach()
    got, expected = both(model, resident, inputs_embeds=embeds)
    assert got.equal(expected)


def test_a_cache_goes_on_where_it_ended(model: StreamedModel, resident: Any) -> None:
    from transformers import DynamicCache

    whole = resident.generate(IDS, max_new_tokens=10, min_new_tokens=10)
    cache = DynamicCache(config=model.config)
    first = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, past_key_values=cache)
    assert model.generate(first, max_new_tokens=5, min_new_tokens=5, past_key_values=cache).equal(whole)


def test_input_ids_by_name_and_a_generation_config(model: StreamedModel, resident: Any) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
    expected = resident.generate(IDS, generation_config=config)
    assert model.generate(input_ids=IDS, generation_config=config).equal(expected)
    encoded = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert model.generate(**encoded, generation_config=config).equal(expected)


def test_a_forward_gives_what_the_native_class_gives(model: StreamedModel, resident: Any) -> None:
    with torch.inference_mode():
        expected = resident(IDS, labels=IDS, output_hidden_states=True)
    got = model(IDS, labels=IDS, output_hidden_states=True)
    assert type(got) is type(expected)
    torch.testing.assert_close(got.loss, expected.loss)
    assert len(got.hidden_states) == len(expected.hidden_states)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected.logits, atol=1e-5, rtol=0)


def test_a_longer_generation_than_planned_is_planned_again(folder: Path, resident: Any) -> None:
    with open_model(folder, LoadOptions.create(dtype="float32", max_seq_len=16, vram_budget=3 << 19)) as model:
        planned = model.plan.needs.kv_cache
        assert model.generate(IDS, max_new_tokens=6).equal(resident.generate(IDS, max_new_tokens=6))
        expected = resident.generate(IDS, max_new_tokens=6, num_beams=5)
        assert model.generate(IDS, max_new_tokens=6, num_beams=5).equal(expected)
        assert model.plan.needs.kv_cache > planned


def test_a_model_opened_and_used_in_inference_mode_is_the_same(folder: Path, resident: Any) -> None:
    expected = resident.generate(IDS, max_new_tokens=5)
    for kind in KINDS:
        with torch.inference_mode(), opened(folder, kind) as model:
            assert model.generate(IDS, max_new_tokens=5).equal(expected)
            within(120, lambda model=model: model.generate(IDS, max_new_tokens=5))


def test_every_sweep_is_counted_in_the_trace(model: StreamedModel) -> None:
    model.generate(IDS, max_new_tokens=7, min_new_tokens=7)
    summary = model.trace.summary()
    assert summary["sweeps"] == 7
    assert summary["stages"]["compute"]["count"] >= 7
    from_disk = placed(model.plan)["disk"]
    # The last sweep reads ahead for one that never comes, and the first finds what an earlier one has read.
    assert 6 * from_disk <= summary["stages"]["read"]["count"] <= 8 * from_disk


# ---- text in, text out -----------------------------------------------------------------------------------------------


def test_chunks_join_to_the_answer(model: StreamedModel) -> None:
    generation = model.stream("Hello there", max_new_tokens=20, do_sample=False)
    chunks = list(generation)
    result = generation.result
    assert "".join(chunk.text for chunk in chunks) == result.text == str(result)
    assert [token for chunk in chunks for token in chunk.token_ids] == list(result.token_ids)
    assert result.prompt == "Hello there"
    assert result.prompt_tokens == len(model.tokenizer("Hello there").input_ids)
    assert [chunk.tokens for chunk in chunks] == sorted(chunk.tokens for chunk in chunks)
    assert result.text == model.tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert model.answer("Hello there", max_new_tokens=20, do_sample=False).token_ids == result.token_ids


def test_a_chat_goes_through_the_template(model: StreamedModel) -> None:
    result = model.answer([{"role": "user", "content": "Hi"}], max_new_tokens=3, do_sample=False)
    assert result.prompt == "user: Hi\nassistant:"
    assert result.token_ids == model.answer("user: Hi\nassistant:", max_new_tokens=3, do_sample=False).token_ids


def test_a_full_context_is_not_the_length_that_was_asked_for(tiny_llama: Any) -> None:
    with open_model(tiny_llama(eos_token_id=None), LoadOptions.create(max_seq_len=24)) as model:
        prompt = model.tokenizer("Hello").input_ids
        for wanted, stopped_by in ((500, "context"), (24 - len(prompt), "length")):
            result = model.answer("Hello", max_new_tokens=wanted)
            assert len(result.token_ids) == 24 - len(prompt) and result.stopped_by == stopped_by
    assert result.ended == "ended by the length (-n)"


def test_why_it_stopped(streamed: StreamedModel) -> None:
    by_length = streamed.answer("Hello", max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert by_length.stopped_by == "length"
    end = by_length.token_ids[2]
    by_end = streamed.answer("Hello", max_new_tokens=8, do_sample=False, eos_token_id=end)
    assert by_end.stopped_by == "end"
    with streamed.stream("Hello", max_new_tokens=60, min_new_tokens=60) as generation:
        next(generation)
        generation.stop()
        list(generation)
    assert generation.result.stopped_by == "user"


class Script:
    """Stands in for a model: says given text, byte by byte, through the tokenizer of a real one."""

    def __init__(self, tokenizer: Any, text: str, error: BaseException | None = None):
        self.tokenizer, self._ids, self._error = tokenizer, tokenizer(text).input_ids, error
        from airllm_nb.trace import Trace

        self.trace = Trace()

    def run(self, kwargs: dict[str, Any], cancel: threading.Event) -> None:
        streamer = kwargs["streamer"]
        streamer.put(kwargs["input_ids"])
        for token in self._ids:
            streamer.put(torch.tensor([token]))
            if cancel.is_set():
                break
        if self._error is not None:
            raise self._error
        streamer.end()


def said(model: StreamedModel, text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], Any]:
    from airllm_nb.decode.generate import Generation

    generation = Generation(Script(model.tokenizer, text), "", {"input_ids": IDS, "max_new_tokens": 999}, stops)
    return [chunk.text for chunk in generation], generation.result


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語の文", "👩‍👩‍👧 family", "a\n\n  b\tc", "é" * 50, "🇫🇷🇩🇪", "plain", "�x"]
)
def test_characters_that_take_several_tokens_come_whole(streamed: StreamedModel, text: str) -> None:
    pieces, result = said(streamed, text)
    assert result.text == text
    assert "".join(pieces) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("one ST two", ("STOP",), "one ST two"),
        ("one ST", ("STOP",), "one ST"),
        ("aabaac", ("aac",), "aab"),
        ("x日本y", ("本",), "x日"),
        ("one two three", ("three", "two"), "one "),
        ("STOP", ("STOP",), ""),
        ("S S S STO STOP", ("STOP",), "S S S STO "),
        ("abc", (), "abc"),
        ("one\n\ntwo", ("\n\n",), "one"),
    ],
)
def test_stop_strings_are_cut_off(streamed: StreamedModel, text: str, stops: tuple[str, ...], expected: str) -> None:
    pieces, result = said(streamed, text, stops)
    assert "".join(pieces) == result.text == expected


def test_an_unfinished_character_at_the_end_is_kept(streamed: StreamedModel) -> None:
    from airllm_nb.decode.generate import Generation

    script = Script(streamed.tokenizer, "ab日")
    script._ids = script._ids[:-1]
    generation = Generation(script, "", {"input_ids": IDS})
    assert "".join(chunk.text for chunk in generation) == generation.result.text == "ab�"


def test_a_stop_string_ends_a_real_generation(streamed: StreamedModel) -> None:
    letters = streamed.tokenizer("abcdefghijklmnop").input_ids
    options = {"max_new_tokens": 30, "do_sample": False, "prefix_allowed_tokens_fn": lambda *_: letters}
    free = streamed.answer("Hello", **options)
    stop = free.text[4:7]
    cut = streamed.answer("Hello", stop=stop, **options)
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.stopped_by == "end"
    assert len(cut.token_ids) < 30


# ---- users who leave, interrupt, and do two things at once -----------------------------------------------------------


@pytest.fixture
def expected(resident: Any) -> torch.Tensor:
    return resident.generate(IDS, max_new_tokens=10)


def test_leaving_early_leaves_the_model_usable(streamed: StreamedModel, expected: torch.Tensor) -> None:
    with streamed.stream("Hello", max_new_tokens=100, min_new_tokens=100) as generation:
        next(generation)
    assert not streamed.busy
    assert generation.result.stopped_by == "user"
    assert len(generation.result.token_ids) < 100
    assert list(generation) == []
    generation.close()
    assert streamed.generate(IDS, max_new_tokens=10).equal(expected)


def test_a_generation_that_nobody_iterates_starts_nothing(streamed: StreamedModel, expected: torch.Tensor) -> None:
    generation = streamed.stream("Hello", max_new_tokens=100)
    assert not streamed.busy
    generation.close()
    assert generation.result.token_ids == ()
    assert streamed.generate(IDS, max_new_tokens=10).equal(expected)


def test_an_abandoned_generation_ends(streamed: StreamedModel, expected: torch.Tensor) -> None:
    generation = streamed.stream("Hello", max_new_tokens=110, min_new_tokens=110)
    next(generation)
    del generation
    gc.collect()
    wait_until(lambda: not streamed.busy)
    assert streamed.generate(IDS, max_new_tokens=10).equal(expected)


def test_a_second_generation_is_refused_while_one_runs(streamed: StreamedModel) -> None:
    with streamed.stream("Hello", max_new_tokens=110, min_new_tokens=110) as generation:
        next(generation)
        for attempt in (lambda: streamed.generate(IDS), lambda: streamed(IDS), lambda: streamed.answer("Hi")):
            with pytest.raises(BusyError, match="generating already"):
                attempt()
        assert streamed.busy
        next(generation)
    assert not streamed.busy


def test_a_refused_generation_does_not_stop_the_running_one(streamed: StreamedModel) -> None:
    whole = streamed.answer("Hello", max_new_tokens=60, min_new_tokens=60, do_sample=False)
    generation = streamed.stream("Hello", max_new_tokens=60, min_new_tokens=60, do_sample=False)
    next(generation)
    second = streamed.stream("Hi")
    with pytest.raises(BusyError):
        next(second)
    second.close()
    del second
    gc.collect()
    list(generation)
    assert generation.result.token_ids == whole.token_ids


def test_an_error_in_the_worker_is_raised_in_the_caller(streamed: StreamedModel, expected: torch.Tensor) -> None:
    def breaks(batch: int, ids: torch.Tensor) -> list[int]:
        raise ZeroDivisionError("a user's own callback")

    generation = streamed.stream("Hello", prefix_allowed_tokens_fn=breaks)
    with pytest.raises(ZeroDivisionError, match="own callback"):
        list(generation)
    assert generation.result is not None
    assert not streamed.busy
    assert streamed.generate(IDS, max_new_tokens=10).equal(expected)


def test_unknown_generate_options_are_refused(streamed: StreamedModel, expected: torch.Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match="max_tokens"):
        streamed.generate(IDS, max_tokens=3)
    assert streamed.generate(IDS, max_new_tokens=10).equal(expected)


def test_stop_from_another_thread_ends_a_generate(streamed: StreamedModel, expected: torch.Tensor) -> None:
    from airllm_nb.errors import GenerationStopped

    def stop_soon() -> None:
        wait_until(lambda: streamed.trace.sweeps > 2)
        streamed.stop()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    with pytest.raises(GenerationStopped):
        streamed.generate(IDS, max_new_tokens=110, min_new_tokens=110)
    thread.join()
    assert streamed.generate(IDS, max_new_tokens=10).equal(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_while_another_thread_generates(folder: Path, kind: str) -> None:
    model, outcome = opened(folder, kind), []

    def generate() -> None:
        try:
            outcome.append(model.generate(IDS, max_new_tokens=115, min_new_tokens=115))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    wait_until(lambda: model.trace.sweeps > 1)
    within(120, model.close)
    thread.join(120)
    assert not thread.is_alive()
    assert isinstance(outcome[0], Exception) or outcome[0].shape[-1] == IDS.shape[-1] + 115
    assert model.closed and not model.busy
    with pytest.raises(ClosedError):
        model.generate(IDS)


def test_closing_while_a_stream_is_open_ends_it(folder: Path) -> None:
    model = opened(folder)
    generation = model.stream("Hello", max_new_tokens=110, min_new_tokens=110)
    next(generation)
    within(120, model.close)
    within(120, lambda: list(generation))
    assert generation.result.stopped_by == "user"


def test_a_closed_model_says_so(folder: Path) -> None:
    model = opened(folder)
    model.tokenizer  # noqa: B018 - loaded on first use, needed below
    model.close()
    model.close()
    assert model.closed
    assert "closed" in repr(model)
    assert model.status()["closed"]
    for attempt in (lambda: model.generate(IDS), lambda: model(IDS), lambda: model.answer("Hi")):
        with pytest.raises(ClosedError, match="load it again"):
            attempt()
    model.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_in_the_middle_leaves_the_model_usable(folder: Path, kind: str, expected: torch.Tensor) -> None:
    with opened(folder, kind) as model:
        for number in range(5):

            def interrupt(number: int = number) -> None:
                wait_until(lambda: model.busy and model.trace.sweeps > number)
                os.kill(os.getpid(), signal.SIGINT)

            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                while True:
                    model.generate(IDS, max_new_tokens=115, min_new_tokens=115)
            thread.join()
            assert not model.busy
            assert within(120, lambda: model.generate(IDS, max_new_tokens=10)).equal(expected)


def test_ctrl_c_while_streaming_leaves_the_model_usable(streamed: StreamedModel, expected: torch.Tensor) -> None:
    with pytest.raises(KeyboardInterrupt), streamed.stream("Hello", max_new_tokens=110, min_new_tokens=110) as chunks:
        for _ in chunks:
            signal.raise_signal(signal.SIGINT)
    assert not streamed.busy
    assert streamed.generate(IDS, max_new_tokens=10).equal(expected)


def test_no_thread_and_no_file_is_left(folder: Path) -> None:
    gc.collect()
    threads, files = threading.active_count(), open_files()
    for cycle in range(20):
        with opened(folder, list(KINDS)[cycle % 3]) as model:
            model.generate(IDS, max_new_tokens=2)
    gc.collect()
    wait_until(lambda: threading.active_count() <= threads)
    assert open_files() <= files


def test_no_mapping_of_the_checkpoint_is_left(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama(dtype="float32", seed=77)
    model = opened(folder, "in place")
    model.generate(IDS, max_new_tokens=2)
    assert str(folder) in Path("/proc/self/maps").read_text()
    model.close()
    del model
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("prompt", ["", "   ", []])
def test_an_empty_prompt_is_refused(streamed: StreamedModel, prompt: Any) -> None:
    with pytest.raises(PromptError, match="prompt is empty"):
        streamed.stream(prompt)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_stop_is_heard_where_no_unit_is_followed(tiny_llama, monkeypatch):
    """On a GPU that holds the whole model no unit has a hook; the sweep itself has."""
    from airllm_nb import AutoModel
    from airllm_nb.model.executor import Executor

    monkeypatch.setattr(Executor, "_time", lambda self, unit, feed: None)
    path = tiny_llama(eos_token_id=None, max_position_embeddings=20_000)
    with AutoModel.from_pretrained(path, vram_budget="1GiB") as model:
        assert set(model.plan.tiers) == {"gpu"}
        generation = model.stream("hello", max_new_tokens=10_000)
        for chunk in generation:
            assert model.position[0] == 0
            if chunk.tokens >= 5:
                generation.stop()
        assert 5 <= len(generation.result.token_ids) < 10_000 and generation.result.stopped_by == "user"
