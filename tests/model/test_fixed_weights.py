"""Weights that stream stay what the checkpoint says; resident ones are trained and changed as in transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_clients import IDS, KINDS, STREAMED, opened, refuses, same_logits
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from airllm_nb.errors import BudgetError, ClosedError, OptionError

pytestmark = pytest.mark.usefixtures("one_thread")

RESIDENT = [kind for kind in KINDS if kind not in STREAMED]


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(dtype="float32", num_hidden_layers=10)


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    return native(folder)


def native(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.fixture(scope="module", params=STREAMED)
def streamed(folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(folder, request.param) as model:
        yield model


def proj(model: Any) -> Any:
    """A matrix that streams."""
    tiers = dict(zip((unit.name for unit in model.plan.units), model.plan.tiers, strict=True))
    number = next(n for n in range(10) if tiers[f"model.layers.{n}"] != "gpu")
    return model.model.layers[number].mlp.down_proj


# ---- edits -----------------------------------------------------------------------------------------------------------

EDITS: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.weight.mul_(2),
    "an operator": lambda m: m.weight.__imul__(2),
    "an index": lambda m: m.weight.__setitem__(0, 1.0),
    "a part": lambda m: m.weight[0].zero_(),
    "a view": lambda m: m.weight.view(-1).add_(1),
    "its transpose": lambda m: m.weight.T.copy_(torch.zeros_like(m.weight.T)),
    "detached": lambda m: m.weight.detach().mul_(2),
    "data": lambda m: m.weight.data.mul_(2),
    "data += ": lambda m: m.weight.data.__iadd__(1),
    "cast to what it is": lambda m: m.weight.float().mul_(2),
    "an alias, in two steps": lambda m: m.weight.data[1:].view(-1)[3:].fill_(0),
    "new data": lambda m: setattr(m.weight, "data", torch.zeros(64, 128)),
    "copy_": lambda m: m.weight.copy_(torch.zeros(64, 128)),
    "out=": lambda m: torch.add(torch.zeros(64, 128), 1, out=m.weight),
    "init": lambda m: nn.init.normal_(m.weight),
    "init of data": lambda m: nn.init.xavier_uniform_(m.weight.data),
    "foreach": lambda m: torch._foreach_mul_([m.weight], 2.0),
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_a_weight_that_streams_is_not_edited(streamed: Any, resident: Any, edit: str) -> None:
    assert "streams" in refuses(functools.partial(EDITS[edit], proj(streamed)))
    assert same_logits(streamed, resident)


def test_numbers_of_a_weight_that_streams_cannot_be_written(streamed: Any) -> None:
    array = proj(streamed).weight.numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@torch.no_grad()
def test_a_weight_that_streams_is_read_as_any(streamed: Any, resident: Any) -> None:
    for (name, mine), theirs in zip(streamed.named_parameters(), resident.parameters(), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, name
        assert mine.clone().equal(theirs) and (mine * 2).equal(theirs * 2) and mine.data.equal(theirs)
        changed = mine.clone()
        changed += 1
        assert mine.detach()[0].equal(theirs[0]) and mine.float().sum() == theirs.sum()
    proj(streamed).weight.copy_(proj(streamed).weight.clone())  # changes nothing
    target = torch.zeros(64, 128)
    target.copy_(proj(streamed).weight)
    assert target.any()


@torch.no_grad()
def test_a_weight_that_was_replaced_is_noticed(streamed: Any, resident: Any) -> None:
    module = proj(streamed)
    before = module._parameters["weight"]
    module.weight = nn.Parameter(torch.zeros(64, 128))
    assert "down_proj.weight" in refuses(lambda: streamed(IDS))
    module._parameters["weight"] = before
    assert same_logits(streamed, resident)


@torch.no_grad()
def test_an_edit_by_a_hook_is_noticed(streamed: Any, resident: Any) -> None:
    module = proj(streamed)
    hook = module.register_forward_pre_hook(lambda module, _: (module.weight.mul_(2), None)[1])
    assert "down_proj.weight" in refuses(lambda: streamed(IDS))
    hook.remove()
    assert same_logits(streamed, resident)


def test_a_state_dict_is_right_or_refused(streamed: Any, resident: Any, tmp_path: Path) -> None:
    state, expected = streamed.state_dict(), resident.state_dict()
    assert list(state) == list(expected)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert all(loaded[name].equal(expected[name]) for name in expected)
    other = AutoModelForCausalLM.from_config(resident.config)
    other.load_state_dict(state)
    assert same_logits(other.eval(), resident)
    from safetensors.torch import load_file, save_file

    save_file(state, tmp_path / "state.safetensors")
    assert all(value.equal(expected[name]) for name, value in load_file(tmp_path / "state.safetensors").items())
    refuses(lambda: proj(streamed).weight.data_ptr())


STAYS: dict[str, Callable[[Any], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(dtype=)": lambda m: m.to(dtype=torch.bfloat16),
    "to('meta')": lambda m: m.to("meta"),
    "to(tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "cuda": lambda m: m.cuda(),
    "cuda(1)": lambda m: m.cuda(1),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "type": lambda m: m.type(torch.float16),
    "share_memory": lambda m: m.share_memory(),
    "add_adapter": lambda m: m.add_adapter(peft.LoraConfig(target_modules=["q_proj"])),
    "load_adapter": lambda m: m.load_adapter("nowhere"),
}
CHANGES: dict[str, Callable[[Any], Any]] = {
    "resize": lambda m: m.resize_token_embeddings(300),
    "input": lambda m: m.set_input_embeddings(nn.Embedding(260, 64)),
    "output": lambda m: m.set_output_embeddings(nn.Linear(64, 260)),
    "load_state_dict": lambda m: m.load_state_dict({}),
    "save_pretrained": lambda m: m.save_pretrained("nowhere"),
    "push_to_hub": lambda m: m.push_to_hub("nowhere"),
    "checkpointing": lambda m: m.gradient_checkpointing_enable(),
}


@pytest.mark.parametrize("call", STAYS | CHANGES)
def test_what_would_break_it_is_refused(streamed: Any, resident: Any, call: str) -> None:
    refuses(lambda: (STAYS | CHANGES)[call](streamed))
    assert same_logits(streamed, resident)


@pytest.mark.parametrize("call", list(STAYS)[:12])
def test_what_would_break_a_part_is_refused(streamed: Any, resident: Any, call: str) -> None:
    for part in (streamed.model, proj(streamed)):
        if call not in ("cuda", "cuda(1)") or torch.cuda.is_available():
            refuses(functools.partial(STAYS[call], part))
    assert same_logits(streamed, resident)


@pytest.mark.parametrize("kind", RESIDENT)
def test_a_resident_model_is_not_moved_or_cast_either(folder: Path, resident: Any, kind: str) -> None:
    with opened(folder, kind) as model:
        for call in STAYS.values():
            refuses(functools.partial(call, model))
        assert same_logits(model, resident)


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_nothing_gives_the_model(folder: Path, resident: Any, kind: str) -> None:
    with opened(folder, kind) as opened_model:
        model: Any = opened_model
        for same in (model.eval(), model.train(False), model.to("cpu"), model.to(model.device), model.to(model.dtype),
                     model.float(), model.cpu(), model.to(torch.zeros(1)), model.to("cpu", torch.float32)):  # fmt: skip
            assert same is model
        assert model.resize_token_embeddings(260) is model.get_input_embeddings()
        assert same_logits(model, resident)


# ---- training --------------------------------------------------------------------------------------------------------


def examples() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(4)]


def trainer(model: Any, tmp_path: Path, **options: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "report_to": [],
                "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 3}  # fmt: skip
    return Trainer(model, TrainingArguments(tmp_path, **(settings | options)), train_dataset=examples())


def test_training_through_what_streams_is_refused(streamed: Any, resident: Any, tmp_path: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: streamed.train()(IDS, labels=IDS),
        lambda: streamed.train().forward(IDS),
        lambda: trainer(streamed, tmp_path).train(),
        lambda: streamed.eval()(inputs_embeds=torch.zeros(1, 2, 64, requires_grad=True)),
        lambda: streamed.model(inputs_embeds=torch.zeros(1, 2, 64, requires_grad=True)),
    ]
    for call in calls:
        assert "cannot be trained" in refuses(call)
    streamed.train()
    with torch.no_grad():
        streamed(IDS)
    streamed.eval()
    assert same_logits(streamed, resident)


@pytest.mark.parametrize("kind", RESIDENT)
def test_a_resident_model_trains_as_transformers_does(folder: Path, tmp_path: Path, kind: str) -> None:
    expected = native(folder)
    trainer(expected, tmp_path / "a").train()
    with opened(folder, kind) as model:
        trainer(model, tmp_path / "b").train()
        for (name, mine), theirs in zip(model.named_parameters(), expected.named_parameters(), strict=True):
            assert name == theirs[0] and torch.allclose(mine, theirs[1], atol=1e-6), name
        assert not model.lm_head.weight.equal(native(folder).lm_head.weight)
        model.eval().save_pretrained(tmp_path / "saved")
        assert same_logits(native(tmp_path / "saved"), model)
        assert model.generate(IDS, max_new_tokens=4).equal(expected.eval().generate(IDS, max_new_tokens=4))


@pytest.mark.parametrize("kind", RESIDENT)
def test_gradients_are_those_of_transformers(folder: Path, kind: str) -> None:
    expected = native(folder)
    expected(IDS, labels=IDS).loss.backward()
    with opened(folder, kind) as model:
        output = model(IDS, labels=IDS)
        output.loss.backward()
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)
        with torch.no_grad():
            assert not model(IDS).logits.requires_grad


def test_tied_weights_train_as_one(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    tied = tiny_llama(dtype="float32", num_hidden_layers=10, tied=True)
    expected = native(tied)
    trainer(expected, tmp_path / "a").train()
    for kind in RESIDENT:
        with opened(tied, kind) as model:
            assert model.lm_head.weight is model.get_input_embeddings().weight
            trainer(model, tmp_path / kind).train()
            assert torch.allclose(model.lm_head.weight, expected.lm_head.weight, atol=1e-6)


CHANGED: dict[str, Callable[[Any], Any]] = {
    "in place": lambda w: w.mul_(1.5),
    "data": lambda w: w.data.mul_(1.5),
    "one number": lambda w: w.view(-1)[5].add_(1),
    "new data": lambda w: setattr(w, "data", w.detach() * 2),
    "turned round": lambda w: w.copy_(w.flip(0)),
    "data turned round": lambda w: w.data.copy_(w.data.flip(0)),
    "data rolled": lambda w: w.data.copy_(w.data.roll(2, 1)),
    "two numbers change places": lambda w: w.data.view(-1)[:8].copy_(w.data.view(-1)[[4, 1, 2, 3, 0, 5, 6, 7]]),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_new_plan_does_not_lose_what_was_changed(tiny_llama: Callable[..., Path], change: str) -> None:
    from airllm_nb import AutoModel

    folder = tiny_llama(dtype="float32", eos_token_id=None)
    expected = native(folder)
    long = torch.randint(3, 250, (32, 8))
    options: dict[str, Any] = {"dtype": "float32", "max_seq_len": 24, "vram_budget": "2300KiB"}
    with AutoModel.from_pretrained(folder, **options) as model, torch.no_grad():
        call = functools.partial(model.generate, long, attention_mask=torch.ones_like(long), max_new_tokens=4)
        for each in (model, expected):
            CHANGED[change](each.model.layers[1].mlp.up_proj.weight)
        assert same_logits(model, expected)
        assert "model.layers.1.mlp.up_proj.weight" in refuses(call, BudgetError)
        assert same_logits(model, expected)
    with AutoModel.from_pretrained(folder, **(options | {"vram_budget": "4MiB"})) as model, torch.no_grad():
        before = model.plan.needs.kv_cache
        CHANGED[change](model.model.layers[1].mlp.up_proj.weight)
        model.generate(long, attention_mask=torch.ones_like(long), max_new_tokens=4)
        assert model.plan.needs.kv_cache > before and same_logits(model, expected), "all stays where it is"
    with AutoModel.from_pretrained(folder, **options) as model:
        call = functools.partial(model.generate, long, attention_mask=torch.ones_like(long), max_new_tokens=4)
        before = model.plan.needs.kv_cache
        call()
        assert model.plan.needs.kv_cache > before, "it was planned again"


def test_what_was_made_for_a_first_step_trains_though_that_is_planned_again(tiny_llama: Callable[..., Path]) -> None:
    from airllm_nb import AutoModel

    folder = tiny_llama(dtype="float32", eos_token_id=None)
    batch = torch.randint(3, 250, (16, 60), generator=torch.Generator().manual_seed(1))
    expected = losses(native(folder), batch)
    assert expected[0] > expected[-1]
    with AutoModel.from_pretrained(folder, dtype="float32", max_seq_len=16, vram_budget="180MiB") as model:
        executor, before = model._executor, model.plan.needs
        assert torch.allclose(losses(model, batch), expected, atol=1e-5)
        assert model.plan.needs.kv_cache > before.kv_cache, "it was planned again"
        assert model._executor is executor, "and nothing was read again"
        assert model.trace.plan == model.plan.as_dict()


def losses(model: Any, batch: torch.Tensor) -> torch.Tensor:
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(3):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return torch.stack(seen)


def test_a_model_that_is_built_again_has_the_parameters_it_had(tiny_llama: Callable[..., Path]) -> None:
    from test_budget import short_of_memory

    from airllm_nb import AutoModel

    folder = tiny_llama(dtype="float32", num_hidden_layers=6, eos_token_id=None)
    expected = native(folder)
    with AutoModel.from_pretrained(folder, dtype="float32", max_seq_len=64, vram_budget="180MiB") as model:
        kept, executor = list(model.parameters()), model._executor
        short_of_memory(model, 0)
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert model._executor is not executor and model._holds_all
        assert all(now is was for now, was in zip(model.parameters(), kept, strict=True))
        assert same_logits(model, expected)
        assert torch.allclose(losses(model, IDS), losses(expected, IDS), atol=1e-5)


@pytest.mark.parametrize("sign", ["training", "gradients"])
def test_what_trains_is_not_let_stream(tiny_llama: Callable[..., Path], sign: str) -> None:
    from airllm_nb import AutoModel

    folder = tiny_llama(dtype="float32", eos_token_id=None)
    with AutoModel.from_pretrained(folder, dtype="float32", max_seq_len=24, vram_budget="2300KiB") as model:
        if sign == "training":
            model.train()
        else:
            model(IDS, labels=IDS).loss.backward()
        long = torch.randint(3, 250, (32, 8))
        call = functools.partial(model.generate, long, attention_mask=torch.ones_like(long), max_new_tokens=4)
        assert "being trained" in refuses(call, BudgetError)
        assert model._holds_all
        model.eval().zero_grad()
        call()
        assert not model._holds_all


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_memory_for_gradients_shrinks_no_budget(tiny_llama: Callable[..., Path], mode: Any) -> None:
    from test_budget import short_of_memory

    from airllm_nb import AutoModel

    folder = tiny_llama(dtype="float32", num_hidden_layers=6)
    with AutoModel.from_pretrained(folder, dtype="float32", max_seq_len=64, vram_budget="180MiB") as model, mode():
        before = model.plan.vram_budget
        short_of_memory(model, 0)
        if mode is torch.enable_grad:
            assert "gradients" in refuses(lambda: model(IDS, labels=IDS), BudgetError)
            model(IDS, labels=IDS).loss.backward()
        else:
            model(IDS, labels=IDS)
        assert (model.plan.vram_budget == before) == (mode is torch.enable_grad)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def adapted(model: Any, **options: Any) -> Any:
    """LoRA with weights that are not zero."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    made = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


TARGETS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "table and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_on_it_equals_peft_on_transformers(folder: Path, tmp_path: Path, kind: str, targets: str) -> None:
    expected = adapted(native(folder), **TARGETS[targets])
    with opened(folder, kind) as model:
        wrapped = adapted(model, **TARGETS[targets])
        assert same_logits(wrapped, expected)
        assert not same_logits(wrapped, native(folder))
        said = wrapped.generate(input_ids=IDS, max_new_tokens=5)
        assert said.equal(expected.generate(input_ids=IDS, max_new_tokens=5))
        with wrapped.disable_adapter(), expected.disable_adapter():
            assert same_logits(wrapped, expected)
        expected.save_pretrained(tmp_path / "theirs")
        wrapped.save_pretrained(tmp_path / "mine")
    refuses(lambda: wrapped(IDS), ClosedError)
    refuses(lambda: wrapped.generate(input_ids=IDS), ClosedError)
    for saved in ("theirs", "mine"):
        with opened(folder, kind) as model:
            assert same_logits(peft.PeftModel.from_pretrained(model, tmp_path / saved), expected)


@pytest.mark.parametrize("begin", range(0, 9))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.bool])
def test_a_change_anywhere_in_memory_shows(begin: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from airllm_nb.model import resident as module

    monkeypatch.setattr(module, "_PART", 5)
    numbers = module._numbers(torch.device("cpu"))
    memory = torch.zeros(200, dtype=torch.uint8)
    weight = memory[begin * dtype.itemsize :][: 3 * 7 * dtype.itemsize].view(dtype).view(3, 7)
    seen = [before := module._sums(weight, numbers)]
    for index in range(weight.numel()):
        weight.view(-1)[index] = 1
        now = module._sums(weight, numbers)
        assert not any(torch.equal(now, each) for each in seen), "nor is it told from the same at another place"
        seen.append(now)
        weight.view(-1)[index] = 0
    assert torch.equal(module._sums(weight, numbers), before)


def test_peft_goes_on_after_a_new_plan(tiny_llama: Callable[..., Path]) -> None:
    from airllm_nb import AutoModel

    folder = tiny_llama(dtype="float32", eos_token_id=None)
    expected, long = adapted(native(folder)), torch.randint(3, 250, (32, 8))
    call = {"input_ids": long, "attention_mask": torch.ones_like(long), "max_new_tokens": 4, "do_sample": False}
    with AutoModel.from_pretrained(folder, dtype="float32", max_seq_len=24, vram_budget="2200KiB") as model:
        wrapped, before = adapted(model), model.plan.needs.kv_cache
        assert same_logits(wrapped, expected)
        assert wrapped.generate(**call).equal(expected.generate(**call))
        assert model.plan.needs.kv_cache > before, "it was planned again"
        assert same_logits(wrapped, expected)


def test_peft_does_not_merge_into_what_streams(streamed: Any, folder: Path) -> None:
    with opened(folder, "disk") as model:
        wrapped = adapted(model)
        refuses(wrapped.merge_adapter)
        refuses(wrapped.merge_and_unload)


def test_peft_trains_on_what_is_resident_alone(folder: Path, tmp_path: Path) -> None:
    losses = []
    for kind in ("", *RESIDENT):
        base: Any = opened(folder, kind) if kind else native(folder)
        wrapped = adapted(base)
        losses.append(trainer(wrapped, tmp_path / f"x{kind}").train().training_loss)
        changed = wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
        assert not changed.equal(
            adapted(native(folder)).base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
        )
        if kind:
            base.close()
    assert len(set(losses)) == 1
    with opened(folder, "disk") as model, pytest.raises(OptionError, match="cannot be trained"):
        trainer(adapted(model), tmp_path / "disk").train()
