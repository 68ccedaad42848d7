"""Checkpoints that ship code of their own: what the native classes make of them is what that code computed."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from airllm_nb import AutoModel
from airllm_nb.checkpoint.legacy.families import FAMILIES, native_dict
from airllm_nb.checkpoint.legacy.sentencepiece import read_model
from airllm_nb.config import LoadOptions
from airllm_nb.decode.prompt import encode
from airllm_nb.decode.tokenizer import load_tokenizer
from airllm_nb.engine.facade import plan_model
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedModelError
from airllm_nb.model.attention import slopes
from airllm_nb.tensors.index import Extent, TensorInfo

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ("chatglm", "qwen", "qwen_long", "baichuan2_7b", "baichuan2_13b", "internlm_dynamic", "internlm2")
TOKENIZERS = ("chatglm", "qwen", "baichuan2_7b", "baichuan2_13b", "internlm", "internlm2", "mistral")
STREAMED = {"vram_budget": "1MiB", "ram_budget": "1MiB", "max_seq_len": 96}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.0}

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, **{"dtype": "float32", **options})


def prompts(name: str) -> list[torch.Tensor]:
    golden = np.load(GOLDEN / name / "golden.npz")
    return [torch.from_numpy(golden[f"input_ids_{number}"])[None] for number in (0, 1)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    for file in sorted(folder.glob("pytorch_model*.bin")):
        state |= torch.load(file, weights_only=True)
    return state


def copy_of(name: str, target: Path, kind: str | None = None, **config: Any) -> Path:
    """The checkpoint in ``target`` with another config, as one file of ``kind`` (``"bin"``, ``"safetensors"``)."""
    source = GOLDEN / name / "checkpoint"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.bin*", "*.safetensors*") if kind else None)
    if kind == "safetensors":
        save_file({key: value.contiguous() for key, value in weights(source).items()}, target / "model.safetensors")
    elif kind == "bin":
        torch.save(weights(source), target / "pytorch_model.bin")
    values = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))
    return target


def as_native(name: str, target: Path) -> Path:
    """The checkpoint as its native class would have saved it."""
    config = json.loads((GOLDEN / name / "checkpoint" / "config.json").read_text())
    with opened(GOLDEN / name / "checkpoint") as model:
        ids = torch.arange(4)[None]
        model(ids)
        model.native.config.save_pretrained(target)
        shapes = {key: tuple(value.shape) for key, value in model.native.state_dict().items()}
    family = FAMILIES[config["model_type"]]
    state = weights(GOLDEN / name / "checkpoint")
    native: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        info = TensorInfo(key, "U8", tuple(value.shape), (Extent(Path(key), 0, math.prod(value.shape)),))
        for other, part in family.native_tensors({key: info}, config).items():
            width = max(math.prod(value.shape[1:]), 1)
            rows = [value[e.offset // width : (e.offset + e.nbytes) // width] for e in part.extents]
            native[other] = torch.cat(rows).float().contiguous()
    for head in family.normalised(config):
        native[head] = torch.nn.functional.normalize(native[head])
    assert {key: tuple(value.shape) for key, value in native.items()} == shapes
    save_file(native, target / "model.safetensors")
    return target


# ---- what the original code computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_greedy_tokens_are_those_of_the_original(name: str, kind: str, tmp_path: Path) -> None:
    golden = np.load(GOLDEN / name / "golden.npz")
    folder = copy_of(name, tmp_path / "m", kind)
    for options in ({}, STREAMED):
        with opened(folder, layer_shards_saving_path=tmp_path / "shards", **options) as model:
            for number, ids in enumerate(prompts(name)):
                expected = torch.from_numpy(golden[f"logits_{number}"])[None]
                torch.testing.assert_close(model(ids).logits, expected, atol=5e-5, rtol=0)
                # The original keeps no cache that is true past the trained length: it computed all anew.
                answer = model.generate(ids, **GREEDY, use_cache=name != "qwen_long")[0, ids.shape[1] :]
                assert answer.tolist() == golden[f"greedy_{number}"].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_gives_the_ids_of_the_original(name: str) -> None:
    tokenizer = load_tokenizer(GOLDEN / name / "checkpoint")
    cases = json.loads((GOLDEN / name / "tokenizer_golden.json").read_text())["cases"]
    assert len(cases) == 20
    for case in cases:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]
        plain = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        assert plain == case["ids_no_special"], case["text"]
        if case["plain_text"] and "é" not in case["text"]:
            assert tokenizer.decode(plain) == case["text"]


def test_llamas_tokenizer_is_right_without_its_newer_file(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "mistral" / "checkpoint", tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "m")
    for case in json.loads((GOLDEN / "mistral" / "tokenizer_golden.json").read_text())["cases"]:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]
    written = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert written == "<s>[INST] hi [/INST]"


def test_a_padded_batch_is_that_of_the_original() -> None:
    tokenizer = load_tokenizer(GOLDEN / "chatglm" / "checkpoint")
    expected = json.loads((GOLDEN / "chatglm" / "tokenizer_golden.json").read_text())["batch_padded"]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in expected["input_ids"]]
    made = tokenizer([text.removeprefix("[gMASK]sop ") for text in texts], padding=True)
    assert made["input_ids"] == expected["input_ids"]
    assert made["attention_mask"] == expected["attention_mask"]


# ---- chats -----------------------------------------------------------------------------------------------------------


def ids_of(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text, inputs = encode(tokenizer, messages)
    made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert inputs["input_ids"][0].tolist() == made
    assert text
    return made


TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "How are you?"},
]


def test_chatglms_chat_is_that_of_the_original() -> None:
    golden = json.loads((GOLDEN / "chatglm" / "tokenizer_golden.json").read_text())
    tokenizer = load_tokenizer(GOLDEN / "chatglm" / "checkpoint")
    assert ids_of(tokenizer, [{"role": "system", "content": "Be kind."}, *TURNS]) == golden["chat_ids"]
    special = golden["special_tokens"]
    assert tokenizer.chat_stop_ids == [2, special["<|user|>"], special["<|observation|>"]]
    # Afterwards plain text is plain again.
    assert special["<|user|>"] not in tokenizer("<|user|> hi")["input_ids"]


def test_chatglm2_has_a_format_of_its_own(tmp_path: Path) -> None:
    folder = copy_of("chatglm", tmp_path / "m", "bin", _name_or_path="THUDM/chatglm2-6b")
    tokenizer = load_tokenizer(folder)
    text, inputs = encode(tokenizer, TURNS)
    assert text == "[gMASK]sop[Round 1]\n\n问：hi\n\n答：hello\n\n[Round 2]\n\n问：How are you?\n\n答："
    assert inputs["input_ids"][0].tolist() == tokenizer(text.removeprefix("[gMASK]sop"))["input_ids"]


def joined(tokenizer: Any, *parts: int | str) -> list[int]:
    """Ids as an original chat puts them together: numbers as they are, each text encoded by itself."""
    encoded = [
        [part] if isinstance(part, int) else tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts
    ]
    return [number for ids in encoded for number in ids]


def test_qwens_chat() -> None:
    tokenizer = load_tokenizer(GOLDEN / "qwen" / "checkpoint")
    end, start, stop = 300, 301, 302
    parts = [start, "system", "\n", "You are a helpful assistant.", stop, "\n"]
    for turn in TURNS:
        parts += [start, turn["role"], "\n", turn["content"], stop, "\n"]
    assert ids_of(tokenizer, TURNS) == joined(tokenizer, *parts, start, "assistant", "\n")
    assert sorted(tokenizer.chat_stop_ids) == [end, start, stop]


def test_baichuan2s_chat_names_its_roles_by_number(tmp_path: Path) -> None:
    folder = copy_of("baichuan2_7b", tmp_path / "m", "bin")
    assert load_tokenizer(folder).chat_template is None  # here the numbers are bytes, which no text can say
    user, assistant = [n for n, piece in enumerate(read_model(folder / "tokenizer.model").pieces) if piece.kind == 4][
        -2:
    ]
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"user_token_id": user, "assistant_token_id": assistant}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    expected = joined(tokenizer, "Be kind.", user, "hi", assistant, "hello", user, "How are you?", assistant)
    assert ids_of(tokenizer, [{"role": "system", "content": "Be kind."}, *TURNS]) == expected


def test_internlms_chats() -> None:
    first = load_tokenizer(GOLDEN / "internlm" / "checkpoint")
    human, robot = first.convert_tokens_to_ids(["<eoh>", "<eoa>"])
    expected = joined(first, 1, "<|User|>:hi", human, "\n<|Bot|>:hello", robot, "\n<|User|>:How are you?", human)
    assert ids_of(first, TURNS) == expected + joined(first, "\n<|Bot|>:")
    assert first.chat_stop_ids == [2, robot]
    second = load_tokenizer(GOLDEN / "internlm2" / "checkpoint")
    start, stop = second.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (start, stop) == (494, 493)
    parts: list[int | str] = [1]
    for turn in TURNS:
        parts += [start, f"{turn['role']}\n{turn['content']}", stop, "\n"]
    assert ids_of(second, TURNS) == joined(second, *parts, start, "assistant\n")


# ---- one way to compute, whatever came before and beside -------------------------------------------------------------


@pytest.mark.parametrize("name", [*FOLDERS, "internlm_dynamic past its length"])
def test_a_padded_batch_is_each_prompt_alone(name: str, tmp_path: Path) -> None:
    name, is_long = name.split()[0], " " in name
    folder = copy_of(name, tmp_path / "m", max_position_embeddings=12) if is_long else GOLDEN / name / "checkpoint"
    short, long = prompts(name)
    pad = long.shape[1] - short.shape[1]
    batch = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    with opened(folder) as model:
        alone = [model.generate(ids, **GREEDY)[0, ids.shape[1] :] for ids in (short, long)]
        together = model.generate(
            batch, attention_mask=mask, **GREEDY, return_dict_in_generate=True, output_logits=True
        )
        assert together.sequences[:, batch.shape[1] :].tolist() == [answer.tolist() for answer in alone]
        last = torch.stack([model(ids).logits[0, -1] for ids in (short, long)])
        torch.testing.assert_close(together.logits[0], last, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen_long", "baichuan2_13b", "internlm_dynamic"])
def test_a_cache_with_free_room_changes_nothing(name: str, tmp_path: Path) -> None:
    folder = (
        copy_of(name, tmp_path / "m", max_position_embeddings=12) if "intern" in name else GOLDEN / name / "checkpoint"
    )
    short, long = prompts(name)
    with opened(folder) as model:
        for ids in (short, long):
            expected = model.generate(ids, **GREEDY)
            assert model.generate(ids, **GREEDY, cache_implementation="static").equal(expected)


def test_stretching_angles_are_transformers_own_and_do_not_remember(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = copy_of("internlm_dynamic", tmp_path / "m", max_position_embeddings=16)
    native = as_native("internlm_dynamic", tmp_path / "native")
    ids = torch.cat(prompts("internlm_dynamic"), 1)
    with opened(folder) as model, torch.inference_mode():
        for length in (46, 12, 30, 17, 46):
            config = LlamaConfig.from_pretrained(native, max_position_embeddings=16, attn_implementation="sdpa")
            config.rope_parameters = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10000.0}
            fresh = LlamaForCausalLM.from_pretrained(native, config=config, dtype=torch.float32)
            part = ids[:, :length]
            torch.testing.assert_close(model(part).logits, fresh(part).logits, atol=5e-5, rtol=0)
        assert model.generate(ids, max_new_tokens=4).shape[1] == 50


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FOLDERS)
def test_in_half_precision_it_is_nearly_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    golden = np.load(GOLDEN / name / "golden.npz")
    with opened(GOLDEN / name / "checkpoint", dtype=dtype, layer_shards_saving_path=tmp_path) as model:
        ids = prompts(name)[1]
        expected = torch.from_numpy(golden["logits_1"])
        error = (model(ids).logits[0].float() - expected).abs().max() / expected.abs().max()
        assert 0 < error < (0.05 if dtype == "bfloat16" else 0.01)
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_alibi_goes_through_a_prompt_in_parts() -> None:
    golden = np.load(GOLDEN / "baichuan2_13b" / "golden.npz")
    with opened(GOLDEN / "baichuan2_13b" / "checkpoint", **STREAMED) as model:
        ids = prompts("baichuan2_13b")[1]
        answer = model.generate(ids, **GREEDY, prefill_chunk_size=5)[0, ids.shape[1] :]
        assert answer.tolist() == golden["greedy_1"].tolist()


def test_alibis_slopes() -> None:
    torch.testing.assert_close(slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]))
    torch.testing.assert_close(slopes(6), torch.tensor([2.0**-n for n in (2, 4, 6, 8, 1, 3)]))
    made = slopes(40)  # Baichuan2-13B
    assert len(made) == 40
    torch.testing.assert_close(made[:32], torch.tensor([2 ** (-n / 4) for n in range(1, 33)]))
    torch.testing.assert_close(made[32:], torch.tensor([2 ** (-n / 8) for n in range(1, 17, 2)]))


@pytest.mark.parametrize(
    ("name", "compression"), [("chatglm", "4bit"), ("qwen", "8bit"), ("baichuan2_7b", "4bit"), ("internlm2", "8bit")]
)
def test_compressed_it_is_the_compressed_native_model(name: str, compression: str, tmp_path: Path) -> None:
    native = as_native(name, tmp_path / "native")
    ids = prompts(name)[1]
    options = {"compression": compression, "layer_shards_saving_path": tmp_path / "shards"}
    with opened(native, **options) as model:
        expected = model(ids).logits
    with opened(GOLDEN / name / "checkpoint", **options, **STREAMED) as model:
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    assert {path.name.split("--")[1] for path in (tmp_path / "shards").iterdir()} == {compression}
    store = next(path for path in (tmp_path / "shards").iterdir() if path.name.startswith("checkpoint"))
    with opened(store, dtype="float32") as model:  # a store is a model of its own, tokenizer included
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
        assert model.tokenizer("hi")["input_ids"] == load_tokenizer(GOLDEN / name / "checkpoint")("hi")["input_ids"]


@pytest.mark.parametrize(("name", "compression"), [("baichuan2_13b", "8bit"), ("internlm_dynamic", "8bit")])
def test_compressed_it_still_attends_its_own_way(name: str, compression: str, tmp_path: Path) -> None:
    golden = np.load(GOLDEN / name / "golden.npz")
    with opened(GOLDEN / name / "checkpoint", compression=compression, layer_shards_saving_path=tmp_path) as model:
        logits = model(prompts(name)[1]).logits[0]
        error = (logits - torch.from_numpy(golden["logits_1"])).abs().max()
        assert 0 < error < 0.2 * np.abs(golden["logits_1"]).max()


# ---- at rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_plan_writes_nothing(name: str, kind: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path / "m", kind)
    plan = plan_model(folder, LoadOptions(layer_shards_saving_path=tmp_path / "shards", vram_budget="64MiB"))
    assert plan.sweep_seconds > 0
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("name", ["qwen", "internlm2", "internlm_dynamic", "chatglm"])
def test_splits_and_names_are_extents_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path / "m", "safetensors")
    with opened(folder, layer_shards_saving_path=tmp_path / "shards") as model:
        model(prompts(name)[0])
        assert model.folder == folder
    assert not (tmp_path / "shards").exists()


def test_of_baichuan2_only_the_head_is_written_and_only_once(tmp_path: Path) -> None:
    folder = copy_of("baichuan2_7b", tmp_path / "m", "safetensors")
    shards = tmp_path / "shards"
    times = set()
    for _ in range(2):
        with opened(folder, layer_shards_saving_path=shards) as model:
            assert model.folder == folder
        (written,) = shards.rglob("*.safetensors")
        times.add(written.stat().st_mtime_ns)
    assert len(times) == 1
    state = load_file(written)
    assert {key for key in state if not key.startswith("__pad")} == {"lm_head.weight"}
    torch.testing.assert_close(state["lm_head.weight"].norm(dim=1), torch.ones(512))


def test_the_first_baichuan_keeps_its_head() -> None:
    family = FAMILIES["baichuan"]
    assert family.normalised({"vocab_size": 64000}) == ()
    assert family.normalised({"vocab_size": 125696}) == ("lm_head.weight",)


def test_weights_that_are_not_of_this_config_are_refused(tmp_path: Path) -> None:
    folder = copy_of("chatglm", tmp_path / "m", "safetensors", multi_query_group_num=4)
    with pytest.raises(CheckpointError, match=r"query_key_value.* has 128 rows, config.json asks for 192"):
        opened(folder)


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    folder = copy_of("baichuan2_7b", tmp_path / "m", "safetensors")
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        opened(folder, layer_shards_saving_path=tmp_path / "shards")


@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
@pytest.mark.parametrize("name", ["chatglm", "qwen", "baichuan2_7b", "internlm", "internlm2"])
def test_a_damaged_vocabulary_is_said_in_one_line(name: str, damage: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path / "m", "none")
    file = next(iter([*folder.glob("*.tiktoken"), *folder.glob("tokenizer.model")]))
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-2000] if damage == "truncated" else b"version https://git-lfs\n" * 5)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert "download it again" in str(caught.value)


REFUSED = [
    ("chatglm", {"quantization_bit": 4}, "quantization_bit.*unquantised"),
    ("chatglm", {"pre_seq_len": 128}, "pre_seq_len"),
    ("chatglm", {"multi_query_attention": False}, "multi_query_attention"),
    ("chatglm", {"add_bias_linear": True}, "add_bias_linear"),
    ("chatglm", {"rmsnorm": False}, "rmsnorm"),
    ("chatglm", {"post_layer_norm": False}, "post_layer_norm"),
    ("chatglm", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
    ("chatglm", {"position_encoding_2d": True}, "first ChatGLM-6B.*chatglm3"),
    ("chatglm", {"padded_vocab_size": 151552}, "GLM-4.*glm-4-9b-chat-hf"),
    ("chatglm", {"vision_config": {"hidden_size": 8}}, "vision"),
    ("chatglm", {"architectures": ["ChatGLMForSequenceClassification"]}, "ForSequenceClassification.*no causal"),
    ("qwen", {"visual": {"width": 8}}, "Qwen-VL.*Qwen2-VL"),
    ("qwen", {"audio": {"width": 8}}, "Qwen-Audio"),
    ("qwen", {"no_bias": False}, "no_bias"),
    ("qwen", {"rotary_pct": 0.5}, "rotary_pct"),
    ("qwen", {"kv_channels": 32}, "kv_channels"),
    ("qwen", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised.*compression='4bit'"),
    ("baichuan2_7b", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
    ("baichuan2_7b", {"hidden_act": "gelu"}, "silu"),
    ("internlm_dynamic", {"rotary": {"base": 10000, "type": "yarn"}}, "rotary"),
    ("internlm2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
    ("internlm2", {"architectures": ["InternLM2ForRewardModel"]}, "RewardModel.*no causal"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_unsupported_variants_are_refused_by_name(name: str, change: dict, message: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path / "m", "none", **change)  # before a word about weights: there are none
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        opened(folder, layer_shards_saving_path=tmp_path / "shards")
    assert architecture in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards").exists()


def test_a_config_that_lacks_a_size_is_no_traceback(tmp_path: Path) -> None:
    for name in ("chatglm", "qwen", "baichuan2_7b", "internlm_dynamic", "internlm2"):
        folder = copy_of(name, tmp_path / name, "none", hidden_size="absent")
        with pytest.raises(CheckpointError, match="hidden_size"):
            opened(folder)
        folder = copy_of(name, tmp_path / f"{name}-2", "none", num_attention_heads="four")
        with pytest.raises(AirLLMError) as caught:
            opened(folder)
        assert "\n" not in str(caught.value)


def test_settings_that_the_small_checkpoints_do_not_have() -> None:
    """Awkward values reach the native config: biases, bases, epsilons, ties, grouped heads."""
    config = json.loads((GOLDEN / "internlm2" / "checkpoint" / "config.json").read_text())
    config |= {"bias": True, "rope_theta": 5000, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}
    native = native_dict(config | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert native["attention_bias"] and native["tie_word_embeddings"]
    assert native["rms_norm_eps"] == 1e-3
    assert native["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config = json.loads((GOLDEN / "chatglm" / "checkpoint" / "config.json").read_text())
    native = native_dict(config | {"rope_ratio": 50, "add_qkv_bias": False})
    assert native["rope_parameters"]["rope_theta"] == 500000.0
    assert not native["attention_bias"]
    config = json.loads((GOLDEN / "internlm" / "checkpoint" / "config.json").read_text())
    del config["bias"]
    assert native_dict(config | {"rope_theta": 7})["rope_parameters"]["rope_theta"] == 10000.0
    assert native_dict(config)["attention_bias"]


# ---- as people use them ----------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.usefixtures("cuda_is_here")
def test_the_snippet_of_the_guide_runs(name: str, padding: bool, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path / "m")
    vocabulary = {"qwen_long": "qwen", "internlm_dynamic": "internlm"}.get(name)
    if vocabulary:
        for file in (GOLDEN / vocabulary / "checkpoint").glob("*token*"):
            shutil.copy(file, folder)
    MAX_LENGTH = 128
    model = AutoModel.from_pretrained(str(folder))
    input_text = ["What is the capital of China?"]
    input_tokens = model.tokenizer(
        input_text,
        return_tensors="pt",
        return_attention_mask=False,
        truncation=True,
        max_length=MAX_LENGTH,
        padding=padding,
    )
    generation_output = model.generate(
        input_tokens["input_ids"].cuda(), max_new_tokens=5, use_cache=True, return_dict_in_generate=True
    )
    output = model.tokenizer.decode(generation_output.sequences[0])
    assert "What is the capital of China?" in output
    model.close()


@pytest.fixture(scope="module")
def shell() -> Any:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    InteractiveShell.clear_instance()
    yield InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    InteractiveShell.clear_instance()


@pytest.fixture
def cell(shell: Any, capsys: Any) -> Any:
    def run(text: str) -> str:
        capsys.readouterr()
        done = shell.run_cell(text)
        out, err = capsys.readouterr()
        assert done.success, out + err
        return out

    run("%load_ext airllm_nb")
    yield run
    run("%airllm_unload")
    shell.user_ns.pop("m", None)
    run("%unload_ext airllm_nb")
    gc.collect()


@pytest.mark.parametrize("name", ["chatglm", "qwen", "baichuan2_7b", "baichuan2_13b", "internlm2"])
def test_one_line_loads_it_and_one_cell_generates(name: str, cell: Callable[[str], str], shell: Any) -> None:
    golden = np.load(GOLDEN / name / "golden.npz")
    folder = GOLDEN / name / "checkpoint"
    cell(f"%airllm_load {folder} --dtype float32 --vram 1MiB --ram 1MiB --max-seq-len 96 -o m --dashboard none")
    logits = shell.user_ns["m"](prompts(name)[0]).logits[0]
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_0"]), atol=5e-5, rtol=0)
    cell("%%airllm_generate -n 4 -t 0 -o answer\nHello world")
    assert len(shell.user_ns["answer"].token_ids) == 4
