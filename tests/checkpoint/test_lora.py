"""LoRA adapters: what PEFT makes and runs on the resident model, we run unmerged on streamed weights of every kind."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import hub_server
import packed_awq
import packed_bnb
import packed_fp8
import packed_gptq
import pytest
import tiny_models
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from airllm_nb import AutoModel
from airllm_nb.checkpoint import patterns
from airllm_nb.checkpoint.lora.adapter import PREFIX, _Reader, read_adapter
from airllm_nb.checkpoint.lora.files import AdapterFiles
from airllm_nb.cli import main
from airllm_nb.config import LoadOptions
from airllm_nb.encoding.formats import get_encoding
from airllm_nb.engine.facade import StreamedModel, plan_model
from airllm_nb.errors import AirLLMError, CheckpointError, OptionError, SourceError, UnsupportedModelError
from airllm_nb.intake import planning

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.randint(4, 250, (2, 11), generator=torch.Generator().manual_seed(3))
# Weights pass through device memory of their own, some from disk.
STREAMED = {"vram_budget": "450KiB", "ram_budget": "350KiB", "max_seq_len": 48}
PLACES = {"in place": {}, "streamed": STREAMED}

LLAMA: dict[str, dict[str, Any]] = {
    "two projections": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"target_modules": "all-linear", "r": 4, "lora_alpha": 32},
    "a pattern": {"target_modules": r".*\.[13]\.mlp\.(up|down)_proj"},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
    "ranks and alphas": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.k_proj": 5, "proj": 7},
        "alpha_pattern": {"down_proj": 40, r"model\.layers\.2\.self_attn\.q_proj": 2},
    },
    "rank-stabilised": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 16, "lora_alpha": 8,
                        "rank_pattern": {"up_proj": 2}},
    "a bias of its own": {"target_modules": ["v_proj"], "lora_bias": True},
    "all biases": {"target_modules": ["v_proj"], "bias": "all"},
    "biases of what it adapts": {"target_modules": ["v_proj"], "bias": "lora_only"},
    "the head": {"target_modules": ["lm_head", "gate_proj"]},
    "the table": {"target_modules": ["embed_tokens"]},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
}  # fmt: skip
TIED = ["two projections", "the head", "the table", "a whole head", "whole modules"]


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[..., Path]) -> Callable[..., Path]:
    """Weights and biases large enough for the adapter to change the answer, and for the base model to matter."""
    return lambda **options: tiny_llama(**{"attention_bias": True, "initializer_range": 0.15} | options)


def adapted(
    base: Path | torch.nn.Module, target: Path, *, kind: Any = LoraConfig, dtype: Any = torch.float32, **settings: Any
) -> Path:
    """An adapter of a folder or of a model, made by PEFT, every weight of it random."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, which are tested
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype) if isinstance(base, Path) else base
        model = get_peft_model(model, kind(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def adapter(base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of ``base()``: copy it before you change it."""
    return adapted(base(), tmp_path_factory.mktemp("adapter") / "plain", target_modules=["q_proj", "down_proj"])


def through_peft(model: Any, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, adapter).eval()


def resident(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


def run(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a padded batch, and the tokens that follow."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return logits[:, 3:], tokens


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def answers(reference: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of PEFT's model, whose adapter changes them."""
    logits, tokens = run(reference)
    with warnings.catch_warnings(), reference.disable_adapter(), torch.inference_mode():
        warnings.simplefilter("ignore")
        assert error(logits[1], reference(input_ids=IDS[1:]).logits[0, 3:]) > 0.01, "this proves nothing"
    return logits, tokens


def assert_equal(model: StreamedModel, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, tokens = run(model)
    assert error(logits, expected[0]) < 1e-5
    assert torch.equal(tokens, expected[1])


# ---- equal to PEFT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LLAMA, *(f"{name}, tied" for name in TIED)])
def test_it_equals_peft(base: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = base(tied=name.endswith(", tied"))
    adapter = adapted(folder, tmp_path / "adapter", **LLAMA[name.removesuffix(", tied")])
    reference = through_peft(resident(folder), adapter)
    expected = answers(reference)
    for place, options in PLACES.items():
        with AutoModel.from_pretrained(folder, adapter=adapter, **options) as model:
            assert (place == "streamed") == ("disk" in model.plan.tiers)
            assert_equal(model, expected)
    if name == "all linear layers":
        with AutoModel.from_pretrained(folder, adapter=adapter, **STREAMED, prefetching=False) as model:
            assert_equal(model, expected)


@pytest.mark.parametrize("name", ["all linear layers", "ranks and alphas", "a bias of its own", "whole modules"])
def test_4bit_equals_peft_on_the_librarys_nf4(base: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = base(hidden_size=128)
    adapter = adapted(folder, tmp_path / "adapter", **LLAMA[name])
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    plain = resident(folder, quantization_config=quantised)
    for module in plain.modules():  # a kernel of some CPUs, which rounds otherwise
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    expected = answers(through_peft(plain, adapter))
    for options in ({}, STREAMED | {"vram_budget": "700KiB", "ram_budget": "250KiB"}):
        with AutoModel.from_pretrained(folder, adapter=adapter, compression="4bit", **options) as model:
            assert bool(options) == ("disk" in model.plan.tiers)
            assert_equal(model, expected)


def test_8bit_equals_peft_on_the_dequantised_weights(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    adapter = adapted(folder, tmp_path / "adapter", **LLAMA["all linear layers"])
    plain = resident(folder)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parts = get_encoding("8bit").encode(module.weight.detach())
            value = parts["weight"].view(-1, 32).float() * (parts["spread"].view(-1, 1).float() / 255)
            value = (value + parts["minimum"].view(-1, 1).float()).view(module.weight.shape)
            assert 0 < error(value, module.weight.detach()) < 0.02
            module.weight.data.copy_(value)
    expected = answers(through_peft(plain, adapter))
    for options in ({}, STREAMED | {"ram_budget": "150KiB"}):
        with AutoModel.from_pretrained(folder, adapter=adapter, compression="8bit", **options) as model:
            assert bool(options) == ("disk" in model.plan.tiers)
            assert_equal(model, expected)


MAKERS: dict[str, tuple[Any, Callable[[Path, Path], Path]]] = {
    "fp8": (packed_fp8, lambda folder, _: packed_fp8.make(folder)),
    "bitsandbytes": (packed_bnb, lambda folder, _: packed_bnb.make(folder)),
    "gptq": (packed_gptq, lambda folder, source: packed_gptq.make(folder, source, desc_act=True)),
    "awq": (packed_awq, lambda folder, source: packed_awq.make(folder, source)),
}


@pytest.mark.parametrize(
    ("name", "ram"),
    [("fp8", "120KiB"), ("bitsandbytes", "90KiB"), ("gptq", "90KiB"), ("awq", "90KiB"), ("gguf", "48KiB"),
     ("gguf of transposed layers", "300KiB")],
)  # fmt: skip
def test_weights_that_are_packed_already(base: Callable[..., Path], tmp_path: Path, name: str, ram: str) -> None:
    """Equal to PEFT on what the format's library, or transformers, makes of the checkpoint, dequantised."""
    if name in MAKERS:
        maker, make = MAKERS[name]
        packed = make(tmp_path / "packed", base(attention_bias=False))
        load_plain = functools.partial(maker.reference, packed)
    else:
        make = gguf_files.tiny_llama_gguf if name == "gguf" else gguf_files.tiny_gpt2_gguf
        packed = make(tmp_path / "model.gguf")
        plain = transformers.GgufConfig(dequantize=True)
        load_plain = functools.partial(resident, packed.parent, gguf_file=packed.name, quantization_config=plain)
    targets = ["c_attn", "c_fc"] if "transposed" in name else ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    adapter = adapted(load_plain(), tmp_path / "adapter", target_modules=targets)
    ids, mask = IDS % 60 + 3, torch.ones_like(IDS)
    with torch.inference_mode():
        reference = through_peft(load_plain(), adapter)
        expected = reference(input_ids=ids, attention_mask=mask).logits
        with reference.disable_adapter():
            assert error(reference(input_ids=ids, attention_mask=mask).logits, expected) > 0.01
    for options in ({}, {"ram_budget": ram}):
        with AutoModel.from_pretrained(packed, adapter=adapter, dtype="float32", **options) as model:
            assert bool(options) == ("disk" in model.plan.tiers)
            assert error(model(input_ids=ids, attention_mask=mask).logits, expected) < 1e-5


@pytest.mark.parametrize("place", ["in place", "streamed"])
def test_transposed_layers(tmp_path: Path, place: str) -> None:
    """GPT-2's Conv1D: PEFT's fan_in_fan_out."""
    folder = tmp_path / "gpt2"
    tiny_models.save_tiny("gpt2", folder)
    settings = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    adapter = adapted(folder, tmp_path / "adapter", **settings)
    options = {} if place == "in place" else STREAMED | {"vram_budget": "800KiB"}
    with AutoModel.from_pretrained(folder, adapter=adapter, **options) as model:
        assert (place == "streamed") == ("disk" in model.plan.tiers)
        assert_equal(model, answers(through_peft(resident(folder), adapter)))


def test_a_sliced_layer(base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base()
    adapter = adapted(folder, tmp_path / "adapter", **LLAMA["the head"])
    monkeypatch.setattr(planning, "slice_limit", lambda *_: 1 << 14)
    with AutoModel.from_pretrained(folder, adapter=adapter, **STREAMED) as model:
        assert len(model.native.lm_head.slices) > 1
        assert_equal(model, answers(through_peft(resident(folder), adapter)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_as_half_precision_can_be(
    base: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    """Near what float32 gives, as near as PEFT is with the adapter in the same dtype."""
    folder = base()
    adapter = adapted(folder, tmp_path / "adapter", **LLAMA["all linear layers"])
    exact = run(through_peft(resident(folder), adapter))[0]
    rounded = PeftModel.from_pretrained(
        resident(folder, dtype=getattr(torch, dtype)), adapter, autocast_adapter_dtype=False
    )
    theirs = run(rounded.eval())[0]
    with AutoModel.from_pretrained(folder, adapter=adapter, dtype=dtype) as model:
        ours = run(model)[0]
    assert ours.dtype == theirs.dtype
    assert (ours.float() - exact).norm() < 1.1 * (theirs.float() - exact).norm()


def test_names_of_older_checkpoints_and_scaled_tables(tmp_path: Path) -> None:
    """Gemma 3 of several parts: the language model moved within the module tree, and its table scales its rows."""
    from transformers import AutoModelForImageTextToText

    folder, new, old = tmp_path / "gemma3", tmp_path / "new", tmp_path / "old"
    native = tiny_models.save_tiny("gemma3", folder)
    targets = r".*language_model\.(layers.*(q_proj|down_proj)|embed_tokens)"
    adapted(native, new, target_modules=targets)
    shutil.copytree(new, old)
    tensors = load_file(new / WEIGHTS)
    moved = "model.language_model.", "language_model.model."
    assert all(moved[0] in name for name in tensors)
    save_file({name.replace(*moved): tensor for name, tensor in tensors.items()}, old / WEIGHTS)
    reference = through_peft(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), new)
    expected = reference(input_ids=IDS).logits
    with reference.disable_adapter():
        assert error(reference(input_ids=IDS).logits, expected) > 0.01
    for adapter in (new, old):
        with AutoModel.from_pretrained(folder, adapter=adapter) as model:
            assert error(model(IDS).logits, expected) < 1e-5


def test_a_pickled_adapter(base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    """Written once as safetensors into the store's folder, and read from there ever after."""
    pickled, shards = tmp_path / "pickled", tmp_path / "shards"
    shutil.copytree(adapter, pickled)
    torch.save(load_file(adapter / WEIGHTS), pickled / "adapter_model.bin")
    (pickled / WEIGHTS).unlink()
    options = {"layer_shards_saving_path": shards}
    planned = plan_model(base(), LoadOptions.create(adapter=pickled, **options))
    assert not shards.exists()
    expected = answers(through_peft(resident(base()), adapter))
    for _ in range(2):
        with AutoModel.from_pretrained(base(), adapter=pickled, **options) as model:
            assert_equal(model, expected)
            assert model.plan.needs.small == planned.needs.small
        (copy,) = (shards / "adapters").iterdir()
        written = copy.stat().st_mtime_ns
    assert copy.stat().st_mtime_ns == written


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_plan_has_room_for_it(base: Callable[..., Path], adapter: Path) -> None:
    """A and B are resident in the dtype of compute, whatever they are stored in."""
    folder, values = base(), sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values())
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        small = [
            plan_model(folder, LoadOptions.create(adapter=given, dtype=dtype)).needs.small for given in (None, adapter)
        ]
        assert small[1] - small[0] == values * size


def test_it_survives_another_plan(base: Callable[..., Path], adapter: Path) -> None:
    reference = through_peft(resident(base()), adapter)
    expected = answers(reference)
    with AutoModel.from_pretrained(base(), adapter=adapter, **STREAMED | {"vram_budget": "3MiB"}) as model:
        assert_equal(model, expected)
        before, long = model.plan, torch.randint(4, 250, (3, 120))
        assert error(model(long).logits, reference(input_ids=long).logits) < 1e-5
        assert model.plan is not before
        assert_equal(model, expected)


def test_what_it_is_is_said(base: Callable[..., Path], adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "airllm_nb")
    with AutoModel.from_pretrained(base(), adapter=adapter) as model:
        assert model.status()["adapter"] == "plain: r=8, 8 modules, 40.0 KiB"
    assert f"adapter plain: r=8, 8 modules, 40.0 KiB (it was trained on {base()})" in caplog.text
    with AutoModel.from_pretrained(base()) as model:
        assert model.status()["adapter"] is None


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dora": ({"use_dora": True}, ["DoRA", "merge_and_unload"]),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["target_parameters", "merge_and_unload"]),
    "tokens": ({"trainable_token_indices": [3]}, ["trainable_token_indices"]),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, ["layer_replication"]),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "path_initial_model_for_weight_conversion"]),
    "ia3": ({"peft_type": "IA3"}, ["IA3", "merge_and_unload"]),
    "lokr": ({"peft_type": "LOKR"}, ["LOKR", "merge_and_unload"]),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, ["PREFIX_TUNING", "peft itself"]),
    "no type": ({"peft_type": None}, ["a NONE adapter"]),
}
DAMAGED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rank": ({"r": 4}, ["lora_A [8, ", "says r=4"]),
    "no number": ({"r": "many"}, ["r='many'", CONFIG]),
    "zero": ({"r": 0}, ["r=0"]),
    "alpha": ({"lora_alpha": None}, ["lora_alpha=None"]),
    "patterns": ({"rank_pattern": ["q_proj"]}, ["rank_pattern"]),
    "a pattern": ({"alpha_pattern": {"(": 3}}, ["alpha_pattern"]),
    "nested patterns": ({"rank_pattern": {"(" * 400 + ")" * 400: 3}}, ["rank_pattern"]),
    "too many patterns": ({"rank_pattern": {f"x{number}": 3 for number in range(20_000)}}, ["20,000 patterns"]),
    "a long pattern": ({"rank_pattern": {"q" * 10_000: 3}}, ["rank_pattern", "2,000"]),
    "a huge rank": ({"r": 10**400}, ["r=1000", CONFIG]),
    "a huge alpha": ({"lora_alpha": 10**400}, ["lora_alpha=1000", CONFIG]),
    "an endless alpha": ({"lora_alpha": float("inf")}, ["lora_alpha=inf"]),
    "no alpha": ({"lora_alpha": float("nan")}, ["lora_alpha=nan"]),
    "no targets": ({"target_modules": None}, ["target_modules", "does not name"]),
    "other targets": ({"target_modules": ["q_proj"]}, ["down_proj", "does not name"]),
    "another expression": ({"target_modules": r".*\.k_proj"}, ["_proj", "does not name"]),
    "targets left out": ({"exclude_modules": ["down_proj"]}, ["down_proj", "does not name"]),
    "targets of another type": ({"target_modules": 3}, ["target_modules", "no list"]),
    "an endless expression": ({"target_modules": r"(\w+\.?)*(?<=Z)"}, ["target_modules"]),
}


def changed(adapter: Path, folder: Path, **settings: Any) -> Path:
    """A copy with other settings."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | settings), "utf-8")
    return folder


def with_tensors(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy whose tensors were changed in place."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def refusal(folder: Path, adapter: Any, kind: type[AirLLMError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        AutoModel.from_pretrained(folder, adapter=adapter, **options).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
def test_other_kinds_are_refused(
    base: Callable[..., Path], adapter: Path, tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    text = refusal(base(), changed(adapter, tmp_path / "other", **settings), UnsupportedModelError)
    assert all(word in text for word in ["other", *words]), text


@pytest.mark.parametrize(("settings", "words"), DAMAGED.values(), ids=DAMAGED)
def test_settings_that_cannot_be_true(
    base: Callable[..., Path], adapter: Path, tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    text = refusal(base(), changed(adapter, tmp_path / "other", **settings), CheckpointError)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("pattern", ["(([a-z_.0-9])+)+X", r"(\w+\.?)*(?<=Z)", "(a|a|.)*(.*)*Z", r"((\w|\.)+)+\1Z"])
def test_patterns_that_backtrack_for_ever_cost_nothing(
    base: Callable[..., Path], adapter: Path, tmp_path: Path, pattern: str
) -> None:
    folder = changed(adapter, tmp_path / "other", rank_pattern={pattern: 4}, alpha_pattern={pattern: 4})
    start = time.process_time()
    with AutoModel.from_pretrained(base(), adapter=folder) as model:  # it fits no module, so r and lora_alpha hold
        assert "r=8" in model.status()["adapter"]
    assert time.process_time() - start < 5


def test_patterns_that_do_not_end(
    base: Callable[..., Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    text = refusal(base(), changed(adapter, tmp_path / "x", rank_pattern={"(q_)+proj": 8}), CheckpointError)
    assert "rank_pattern" in text and "(q_)+proj" in text


def test_patterns_mean_what_they_mean_to_peft() -> None:
    from peft.utils.other import get_pattern_key

    names = ["model.layers.11.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head", "x.q_proj", "my_q_proj"]
    keys = [
        "q_proj",
        r"layers\.1\.mlp\.down_proj",
        "proj",
        r".*\.1\d?\..*",
        "(q|k)_proj",
        "^lm_head",
        "lm_head$",
        "[a-z]_.*",
        "",
        "down",
        r"self_attn.\w+",
        "(?P<x>q)_proj",
        r"\d+",
        "q_pro{1}j",
        "q_proj|lm_head",
    ]
    for several in [*([key] for key in keys), keys]:
        ours = patterns.Patterns({key: key for key in several}, (Path("x"), "rank_pattern"))
        for name in names:
            assert ours.first(name, name) == get_pattern_key(several, name), (several, name)


@pytest.mark.parametrize(
    "targets", [["q_proj", "layers.1.mlp.down_proj"], r".*\.1\..*(q|down)_proj", "lm_head", [], "all"]
)
@pytest.mark.parametrize("excluded", [None, ["lm_head", "11.self_attn.q_proj"], r".*mlp.*"])
@pytest.mark.parametrize("layers", [None, [1, 3], 11])
def test_modules_are_targets_as_they_are_to_peft(tmp_path: Path, targets: Any, excluded: Any, layers: Any) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    if layers is not None and isinstance(targets, str):
        return  # LoraConfig refuses an expression beside numbers of layers
    settings = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers}
    theirs = LoraConfig(**settings)
    ours = _Reader(AdapterFiles("x", tmp_path, tmp_path / "x.safetensors"), settings)
    for name in ("model.layers.11.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.3.self_attn.q_proj",
                 "model.layers.1.self_attn.my_q_proj", "lm_head"):  # fmt: skip
        assert ours._is_target(name) == bool(check_target_module_exists(theirs, name)), name


@pytest.mark.parametrize("kind", [IA3Config, PrefixTuningConfig])
def test_other_kinds_that_peft_made(base: Callable[..., Path], tmp_path: Path, kind: Any) -> None:
    settings = {"num_virtual_tokens": 4} if kind is PrefixTuningConfig else {
        "target_modules": ["k_proj"], "feedforward_modules": []}  # fmt: skip
    other = adapted(base(), tmp_path / "other", kind=kind, task_type="CAUSAL_LM", **settings)
    refusal(base(), other, UnsupportedModelError)


def test_dora_that_peft_made(base: Callable[..., Path], tmp_path: Path) -> None:
    dora = adapted(base(), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    assert "DoRA" in refusal(base(), dora, UnsupportedModelError)
    # Without the word in the config its tensors say it.
    (tmp_path / "silent").mkdir()
    text = refusal(base(), changed(dora, tmp_path / "silent" / "x", use_dora=False), UnsupportedModelError)
    assert "lora_magnitude_vector" in text


def test_damaged_files(base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return shutil.copytree(adapter, tmp_path / name)

    assert "check the path" in refusal(base(), tmp_path / "nowhere", SourceError)
    (damaged("no weights") / WEIGHTS).unlink()
    assert WEIGHTS in refusal(base(), tmp_path / "no weights", CheckpointError)
    (damaged("no config") / CONFIG).unlink()
    assert f"no {CONFIG}" in refusal(base(), tmp_path / "no config", CheckpointError)
    data = (damaged("cut") / WEIGHTS).read_bytes()
    (tmp_path / "cut" / WEIGHTS).write_bytes(data[:-100])
    assert "truncated" in refusal(base(), tmp_path / "cut", CheckpointError)
    (damaged("no json") / CONFIG).write_text("{", "utf-8")
    assert CONFIG in refusal(base(), tmp_path / "no json", CheckpointError)
    assert "name the folder" in refusal(base(), adapter / WEIGHTS, SourceError)
    (damaged("pickle") / WEIGHTS).unlink()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"no pickle")
    assert "adapter_model.bin" in refusal(base(), tmp_path / "pickle", CheckpointError)
    below = shutil.copytree(adapter, tmp_path / "outer" / "mine").parent
    assert str(below / "mine") in refusal(base(), below, CheckpointError)


def test_damaged_tensors(base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    first = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"

    def halved(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[first + "B.weight"]

    def whole(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first + "A.weight"] = tensors[first + "A.weight"].long()

    assert "no lora_B" in refusal(base(), with_tensors(adapter, tmp_path / "1", halved), CheckpointError)
    assert "I64" in refusal(base(), with_tensors(adapter, tmp_path / "2", whole), CheckpointError)
    empty = with_tensors(adapter, tmp_path / "3", lambda tensors: tensors.clear())
    assert "no tensors" in refusal(base(), empty, CheckpointError)


def test_an_adapter_of_another_model(base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    text = refusal(base(hidden_size=128), adapter, CheckpointError)
    assert "128 inputs and 64 outputs, but it has 128 and 128" in text and str(base()) in text
    text = refusal(base(num_hidden_layers=2), adapter, CheckpointError)
    assert "model.layers.2." in text and "and 3 more" in text and "another model" in text
    # A vocabulary that was enlarged for the training.
    head = adapted(base(vocab_size=300), tmp_path / "head", **LLAMA["a whole head"])
    assert "[300, 64]" in refusal(base(), head, CheckpointError)
    bias = adapted(base(), tmp_path / "bias", **LLAMA["all biases"])
    assert "none" in refusal(base(attention_bias=False), bias, CheckpointError)


def test_it_is_refused_before_anything_is_written(base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    options = {"compression": "8bit", "layer_shards_saving_path": tmp_path / "shards"}
    refusal(base(num_hidden_layers=2), adapter, CheckpointError, **options)
    assert not (tmp_path / "shards").exists()


def test_a_whole_module_that_is_compressed(base: Callable[..., Path], tmp_path: Path) -> None:
    saved = adapted(base(), tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["down_proj"])
    with AutoModel.from_pretrained(base(), adapter=saved) as model:
        assert_equal(model, answers(through_peft(resident(base()), saved)))
    assert "uncompressed" in refusal(base(), saved, UnsupportedModelError, compression="8bit")


def test_experts_that_are_merged_now(tmp_path: Path, adapter: Path) -> None:
    folder, old = tmp_path / "mixtral", tmp_path / "old"
    tiny_models.save_tiny("mixtral", folder)
    shutil.copytree(adapter, old)
    name = f"{PREFIX}model.layers.0.block_sparse_moe.experts.0.w1.lora_"
    save_file({f"{name}A.weight": torch.zeros(8, 64), f"{name}B.weight": torch.zeros(128, 8)}, old / WEIGHTS)
    text = refusal(folder, old, UnsupportedModelError)
    assert "block_sparse_moe.experts.0.w1" in text and "merge" in text


def test_one_takes_the_place_of_the_other(base: Callable[..., Path], adapter: Path) -> None:
    assert "not an adapter" in refusal(base(), base(), CheckpointError)
    with pytest.raises(CheckpointError, match="--adapter"):
        AutoModel.from_pretrained(adapter)


@pytest.mark.parametrize(("given", "word"), [(["a", "b"], "2 adapters"), (" ", "names no adapter"), (3, "adapter=3")])
def test_options_that_name_no_adapter(base: Callable[..., Path], given: Any, word: str) -> None:
    assert word in refusal(base(), given, OptionError)


# ---- shell, notebook, Hub --------------------------------------------------------------------------------------------


@pytest.fixture
def expected(base: Callable[..., Path], adapter: Path) -> str:
    """What PEFT answers to "hi"."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base())
    ids = tokenizer("hi", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        answer = through_peft(resident(base()), adapter).generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))


def test_the_command(base: Callable[..., Path], adapter: Path, expected: str, capsys: Any) -> None:
    assert main(["generate", str(base()), "hi", "-n", "6", "--adapter", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected
    assert main(["plan", str(base()), "--adapter", str(adapter), "--adapter", str(adapter)]) == 2
    assert "2 adapters" in capsys.readouterr().err


def test_the_magic(base: Callable[..., Path], adapter: Path, expected: str, capsys: Any) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    try:
        for cell in (
            "%load_ext airllm_nb",
            f'%airllm_load "{base()}" --adapter "{adapter}" -o m --dashboard none',
            "%%airllm_generate -n 6 -o answer\nhi",
        ):
            done = shell.run_cell(cell)
            assert done.error_in_exec is None and done.error_before_exec is None
        assert shell.user_ns["answer"].text == expected
        assert "plain: r=8, 8 modules" in capsys.readouterr().out
    finally:
        shell.run_cell("%unload_ext airllm_nb")
        InteractiveShell.clear_instance()


# Each call is [name, weights, options]; one fresh process, whose Hub and cache are the test's own.
ON_THE_HUB = """
import json, sys
from airllm_nb.checkpoint.lora.adapter import read_adapter
from airllm_nb.config import LoadOptions
from airllm_nb.errors import AirLLMError

def read(name, weights, options):
    try:
        found = read_adapter(name, LoadOptions.create(revision="of-the-model", **options), weights=weights)
    except AirLLMError as error:
        return [type(error).__name__, str(error)]
    return [str(found), found.file.is_file(), [pair.a.extents[0].offset for pair in found.pairs]]

print(json.dumps([read(*call) for call in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serve() as hub:
        yield hub


def test_an_adapter_on_the_hub(hub: hub_server.Hub, hub_env: Callable[[str], dict[str, str]], adapter: Path) -> None:
    name, offline = "someone/adapter", {"local_files_only": True}
    content = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    hub.repositories[name] = content | {"optimizer.pt": b"x" * 1000}
    hub.repositories["someone/model"] = {"config.json": b"{}", "model.safetensors": b""}
    calls = [
        [name, False, {}], [name, True, {}], [name, True, offline],
        ["someone/other", True, offline], ["someone/nothing", True, {}], ["someone/model", True, {}],
    ]  # fmt: skip
    command = [sys.executable, "-c", ON_THE_HUB, json.dumps(calls)]
    done = subprocess.run(command, env=hub_env(hub.endpoint), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    planned, loaded, cached, other, nothing, model = json.loads(done.stdout.splitlines()[-1])
    here = read_adapter(adapter, LoadOptions())
    said, lies_at = str(here).replace("plain", name), [pair.a.extents[0].offset for pair in here.pairs]
    assert planned == [said, False, lies_at]
    assert loaded == cached == [said, True, lies_at]
    header, data = int.from_bytes(content[WEIGHTS][:8], "little"), content[WEIGHTS]
    # The plan asks for the header, and not for a byte of a weight.
    sent = [(first, count) for file, first, count in hub.sent if file == WEIGHTS]
    assert sent[:2] == [(0, 8), (8, header)] and sum(count for _, count in sent[2:]) == len(data)
    assert "optimizer.pt" not in hub.downloads()
    assert other[0] == "SourceError" and "local cache" in other[1]
    assert nothing[0] == "SourceError" and "someone/nothing" in nothing[1]
    assert model[0] == "CheckpointError" and "a model, not an adapter" in model[1]
