"""The VRAM budget is kept for every prompt, and a model survives that others take the memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessorList

from airllm_nb.config import LoadOptions, format_bytes
from airllm_nb.decode.prompt import prompt_shape
from airllm_nb.engine import residence
from airllm_nb.engine.facade import StreamedModel, open_model, plan_model
from airllm_nb.errors import BudgetError
from airllm_nb.intake import planning, prepare
from airllm_nb.model import device
from airllm_nb.plan.needs import activation_bytes
from airllm_nb.plan.work import Work, choose_chunk

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK, LENGTH = 32, 160


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(dtype="float32", num_hidden_layers=10, eos_token_id=None)


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def ids(tokens: int = 100, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def smallest_for(folder: Path, tokens: int, **options: Any) -> int:
    """The VRAM budget that leaves the link its arena with ``tokens`` of a prompt at a time."""
    prepared = prepare.prepare(folder, LoadOptions.create(dtype="float32", **options))
    return planning.needs(prepared, prepared.planned, tokens).total + planning._arenas(prepared.sizes)[0]


def opened(folder: Path, tokens: int = CHUNK, spare: int = 0, **options: Any) -> StreamedModel:
    """A model that has room for ``tokens`` of a prompt at a time, in plans of ``LENGTH`` tokens."""
    options = {"max_seq_len": LENGTH} | options
    budget = smallest_for(folder, tokens, **options) + spare
    return open_model(folder, LoadOptions.create(dtype="float32", vram_budget=budget, **options))


@pytest.fixture
def model(folder: Path) -> Iterator[StreamedModel]:
    with opened(folder) as model:
        yield model


@pytest.fixture
def forwards(model: StreamedModel) -> list[int]:
    """The new tokens of each forward from now on."""
    return watched(model)


def watched(model: StreamedModel) -> list[int]:
    seen: list[int] = []
    model.native.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(prompt_shape(dict(zip(["input_ids"], args, strict=False)) | kwargs)[1]),
        with_kwargs=True,
    )
    return seen


# ---- the decision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (1000 + 300, 1000),  # whole, with a comfortable arena
        (512 + 300, 512),
        (1000 + 299, 512),  # fewer sweeps with a smaller arena come after a comfortable arena
        (32 + 300, 32),
        (32 + 299, 128),  # no chunk leaves the comfortable arena
        (1000 + 100, 512),
        (32 + 100, 32),
        (32 + 99, None),
    ],
)
def test_as_few_chunks_as_fit(room: int, expected: int | None) -> None:
    assert choose_chunk(Work(2000, 1, 1000).sizes, lambda tokens: tokens, room, (300, 100)) == expected


def test_sizes_of_chunks() -> None:
    assert Work(200, 1, 100).sizes == [100, 64, 32]
    assert Work(200, 1, 64).sizes == [64, 32]
    assert Work(200, 1, 20).sizes == [20]
    assert Work(200, 1, 100, whole="use_cache=False").sizes == [100]
    assert Work(200, 1, 100, chunk=7).sizes == [7]
    assert Work(200, 1, 5, chunk=7).sizes == [5]


def test_activations_count_logits_masks_and_scores() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=1000
    )

    def needed(tokens: int, **more: Any) -> int:
        return activation_bytes(config, tokens, 1, 2, length=512, **more)

    assert needed(512, logits=512) - needed(512) >= 511 * 1000 * (2 + 4)
    assert needed(512, logits=512, loss=True) - needed(512, logits=512) >= 511 * 1000 * 8
    assert needed(256, masked=True) - needed(256) >= 256 * 512 * 3
    assert needed(256, eager=True) - needed(256, masked=True) >= 4 * 256 * 512 * 8
    assert needed(256) < needed(512)
    assert activation_bytes(config, 256, 3, 2, length=512) == 3 * needed(256)


# ---- prompts in chunks -----------------------------------------------------------------------------------------------


def test_a_tiny_budget_opens_with_a_chunk_and_names_the_smallest(folder: Path) -> None:
    for tokens in (CHUNK, 64, LENGTH):
        with opened(folder, tokens) as model:
            assert model._residence.make_room(model._prepared.planned) == tokens
            assert model.plan.device_bytes <= model.plan.vram_budget
    with pytest.raises(BudgetError, match="smallest that works is") as refusal:
        plan_model(folder, LoadOptions.create(dtype="float32", vram_budget="200KiB", max_seq_len=LENGTH))
    smallest = str(refusal.value).split("smallest that works is ")[1].split()[0]
    with open_model(folder, LoadOptions.create(dtype="float32", vram_budget=smallest, max_seq_len=LENGTH)) as model:
        assert model.generate(ids(), max_new_tokens=2).shape == (1, 102)


def padded(batch: int = 3) -> dict[str, torch.Tensor]:
    inputs, mask = ids(80, batch), torch.ones(batch, 80, dtype=torch.long)
    for row, pads in enumerate((40, 0, 7)[:batch]):
        inputs[row, :pads] = mask[row, :pads] = 0
    return {"input_ids": inputs, "attention_mask": mask}


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"input_ids": ids()},
    "left padding": padded(),
    "beams": {"input_ids": ids(), "num_beams": 3},
    "beams of a padded batch": {**padded(2), "num_beams": 2},
    "sampling": {"input_ids": ids(), "do_sample": True, "top_p": 0.9},
    "several sequences": {"input_ids": ids(), "do_sample": True, "num_return_sequences": 2},
    "static cache": {"input_ids": ids(), "cache_implementation": "static"},
    "a config": {"input_ids": ids(), "generation_config": GenerationConfig(max_new_tokens=8, do_sample=False)},
}


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_chunks_give_the_same_tokens(folder: Path, resident: Any, kwargs: dict[str, Any]) -> None:
    kwargs = {"attention_mask": torch.ones_like(kwargs["input_ids"])} | kwargs
    if "generation_config" not in kwargs:
        kwargs |= {"max_new_tokens": 8, "min_new_tokens": 8}
    torch.manual_seed(5)
    expected = resident.generate(**kwargs)
    rows, tokens = kwargs["input_ids"].shape
    rows *= max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
    with opened(folder, max_seq_len=tokens + 8, batch_size=rows) as model:
        forwards, executor = watched(model), model._executor
        torch.manual_seed(5)
        assert model.generate(**kwargs).equal(expected)
        assert max(forwards) == CHUNK
        assert model._executor is executor, "what was planned for is there"


def test_a_chunk_computes_one_row_of_logits(model: StreamedModel) -> None:
    shapes: list[Any] = []
    model.native.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.logits.shape[:2])))
    model.generate(ids(), max_new_tokens=2)
    assert set(shapes) == {(1, 1)}


def test_a_stream_is_cut_too(model: StreamedModel, resident: Any, forwards: list[int]) -> None:
    inputs = model.tokenizer("x" * 100, return_tensors="pt").input_ids
    expected = resident.generate(inputs, max_new_tokens=6, do_sample=False)[0, inputs.shape[1] :]
    assert list(model.answer("x" * 100, max_new_tokens=6, do_sample=False).token_ids) == expected.tolist()
    assert 1 < max(forwards) < 100


def test_a_prompt_as_short_as_a_chunk_is_not_cut(folder: Path) -> None:
    with opened(folder, max_seq_len=48) as model:
        forwards = watched(model)
        model.generate(ids(CHUNK), max_new_tokens=16)
        assert forwards == [CHUNK] + 15 * [1]
        forwards.clear()
        model.generate(ids(47), max_new_tokens=1)
        assert forwards == [CHUNK, 47 - CHUNK]


def test_the_callers_own_chunk_is_kept(folder: Path, resident: Any) -> None:
    expected = resident.generate(ids(), max_new_tokens=4, do_sample=False)
    with opened(folder, 64) as model:
        forwards = watched(model)
        assert model.generate(ids(), max_new_tokens=4, do_sample=False, prefill_chunk_size=20).equal(expected)
        config = GenerationConfig(max_new_tokens=4, do_sample=False, prefill_chunk_size=20)
        assert model.generate(ids(), generation_config=config).equal(expected)
        assert max(forwards) == 20
    with opened(folder) as model, pytest.raises(BudgetError):
        # It counts: so many tokens at a time are refused where so few fit.
        model.generate(ids(140), max_new_tokens=4, num_beams=8, prefill_chunk_size=139)


WHOLE: dict[str, dict[str, Any]] = {
    "use_cache=False": {"use_cache": False},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "output_hidden_states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("reason", WHOLE)
def test_what_cannot_be_cut_is_whole_or_refused(folder: Path, resident: Any, reason: str) -> None:
    expected = resident.generate(ids(), max_new_tokens=6, do_sample=False)
    call = {"max_new_tokens": 6, "do_sample": False, **WHOLE[reason]}
    with opened(folder, spare=2 << 20) as model:
        forwards = watched(model)
        assert model.generate(ids(), **call).equal(expected)
        assert max(forwards) >= 100
    with opened(folder) as model:
        with pytest.raises(BudgetError, match=f"in one piece because of {reason}; shorten it"):
            model.generate(ids(140), **call)
        assert model.generate(ids(), max_new_tokens=6, do_sample=False).equal(expected)


def test_embeddings_and_assistants_are_whole(folder: Path, resident: Any) -> None:
    expected = resident.generate(ids(), max_new_tokens=6, do_sample=False)
    embeds = resident.get_input_embeddings()(ids()).detach()
    with opened(folder, spare=2 << 20) as model:
        got = model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
        assert got.equal(expected[:, 100:])
        assert model.generate(ids(), max_new_tokens=6, do_sample=False, assistant_model=resident).equal(expected)
    with opened(folder) as model, pytest.raises(BudgetError, match="because of inputs_embeds"):
        model.generate(inputs_embeds=embeds.repeat(1, 2, 1), max_new_tokens=6)


def test_a_cache_that_is_given(folder: Path, resident: Any) -> None:
    expected = resident.generate(ids(), max_new_tokens=10, do_sample=False)
    with opened(folder, spare=1 << 20) as model:
        forwards = watched(model)
        cache = DynamicCache(config=model.config)
        first = model.generate(ids(), max_new_tokens=5, do_sample=False, past_key_values=cache)
        assert model.generate(first, max_new_tokens=5, do_sample=False, past_key_values=cache).equal(expected)
        head = DynamicCache(config=model.config)
        model.native.generation_config.use_cache = True
        model(ids()[:, :20], past_key_values=head)
        assert model.generate(ids(), max_new_tokens=10, do_sample=False, past_key_values=head).equal(expected)
        assert forwards


def test_a_plan_is_made_again_only_for_what_does_not_fit(folder: Path) -> None:
    with opened(folder, 64) as model:
        executor = model._executor
        model.generate(ids(150), max_new_tokens=4)
        model.generate(ids(20, 4), attention_mask=torch.ones(4, 20), max_new_tokens=4)
        assert model._executor is executor
    with opened(folder, spare=4 << 20) as model:
        planned = model.plan.needs.kv_cache
        model.generate(ids(100, 3), attention_mask=torch.ones(3, 100), max_new_tokens=20, min_new_tokens=20)
        assert planned * 360 == model.plan.needs.kv_cache * LENGTH
        assert model.plan.device_bytes <= model.plan.vram_budget


# ---- architectures ---------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 260, "num_attention_heads": 4, "intermediate_size": 128,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8}
CUT: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 260},
    "gemma3_text": {**SMALL, "head_dim": 16, "sliding_window": 8},
    "mistral": {**SMALL, "sliding_window": 8},
    "gpt_oss": {**SMALL, "head_dim": 16, "sliding_window": 8, "num_local_experts": 4},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": 260},
    "bamba": {**SMALL, **MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**SMALL, **MAMBA, "mamba_d_head": 16, "mamba_d_ssm": 64, "head_dim": 16},
    "granitemoehybrid": {**SMALL, **MAMBA, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 2,
                         "shared_intermediate_size": 64},
    "nemotron_h": {**SMALL, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
                   "hybrid_override_pattern": "M-*M", "head_dim": 16},
    "olmo_hybrid": {**SMALL, "num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_5_moe_text": {**SMALL, **LINEAR, **EXPERTS, "head_dim": 16},
    "qwen3_5_text": {**SMALL, **LINEAR, "head_dim": 16},
    "qwen3_next": {**SMALL, **LINEAR, **EXPERTS, "head_dim": 16},
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
NOT_CUT: dict[str, dict[str, Any]] = {
    "jamba": {**SMALL, "use_mamba_kernels": False, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
              "num_experts": 2},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 260, "state_size": 8},
    "minimax": {**SMALL, "head_dim": 16, "num_local_experts": 2, "block_size": 8},
    "phi3": {**SMALL, "original_max_position_embeddings": 16, "rope_scaling": {"type": "longrope", **LONGROPE}},
}  # fmt: skip


def saved(kind: str, config: dict[str, Any], folder: Path) -> Any:
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    native = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config, **tokens), dtype=torch.float32)
    for parameter in native.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that what is far away counts
    native.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.mark.parametrize("kind", CUT)
def test_architectures_say_the_same_in_chunks(kind: str, tmp_path: Path) -> None:
    native = saved(kind, CUT[kind], tmp_path)
    for inputs in ({"input_ids": ids(80)}, padded(2)):
        call: dict[str, Any] = {**inputs, "max_new_tokens": 6, "do_sample": False}
        with opened(tmp_path, max_seq_len=86, batch_size=len(inputs["input_ids"])) as model:
            forwards = watched(model)
            assert model.generate(**call).equal(native.generate(**call))
            assert max(forwards) == CHUNK


@pytest.mark.parametrize("kind", NOT_CUT)
def test_architectures_that_forget_between_chunks_are_whole(kind: str, tmp_path: Path) -> None:
    expected = saved(kind, NOT_CUT[kind], tmp_path).generate(ids(90), max_new_tokens=6, do_sample=False)
    with opened(tmp_path, spare=2 << 20) as model:
        forwards = watched(model)
        assert model.generate(ids(90), max_new_tokens=6, do_sample=False).equal(expected)
        assert max(forwards) == 90
    with opened(tmp_path) as model, pytest.raises(BudgetError, match="in one piece because of"):
        model.generate(ids(158).repeat(4, 1), max_new_tokens=1)


# ---- direct calls ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tiny_llama: Callable[..., Path]) -> Path:
    """A vocabulary beside which everything else is small."""
    return tiny_llama(dtype="float32", vocab_size=20_000)


def test_a_direct_call_has_room_for_all_its_logits(wide: Path) -> None:
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(wide, dtype="float32").eval()(ids(140), labels=ids(140))
    logits = 140 * 20_000 * 4
    with opened(wide) as model:
        with pytest.raises(BudgetError, match=r"smallest that works is.*give logits_to_keep=1") as refusal:
            model(ids(140))
        last = model(ids(64), logits_to_keep=1).logits
        torch.testing.assert_close(last, model(ids(64), logits_to_keep=torch.tensor([63])).logits)
        assert last.shape == (1, 1, 20_000)
    smallest = str(refusal.value).split("smallest that works is ")[1].split()[0]
    with open_model(wide, LoadOptions.create(dtype="float32", vram_budget=smallest, max_seq_len=LENGTH)) as model:
        torch.testing.assert_close(model(ids(140)).logits, expected.logits, atol=1e-5, rtol=0)
        assert model.plan.needs.activations > 2 * logits
        with pytest.raises(BudgetError, match="logits_to_keep"):
            model(ids(140), labels=ids(140))
        assert model.generate(ids(20), max_new_tokens=4).shape == (1, 24)
    with opened(wide, spare=6 * logits) as model:
        torch.testing.assert_close(model(ids(140), labels=ids(140)).loss, expected.loss)
        assert model.plan.needs.activations > 4 * logits


# ---- out of memory ---------------------------------------------------------------------------------------------------


class OutOfMemory:
    """A hook that raises at the calls named, counted from 0; ``None`` is every call."""

    def __init__(self, *calls: int | None):
        self.calls, self.count = calls, 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.count += 1
        if None in self.calls or self.count - 1 in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 23 MiB free.")


def short_of_memory(model: StreamedModel, *calls: int | None) -> Any:
    """The sixth layer runs out of memory at these forwards."""
    return model.native.model.layers[5].mlp.register_forward_pre_hook(OutOfMemory(*calls))


@pytest.fixture
def roomy(folder: Path) -> Iterator[StreamedModel]:
    with opened(folder, LENGTH, spare=1 << 20) as model:
        assert {"gpu", "ram"} <= set(model.plan.tiers)
        yield model


def shrank(model: StreamedModel, before: int, caplog: pytest.LogCaptureFixture) -> None:
    after = before - before // 8
    assert model.plan.vram_budget == after
    assert model.plan.device_bytes <= after
    assert model.status()["shrunk_from"] == before
    warnings = [record.getMessage() for record in caplog.records if record.name == "airllm_nb.engine.residence"]
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert f"{format_bytes(after)} instead of {format_bytes(before)}" in warnings[0]


@pytest.mark.parametrize("failing", [0, 1, 2, 7], ids=["prefill", "first token", "third token", "last token"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_generation_survives(
    roomy: StreamedModel, resident: Any, caplog: pytest.LogCaptureFixture, failing: int, sampled: bool
) -> None:
    call: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": sampled}
    torch.manual_seed(3)
    expected, after = resident.generate(ids(), **call), torch.rand(1)
    before = roomy.plan.vram_budget
    short_of_memory(roomy, failing)
    torch.manual_seed(3)
    assert roomy.generate(ids(), **call).equal(expected)
    assert torch.rand(1).equal(after), "as many random numbers were drawn"
    shrank(roomy, before, caplog)
    assert roomy.trace.sweeps == 8
    assert roomy.generate(ids(), max_new_tokens=8, do_sample=False).shape == (1, 108)
    assert roomy.plan.vram_budget < before, "for good"


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_stream_repeats_nothing(
    roomy: StreamedModel, resident: Any, caplog: pytest.LogCaptureFixture, sampled: bool
) -> None:
    inputs = roomy.tokenizer("Once upon a time", return_tensors="pt").input_ids
    call: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": sampled}
    torch.manual_seed(3)
    expected = resident.generate(inputs, **call)[0, inputs.shape[1] :].tolist()
    before = roomy.plan.vram_budget
    short_of_memory(roomy, 5)
    torch.manual_seed(3)
    generation = roomy.stream("Once upon a time", **call)
    chunks = list(generation)
    assert [token for chunk in chunks for token in chunk.token_ids] == expected == list(generation.result.token_ids)
    assert "".join(chunk.text for chunk in chunks) == generation.result.text
    assert generation.result.stopped_by == "length"
    shrank(roomy, before, caplog)


def test_a_stream_goes_on_from_what_it_said_where_logits_come_out_otherwise(
    roomy: StreamedModel, resident: Any
) -> None:
    inputs = roomy.tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = resident.generate(inputs, max_new_tokens=12, do_sample=False)[0, inputs.shape[1] :].tolist()
    failing = OutOfMemory(5)
    roomy.native.model.layers[5].mlp.register_forward_pre_hook(failing)

    def negated(_: Any, __: Any, output: Any) -> Any:
        if failing.count > 6:
            output.logits = -output.logits
        return output

    roomy.native.register_forward_hook(negated)
    said = list(roomy.answer("Once upon a time", max_new_tokens=12, do_sample=False).token_ids)
    begun = torch.cat([inputs, torch.tensor([expected[:5]])], 1)
    rest = roomy.generate(begun, max_new_tokens=7, do_sample=False)[0, begun.shape[1] :]
    assert said == expected[:5] + rest.tolist()
    assert said != expected


def test_a_prompt_is_cut_where_the_rest_of_the_memory_asks_for_it(folder: Path, resident: Any) -> None:
    expected = resident.generate(ids(), max_new_tokens=6, do_sample=False)
    with opened(folder, 106, max_seq_len=106) as model:
        forwards = watched(model)
        short_of_memory(model, 0)
        assert model.generate(ids(), max_new_tokens=6, do_sample=False).equal(expected)
        assert forwards[0] == 100
        assert max(forwards[1:]) < 100


def test_a_forward_survives(roomy: StreamedModel, resident: Any, caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        expected = resident(ids()).logits
    before = roomy.plan.vram_budget
    short_of_memory(roomy, 0)
    torch.testing.assert_close(roomy(ids()).logits, expected, atol=1e-5, rtol=0)
    shrank(roomy, before, caplog)


def failing_executor(monkeypatch: pytest.MonkeyPatch, *calls: int | None) -> OutOfMemory:
    """Building an executor runs out of memory."""
    real, failing = residence.Executor, OutOfMemory(*calls)

    def build(*args: Any, **kwargs: Any) -> Any:
        failing()
        return real(*args, **kwargs)

    monkeypatch.setattr(residence, "Executor", build)
    return failing


def test_opening_survives(
    folder: Path, resident: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing_executor(monkeypatch, 0)
    with opened(folder, LENGTH, spare=1 << 20) as model:
        shrank(model, model._residence.shrunk_from or 0, caplog)
        expected = resident.generate(ids(), max_new_tokens=6, do_sample=False)
        assert model.generate(ids(), max_new_tokens=6, do_sample=False).equal(expected)
    failing_executor(monkeypatch, None)
    with pytest.raises(BudgetError, match=r"ran out again .* close the other programs .* vram_budget or max_seq_len"):
        opened(folder, LENGTH, spare=1 << 20)


def test_planning_again_survives(
    roomy: StreamedModel, resident: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = {"input_ids": ids(40, 6), "attention_mask": torch.ones(6, 40, dtype=torch.long)}
    expected = resident.generate(**batch, max_new_tokens=4, do_sample=False)
    before, failing = roomy.plan.vram_budget, failing_executor(monkeypatch, 0)
    cache = DynamicCache(config=roomy.config)
    # It had not begun: a cache that is given is as it was.
    got = roomy.generate(**batch, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert got.equal(expected)
    assert failing.count == 2
    shrank(roomy, before, caplog)


def test_a_second_failure_is_said_and_leaves_it_usable(roomy: StreamedModel, resident: Any) -> None:
    expected = resident.generate(ids(), max_new_tokens=6, do_sample=False)
    hook = short_of_memory(roomy, None)
    for attempt in (lambda: roomy.generate(ids(), max_new_tokens=6), lambda: roomy.answer("abc"), lambda: roomy(ids())):
        with pytest.raises(BudgetError, match=r"ran out again under vram_budget=.*close the other programs") as failure:
            attempt()
        assert "\n" not in str(failure.value)
        assert failure.value.__context__ is None, "which would hold the tensors of the failed frames"
        assert not roomy.busy
    hook.remove()
    assert roomy.generate(ids(), max_new_tokens=6, do_sample=False).equal(expected)


def test_what_is_free_is_let_go_before_weights_are_looked_at(
    roomy: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = residence._let_go
    monkeypatch.setattr(residence, "_let_go", lambda device: (done.append("let go"), real(device))[1])
    changed = property(lambda _: (done.append("look"), "")[1])
    monkeypatch.setattr(residence.Executor, "changed", changed)
    short_of_memory(roomy, 0)
    roomy(ids())
    assert done[:2] == ["let go", "look"]

    def fails(_: Any) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(residence.Executor, "changed", property(fails))
    before = roomy.plan.vram_budget
    short_of_memory(roomy, 0)
    with pytest.raises(BudgetError, match="none to see what was changed; close the other programs") as failure:
        roomy(ids())
    assert "\n" not in str(failure.value) and roomy.plan.vram_budget == before
    roomy(ids())


@pytest.mark.parametrize("call", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}], ids=str)
def test_a_step_of_a_generation_is_admitted_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any]
) -> None:
    asked: list[int] = []
    real = planning.needs
    with opened(folder, LENGTH, spare=4 << 20) as model:
        run = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, **call}
        model.generate(ids(20), **run)
        work: list[Any] = []
        admit = model._residence.admit

        def admitting(*args: Any, **kwargs: Any) -> None:
            monkeypatch.setattr(planning, "needs", lambda *a: (asked.append(1), real(*a))[1])
            admit(*args, **kwargs)
            monkeypatch.setattr(planning, "needs", real)
            work.append(args)

        monkeypatch.setattr(model._residence, "admit", admitting)
        model.generate(ids(20), **run)
        assert len(work) > 3 and not asked


def test_failed_frames_are_let_go(roomy: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []

    def fails(module: Any, args: Any) -> None:
        if not held:
            activations = torch.ones(1000)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")

    alive: list[bool] = []
    real = residence.planning.plan
    monkeypatch.setattr(
        residence.planning, "plan", lambda *args: (alive.append(bool(held and held[0]() is not None)), real(*args))[1]
    )
    roomy.native.model.layers[5].mlp.register_forward_pre_hook(fails)
    roomy.generate(ids(), max_new_tokens=3)
    assert alive
    assert not any(alive), "gone before planning again"


@pytest.mark.parametrize("name", ["past_key_values", "logits_processor"])
def test_what_was_changed_is_not_used_again(roomy: StreamedModel, resident: Any, name: str) -> None:
    given = DynamicCache(config=roomy.config) if name == "past_key_values" else LogitsProcessorList()
    short_of_memory(roomy, 2)
    with pytest.raises(BudgetError, match=r"half-way.*is changed by now.*close the other programs"):
        roomy.generate(ids(), max_new_tokens=6, **{name: given})
    assert roomy.status()["shrunk_from"]
    expected = resident.generate(ids(), max_new_tokens=6, do_sample=False)
    assert roomy.generate(ids(), max_new_tokens=6, do_sample=False).equal(expected)
    with pytest.raises(BudgetError, match="half-way"):
        short_of_memory(roomy, 0)
        roomy(ids(), past_key_values=DynamicCache(config=roomy.config))


def test_where_nothing_smaller_works_the_budget_stays(folder: Path, resident: Any) -> None:
    expected = resident.generate(ids(), max_new_tokens=6, do_sample=False)
    with opened(folder) as model:
        before = model.plan
        vram = before.needs.total + max(unit.nbytes for unit in before.units)
        lives, prepared = model._residence, model._prepared
        lives.budgets = lives.budgets._replace(vram=vram)
        lives.plan = planning.plan(prepared, lives._machine, lives.budgets, prepared.planned)[0]
        short_of_memory(model, 0)
        with pytest.raises(BudgetError, match="no room in what is left; close the other programs") as failure:
            model.generate(ids(150), max_new_tokens=6)
        assert "\n" not in str(failure.value)
        assert model.status()["shrunk_from"] is None
        assert model.generate(ids(), max_new_tokens=6, do_sample=False).equal(expected)


def test_what_is_free_on_a_gpu_bounds_the_budget(roomy: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (600 << 20, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 500 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100 << 20)
    assert device.available_vram(torch.device("cuda", 0)) == int((1000 << 20) * 0.92)


def test_without_a_device_of_its_own_an_error_is_an_error(folder: Path) -> None:
    with open_model(folder, LoadOptions.create(dtype="float32", max_seq_len=LENGTH)) as model:
        short_of_memory(model, 0)
        with pytest.raises(torch.OutOfMemoryError):
            model.generate(ids(), max_new_tokens=3)
        assert model.generate(ids(), max_new_tokens=3).shape[1] <= 103


def test_a_librarys_own_failure_to_allocate_counts_too() -> None:
    assert residence._is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )
    assert residence._is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not residence._is_out_of_memory(RuntimeError("out of memory"))
    assert not residence._is_out_of_memory(BudgetError("CUDA error: out of memory"))
