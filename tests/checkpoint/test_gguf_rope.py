"""RoPE scaling in GGUF files: the frequencies and the logits of the model that the file was made from."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from airllm_nb import AutoModel
from airllm_nb.checkpoint.gguf.header import read_gguf
from airllm_nb.checkpoint.gguf.weights import gguf_config
from airllm_nb.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
# The sixth layer of Gemma 3 is the first without a window.
WORDS, LAYERS, HEADS, KV_HEADS, HEAD, INNER = 64, 6, 4, 2, 16, 96
HIDDEN = HEADS * HEAD
IDS = torch.arange(48).unsqueeze(0) % WORDS


class Case(NamedTuple):
    """A model, and what llama.cpp's converter writes of its RoPE scaling beside what every file has."""

    arch: str
    model_type: str
    config: dict[str, Any]
    fields: dict[str, Any]
    tensors: dict[str, list[float]] = {}  # noqa: RUF012 - never changed


def llama3_factors(rope: dict[str, Any]) -> list[float]:
    """As the converter of llama.cpp computes them."""
    factors = []
    for number in range(0, HEAD, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (number / HEAD)
        low, high, length = (rope[name] for name in ("low_freq_factor", "high_freq_factor", ORIGINAL))
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          ORIGINAL: 8192}  # fmt: skip
LLAMA32 = {**LLAMA3, "factor": 32.0}
OTHER3 = {**LLAMA3, "rope_theta": 1e4, "factor": 5.0, "high_freq_factor": 9.0, ORIGINAL: 40}
LONG, SHORT = [1.5 + number for number in range(6)], [1.0 + number / 10 for number in range(6)]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": LONG, "short_factor": SHORT}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, ORIGINAL: 32}
YARN_FIELDS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
MORE_YARN = {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
GEMMA = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
         "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}  # fmt: skip

CASES = {
    "Llama 3.1": Case("llama", "llama", {"rope_parameters": LLAMA3}, {},
                      {"rope_freqs.weight": llama3_factors(LLAMA3)}),
    "Llama 3.2": Case("llama", "llama", {"rope_parameters": LLAMA32}, {},
                      {"rope_freqs.weight": llama3_factors(LLAMA32)}),
    "like Llama 3, by other numbers": Case("llama", "llama", {"rope_parameters": OTHER3}, {},
                                           {"rope_freqs.weight": llama3_factors(OTHER3)}),
    "yarn": Case("llama", "llama", {"rope_parameters": YARN}, YARN_FIELDS),
    "yarn, all of it": Case("qwen2", "qwen2", {"rope_parameters": YARN | MORE_YARN}, {
        **YARN_FIELDS, "rope.scaling.yarn_attn_factor": 1.25, "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0}),
    "linear": Case("llama", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}},
                   LINEAR),
    "linear, in an old file": Case(
        "llama", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}},
        {"rope.scale_linear": 8.0}),
    "Gemma 3": Case("gemma3", "gemma3_text", {"rope_parameters": GEMMA, "sliding_window": 16},
                    {**LINEAR, "attention.sliding_window": 16}),
    "Phi-4": Case("phi3", "phi3", {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75}, ORIGINAL: 32,
                  "pad_token_id": 0, "eos_token_id": 1}, {
        "rope.scaling.original_context_length": 32, "rope.dimension_count": 12,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(512) / math.log(32))},
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}),
}  # fmt: skip


def made_from(case: Case) -> Any:
    """The model, small and random."""
    common = {"vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
              "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 1 << 14,
              "initializer_range": 0.3, "tie_word_embeddings": False}  # fmt: skip
    head = {} if case.model_type == "phi3" else {"head_dim": HEAD}
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **common, **head, **case.config)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def values_of(case: Case, name: str, tensor: torch.Tensor) -> np.ndarray:
    """A parameter as the converter stores it."""
    values = tensor.detach().numpy()
    if case.arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = HEADS if ".attn_q." in name else KV_HEADS
        values = values.reshape(heads, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(values.shape)
    if case.arch == "gemma3" and "norm" in name:
        values = values + 1
    return np.ascontiguousarray(values)


def written(path: Path, case: Case, model: Any, **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, case.arch)
    writer.add_name("tiny")
    theta = case.config["rope_parameters"].get("full_attention", case.config["rope_parameters"])["rope_theta"]
    fields = {
        "block_count": LAYERS, "context_length": 1 << 14, "embedding_length": HIDDEN, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "vocab_size": WORDS,
        "attention.layer_norm_rms_epsilon": float(model.config.rms_norm_eps), "rope.freq_base": theta,
        "rope.dimension_count": HEAD, "attention.key_length": HEAD, **case.fields, **more,
    }  # fmt: skip
    add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
    for key, value in fields.items():
        add[type(value)](f"{case.arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "abb", *(f"t{number}" for number in range(WORDS - 4))])
    writer.add_token_merges(["a b", "ab b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    for name, factors in case.tensors.items():
        writer.add_tensor(name, np.array(factors, np.float32))
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{kind}"
        writer.add_tensor(stored, values_of(case, stored, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def frequencies(model: Any) -> dict[str, torch.Tensor]:
    """Of every kind of layer, those for long contexts too."""
    rotary = model.model.rotary_emb
    found = {name: tensor for name, tensor in rotary.named_buffers() if name.endswith("inv_freq")}
    return found | {name: value for name, value in vars(rotary).items() if name.endswith("long_inv_freq")}


@pytest.mark.parametrize("name", CASES)
def test_the_scaling_of_the_original_model(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    original = made_from(case)
    path = written(tmp_path / "tiny.gguf", case, original)
    with torch.inference_mode():
        short, long = original(IDS[:, :20]).logits, original(IDS).logits
        wanted = frequencies(original)
    with AutoModel.from_pretrained(path, dtype="float32", layer_shards_saving_path=tmp_path / "shards") as model:
        for length, logits in ((20, short), (48, long)):
            torch.testing.assert_close(model(IDS[:, :length]).logits, logits, rtol=1e-4, atol=1e-4 * logits.abs().max())
        found = frequencies(model.native)
        assert found.keys() == wanted.keys() or name == "like Llama 3, by other numbers"
        assert all(torch.allclose(found[key], wanted[key], rtol=1e-6, atol=0) for key in wanted)
    assert not [record for record in caplog.records if record.name == "airllm_nb.checkpoint.gguf.rope"]


def test_llama_3_is_called_by_its_name(tmp_path: Path) -> None:
    case = CASES["Llama 3.2"]
    path = written(tmp_path / "tiny.gguf", case, made_from(case))
    assert gguf_config(read_gguf(path)).rope_parameters == LLAMA32


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rope.scaling.type": "longrope"}, "scaling.type=longrope.; beyond 64 tokens"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, "out .rope.scaling.yarn_ext_factor=0.5.;"),
        ({"rope.scaling.type": "none"}, ""),
    ],
)  # fmt: skip
def test_what_has_no_word_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Any], said: str
) -> None:
    case = Case("llama", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, more)
    length = {"rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64}
    file = read_gguf(written(tmp_path / "tiny.gguf", case, made_from(case), **length))
    gguf_config(file)
    gguf_config(file)
    lines = [record.getMessage() for record in caplog.records if record.name == "airllm_nb.checkpoint.gguf.rope"]
    assert len(lines) == bool(said), "once"
    assert all(line.startswith("tiny.gguf: its RoPE scaling") and re.search(said, line) for line in lines)


def test_factors_for_other_heads_are_refused(tmp_path: Path) -> None:
    case = CASES["Llama 3.1"]._replace(tensors={"rope_freqs.weight": [1.0, 2.0]})
    path = written(tmp_path / "tiny.gguf", case, made_from(case))
    with pytest.raises(CheckpointError, match=r"damaged: 'rope_freqs.weight' has 2 values, for heads of which 16 are"):
        gguf_config(read_gguf(path))


@pytest.mark.parametrize(("layers", "width", "heads", "scalar"), [(62, 5376, 32, 168), (48, 3840, 16, 256)])
def test_the_largest_gemma_divides_by_another_number(layers: int, width: int, heads: int, scalar: int) -> None:
    """As their published configs say; no key of a GGUF file does."""
    from transformers import Gemma3TextConfig

    from airllm_nb.checkpoint.gguf.weights import _scale_attention

    config = Gemma3TextConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads)
    _scale_attention(config, "gemma3")
    assert config.query_pre_attn_scalar == scalar
