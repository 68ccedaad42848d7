"""What we write, against bitsandbytes and transformers themselves."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch import nn

from airllm_nb.encoding import nf4
from airllm_nb.encoding.base import Encoding, encoded
from airllm_nb.encoding.formats import get_encoding
from airllm_nb.encoding.linear import EncodedLinear
from airllm_nb.encoding.scratch import Scratch
from airllm_nb.errors import OptionError
from airllm_nb.model.placing import compressible
from airllm_nb.tensors.dtypes import TORCH_DTYPES

SHAPES = [(96, 128), (33, 100), (7, 9), (5, 1), (64, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def bound(codec: Encoding, weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None, scratch: Scratch):
    """A module in the place of a linear layer, with its parts bound as the executor binds them."""
    module = EncodedLinear(encoded(codec, tuple(weight.shape)), bias is not None, dtype, scratch)
    for attribute, part in codec.encode(weight).items():
        assert module._parameters[attribute].shape == part.shape
        module._parameters[attribute] = nn.Parameter(part, requires_grad=False)
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return module


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [None, "4bit", "8bit"])
def test_parts_are_what_encode_gives(name, shape):
    codec, weight = get_encoding(name), torch.randn(shape)
    encoded = codec.encode(weight)
    parts = codec.parts(shape, "F32")
    assert [part.attribute for part in parts] == list(encoded)
    for part in parts:
        tensor = encoded[part.attribute]
        assert (part.shape, TORCH_DTYPES[part.dtype], part.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert len(part.shape) == 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_encoding_in_chunks_of_rows_gives_the_same_bytes(name, shape):
    codec, weight = get_encoding(name), torch.randn(shape).bfloat16()
    whole, step = codec.encode(weight), codec.encodable_rows(shape)
    chunks = [codec.encode(weight[first : first + step]) for first in range(0, shape[0], step)]
    for attribute, tensor in whole.items():
        assert torch.equal(torch.cat([chunk[attribute].reshape(-1) for chunk in chunks]), tensor.reshape(-1))


def test_4bit_is_what_bitsandbytes_stores():
    import bitsandbytes as bnb

    weight = torch.randn(96, 128).bfloat16()
    reference = bnb.nn.Params4bit(weight.clone(), compress_statistics=False, quant_type="nf4", requires_grad=False)
    reference = reference.to("cpu")
    encoded = get_encoding("4bit").encode(weight)
    assert torch.equal(encoded["weight"].reshape(-1), reference.data.reshape(-1))
    assert torch.equal(encoded["absmax"].reshape(-1), reference.quant_state.absmax)


@pytest.mark.parametrize("shape", [(64, 32), (64, 96), (33, 100), (7, 9), (64, 128)])
def test_4bit_dequantises_by_the_definition(shape):
    """bitsandbytes' own CPU kernel does not, where blocks cross rows."""
    weight = torch.randn(shape) * torch.tensor([1.0, 8.0]).repeat(shape[0])[: shape[0], None]
    encoded = get_encoding("4bit").encode(weight)
    packed = encoded["weight"].reshape(-1).long()
    code = nf4._code("nf4", torch.device("cpu"))[torch.stack([packed >> 4, packed & 15], 1).view(-1)]
    expected = code[: weight.numel()] * encoded["absmax"].reshape(-1).repeat_interleave(64)[: weight.numel()]
    module = bound(get_encoding("4bit"), weight, torch.float32, None, Scratch())
    assert torch.equal(module.weight.matrix(0), expected.view(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_4bit_forward_equals_bitsandbytes(dtype, tokens, with_bias):
    import bitsandbytes as bnb

    weight, x = (torch.randn(96, 128) * 0.02).to(dtype), torch.randn(2, tokens, 128).to(dtype)
    bias = torch.randn(96).to(dtype) if with_bias else None
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    module = bound(get_encoding("4bit"), weight, dtype, bias, Scratch())
    assert torch.equal(module(x), bnb.matmul_4bit(x, packed.t(), quant_state=state, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_forward_is_near_the_plain_layer(name, shape, dtype):
    weight, bias, x = torch.randn(shape) * 0.02, torch.randn(shape[0]), torch.randn(3, shape[1])
    module = bound(get_encoding(name), weight.to(dtype), dtype, bias.to(dtype), Scratch())
    expected = nn.functional.linear(x, weight)
    error = (module(x.to(dtype)).float() - bias.to(dtype).float() - expected).norm() / expected.norm()
    assert error < (0.2 if name == "4bit" else 0.008) + 300 * torch.finfo(dtype).eps
    assert module(x).dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 100.0, 1e4])
def test_8bit_keeps_its_precision_at_any_scale(scale):
    weight = torch.randn(64, 256) * scale
    module = bound(get_encoding("8bit"), weight, torch.float32, None, Scratch())
    relative = (module.weight.matrix(0) - weight).norm() / weight.norm()
    assert relative < (0.006 if scale > 1e-4 else 0.03)


def test_8bit_keeps_constant_and_zero_blocks():
    weight = torch.cat([torch.zeros(1, 64), torch.full((1, 64), 0.5), torch.full((1, 64), -2.0)])
    assert torch.equal(bound(get_encoding("8bit"), weight, torch.float32, None, Scratch()).weight.matrix(0), weight)


def test_8bit_is_lossless_on_weights_that_were_quantised_before():
    """GGUF's Q4_1 has blocks of 32 between a least and a greatest value, too."""
    levels = torch.randint(0, 16, (32, 8, 32)).float()
    levels[..., 0], levels[..., 1] = 0, 15
    step, least = torch.rand(32, 8, 1) * 0.01 + 0.001, -torch.rand(32, 8, 1) * 0.1
    weight = (least.half().float() + levels * step.half().float()).view(32, 256)
    got = bound(get_encoding("8bit"), weight, torch.float32, None, Scratch()).weight.matrix(0)
    assert (got - weight).norm() / weight.norm() < 5e-4


def test_bytes_on_disk():
    parts = [get_encoding(name).parts((4096, 4096), "BF16") for name in (None, "4bit", "8bit")]
    plain, four, eight = (sum(part.nbytes for part in encoded) for encoded in parts)
    assert four / plain == pytest.approx(0.28125)
    assert eight / plain == pytest.approx(0.5625)


def test_one_scratch_serves_a_model_and_grows_to_the_largest():
    scratch = Scratch()
    small = bound(get_encoding("8bit"), torch.randn(8, 32), torch.float32, None, scratch)
    large = bound(get_encoding("8bit"), torch.randn(64, 64), torch.float32, None, scratch)
    with torch.inference_mode():
        large(torch.randn(1, 64))
    address = scratch.view((1,), torch.float32, torch.device("cpu")).data_ptr()
    small(torch.randn(1, 32))
    large(torch.randn(1, 64))
    assert scratch.nbytes == 64 * 64 * 4
    assert scratch.view((1,), torch.float32, torch.device("cpu")).data_ptr() == address
    scratch.close()
    scratch.close()
    assert scratch.nbytes == 0


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_rebinding_leaves_nothing_of_the_last_weight(name):
    codec, x = get_encoding(name), torch.randn(2, 64)
    first, second = torch.randn(32, 64), torch.randn(32, 64)
    module = bound(codec, first, torch.float32, None, Scratch())
    module(x)
    for attribute, part in codec.encode(second).items():
        module._parameters[attribute] = nn.Parameter(part, requires_grad=False)
    assert torch.equal(module(x), bound(codec, second, torch.float32, None, Scratch())(x))


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_timer_runs_around_dequantisation_only_when_set(name):
    module, entered = bound(get_encoding(name), torch.randn(32, 64), torch.float32, None, Scratch()), []

    @contextlib.contextmanager
    def timer():
        entered.append(1)
        yield

    module(torch.randn(1, 64))
    module.timer = timer
    module(torch.randn(1, 64))
    assert entered == [1]


def test_unknown_codec_and_missing_bitsandbytes_are_clear(monkeypatch):
    with pytest.raises(OptionError, match="5bit"):
        get_encoding("5bit")
    nf4._bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    try:
        with pytest.raises(OptionError, match="pip install bitsandbytes"):
            get_encoding("4bit").require()
        get_encoding("8bit").require()
        assert get_encoding("4bit").parts((64, 64), "BF16")
    finally:
        nf4._bitsandbytes.cache_clear()


# --- against transformers


def tiny_llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 200}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def encode_model(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    scratch, codec = Scratch(), get_encoding(name)
    for module_name in compressible(model):
        linear = model.get_submodule(module_name)
        bias = None if linear.bias is None else linear.bias.data.to(dtype)
        model.set_submodule(module_name, bound(codec, linear.weight.data.to(dtype), dtype, bias, scratch))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_4bit_logits_equal_transformers(tmp_path, dtype, bias):
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(attention_bias=bias).to(dtype).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    options = {"quantization_config": config, "dtype": dtype, "device_map": "cpu"}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    replaced = {name for name, module in reference.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    for module in reference.modules():
        # Without the repacking for AVX512-BF16, which rounds absmax and activations to bfloat16.
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert set(compressible(model)) == replaced
    ours = encode_model(model, "4bit", dtype)
    input_ids = torch.randint(0, 200, (2, 17))
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, reference(input_ids).logits)


def test_8bit_logits_are_near_on_weights_of_full_precision():
    """A matrix of normal weights is 0.5% off, which is near what eight bits can do; three layers double it."""
    model, input_ids = tiny_llama(), torch.randint(0, 200, (2, 17))
    with torch.no_grad():
        expected = model(input_ids).logits
        got = encode_model(model, "8bit", torch.float32)(input_ids).logits
    assert (got - expected).norm() / expected.norm() < 0.015


def test_compressible_leaves_the_head_tied_and_float32_modules():
    names = compressible(tiny_llama(tie_word_embeddings=True))
    assert len(names) == 3 * 7 and not any("head" in name for name in names)
    model = tiny_llama()
    model._keep_in_fp32_modules = ["down_proj"]
    assert len(compressible(model)) == 3 * 6
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names)
    assert not any(isinstance(module, EncodedLinear) for module in model.modules())
