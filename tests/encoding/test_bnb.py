"""Checkpoints of bitsandbytes against bitsandbytes and transformers themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import packed_bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from airllm_nb.encoding import base, bnb, nf4
from airllm_nb.encoding.base import Encoded
from airllm_nb.errors import CheckpointError, UnsupportedModelError
from airllm_nb.tensors.dtypes import TORCH_DTYPES
from airllm_nb.tensors.index import CheckpointIndex, TensorInfo, read_index

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = {
    "nf4": {"double": False},
    "nf4-double": {},
    "fp4": {"kind": "fp4", "double": False},
    "fp4-double": {"kind": "fp4"},
    "odd": {"double": False, **packed_bnb.ODD},
    "odd-double": packed_bnb.ODD,
    "odd-fp4": {"kind": "fp4", **packed_bnb.ODD},
    "storage": {"storage": "bfloat16", "dtype": "bfloat16"},
    "gpt2": {"model_type": "gpt2"},
    "gpt2-int8": {"model_type": "gpt2", "kind": "int8"},
    "int8": {"kind": "int8"},
    "int8-odd": {"kind": "int8", **packed_bnb.ODD},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Variant → a checkpoint, made once: copy it before you change it."""
    folders: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in folders:
            folder = tmp_path_factory.mktemp(variant)
            maker = packed_bnb.make_mixture if variant == "mixture" else packed_bnb.make
            folders[variant] = maker(folder, **VARIANTS.get(variant, {}))
        return folders[variant]

    return get


def find(folder: Path, shapes=None) -> dict[str, Encoded]:
    settings = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    bnb.check(settings)
    return bnb.find(settings, read_index(folder), native_shapes(folder) if shapes is None else shapes)


def native_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def read(info: TensorInfo) -> torch.Tensor:
    data = bytearray()
    for extent in info.extents:
        data += extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)


def unpacked(packed: Encoded, dtype: torch.dtype = torch.float32, strided: bool = False) -> torch.Tensor:
    """As the weight lies: transposed where its packing says so."""
    (given,) = packed.encodings
    rows, columns = packed.shape[::-1] if given.transposed else packed.shape
    out = torch.full((rows, columns + 3 if strided else columns), torch.nan, dtype=dtype)
    view = out[:, 1 : columns + 1] if strided else out
    given.unpack({attribute: read(info) for attribute, info in packed.parts.items()}, view)
    if strided:
        assert out[:, 0].isnan().all() and out[:, columns + 1 :].isnan().all()
    return view


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within 1e-6 of the greatest, and every value within a rounding or two of its own."""
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("variant", [*VARIANTS, "mixture"])
def test_every_weight_is_what_bitsandbytes_dequantises(made, variant):
    folder = made(variant)
    wanted, found = packed_bnb.dequantised(folder), find(folder)
    assert found.keys() == wanted.keys()
    for name, packed in found.items():
        assert packed.pieces is None
        value = unpacked(packed)
        assert_near(value, wanted[name])
        assert torch.equal(unpacked(packed, strided=True), value)
        assert torch.equal(unpacked(packed, torch.bfloat16), value.bfloat16())
        assert torch.equal(unpacked(packed, torch.float16, strided=True), value.half())


@pytest.mark.parametrize("variant", ["nf4-double", "fp4", "storage", "gpt2", "int8"])
def test_every_weight_is_what_transformers_dequantises(made, variant):
    from transformers import AutoModelForCausalLM

    folder = made(variant)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    model.dequantize()
    for name, packed in find(folder).items():
        wanted = model.get_parameter(name)
        value = unpacked(packed, wanted.dtype)
        if wanted.dtype == torch.float32:
            assert_near(value, wanted)
        else:
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("variant", ["odd-double", "gpt2", "int8"])
def test_the_reference_is_the_model_that_transformers_loads(made, variant):
    from transformers import AutoModelForCausalLM

    folder, ids = made(variant), torch.arange(3, 15)[None]
    model = packed_bnb.reference(folder)
    weights = packed_bnb.dequantised(folder)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in weights.items())
    if variant == "gpt2":  # where rows are whole blocks its own product can be trusted
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
        torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_reference_of_a_mixture_has_its_experts(made):
    folder = made("mixture")
    merged = packed_bnb.reference(folder).model.layers[1].mlp.experts.gate_up_proj
    name = "model.layers.1.block_sparse_moe.experts.2.w{}.weight"
    weights = packed_bnb.dequantised(folder)
    assert torch.equal(merged[2], torch.cat([weights[name.format(1)], weights[name.format(3)]]))


@pytest.mark.parametrize("variant", ["nf4", "odd-double", "int8"])
@pytest.mark.parametrize("values", [1, 100, 1000])
def test_chunk_borders_change_nothing(made, variant, values, monkeypatch):
    for packed in find(made(variant)).values():
        wanted = unpacked(packed)
        monkeypatch.setattr(base, "HOST_VALUES", values)
        assert torch.equal(unpacked(packed), wanted)
        monkeypatch.undo()


def test_an_odd_number_of_values_and_a_short_last_block():
    """By the definition: for an odd number bitsandbytes compiles its own code, which takes seconds."""
    from bitsandbytes.functional import quantize_4bit

    for rows, columns in [(1, 1), (7, 9), (5, 1), (33, 101), (3, 64), (64, 1)]:
        packed, state = quantize_4bit(torch.randn(rows, columns), blocksize=64, quant_type="nf4")
        nibbles = torch.stack([packed >> 4, packed & 15], 1).view(-1).long()[: rows * columns]
        wanted = state.code[nibbles] * state.absmax.repeat_interleave(64)[: rows * columns]
        out = torch.empty(rows, columns)
        bnb.NF4().unpack({"weight": packed, "absmax": state.absmax}, out)
        assert_near(out, wanted.view(rows, columns))


@pytest.mark.parametrize("variant", ["nf4", "fp4", "int8"])
def test_rows_can_be_cut(made, variant):
    folder = made(variant)
    packed = find(folder)["model.layers.0.mlp.down_proj.weight"]
    steps = packed.row_steps()
    assert steps is not None and steps.keys() == packed.parts.keys()
    parts = {
        attribute: read(info.rows(info.name, [(16 // steps[attribute], 48 // steps[attribute])]))
        for attribute, info in packed.parts.items()
    }
    out = torch.empty(32, packed.shape[1])
    packed.encodings[0].unpack(parts, out)
    assert torch.equal(out, unpacked(packed)[16:48])


@pytest.mark.parametrize("variant", ["nf4-double", "gpt2", "gpt2-int8"])
def test_rows_cannot_be_cut_where_their_parts_cannot(made, variant):
    assert all(packed.row_steps() is None for packed in find(made(variant)).values())
    odd = {packed.shape[1] % 64 == 0: packed.row_steps() for packed in find(made("odd")).values()}
    assert odd == {False: None, True: {"weight": 1, "absmax": 1}}


def test_square_weights_of_a_conv1d_are_transposed_too(made):
    found, shapes = find(made("gpt2")), native_shapes(made("gpt2"))
    assert {name: packed.shape for name, packed in found.items()} == {name: shapes[name] for name in found}
    assert all(packed.encodings[0].transposed for packed in found.values())
    assert (64, 64) in {packed.shape for packed in found.values()}
    assert not any(packed.encodings[0].transposed for packed in find(made("odd")).values())


def test_packings_compare_by_what_they_are(made):
    assert bnb.NF4(nested=256) == bnb.NF4(nested=256) and hash(bnb.NF4()) == hash(bnb.NF4())
    assert len({bnb.NF4(), bnb.FP4(), bnb.NF4(transposed=True), bnb.NF4(offset=0.5)}) == 4
    offsets = {packed.encodings[0] for packed in find(made("nf4-double")).values()}
    assert len(offsets) > 1
    assert len({packed.encodings[0] for packed in find(made("nf4")).values()}) == 1


@pytest.mark.parametrize("variant", ["nf4-double", "odd", "storage", "int8"])
def test_from_headers_alone(made, variant, caplog):
    """What a plan does before anything is downloaded: the same parts, as far as shapes are known."""
    index, wanted = read_index(made(variant)), find(made(variant))
    absent = {name: _elsewhere(info) for name, info in index.items()}
    shapes = native_shapes(made(variant))
    left_out = "model.layers.1.mlp.up_proj.weight"
    if variant != "int8":
        del shapes[left_out]
    found = bnb.find({}, absent, shapes)
    assert {name: (one.shape, one.nbytes) for name, one in found.items()} == {
        name: (one.shape, one.nbytes) for name, one in wanted.items() if name in shapes
    }
    assert (left_out in caplog.text) == (variant != "int8")


def _elsewhere(info: TensorInfo) -> TensorInfo:
    extents = tuple(type(extent)(Path("not-here"), extent.offset, extent.nbytes) for extent in info.extents)
    return TensorInfo(info.name, info.dtype, info.shape, extents)


def changed(folder: Path, target: Path, change) -> CheckpointIndex:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return read_index(target)


NAME = "model.layers.0.mlp.up_proj.weight"


def _state(**entries):
    def change(tensors):
        key = f"{NAME}{bnb.STATE}nf4"
        state = json.loads(bytes(tensors[key].tolist())) | entries
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _without(key):
    def change(tensors):
        name = f"{NAME}{bnb.STATE}nf4"
        state = json.loads(bytes(tensors[name].tolist()))
        del state[key]
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _as(part, dtype):
    return lambda tensors: tensors.update({f"{NAME}{part}": tensors[f"{NAME}{part}"].to(dtype)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(f"{NAME}.absmax"), "absmax' is missing"),
        (lambda tensors: tensors.pop(f"{NAME}.nested_absmax"), "nested_absmax is missing"),
        (lambda tensors: tensors.update({f"{NAME}.absmax": torch.zeros(3, dtype=torch.uint8)}), "should be"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][:-1]}), "do not hold"),
        (lambda tensors: tensors.update({f"{NAME}{bnb.STATE}nf4": torch.zeros(9, dtype=torch.uint8)}), "no quantis"),
        (_state(shape=[128, 65]), "do not hold"),
        (_state(shape=[128]), "cannot be read"),
        (_state(shape=[-128, -64]), "128 x -64"),
        (_state(blocksize=63), "blocks are 63"),
        (_state(blocksize="many"), "cannot be read"),
        (_state(nested_blocksize=0), "and 0"),
        (_state(nested_blocksize=8), "should be"),
        (_state(nested_blocksize=1 << 40), "1,099,511,627,776"),
        (_state(nested_blocksize=math.inf), "cannot be read"),
        (_state(blocksize=math.inf), "cannot be read"),
        (_state(shape=[math.inf, 2]), "OverflowError"),
        (_state(nested_offset=math.nan), "nested_offset is nan"),
        (_state(nested_offset=math.inf), "nested_offset is inf"),
        (_state(nested_offset=10**400), "nested_offset cannot be read"),
        (_state(nested_offset=None), "nested_offset cannot be read"),
        (_without("nested_offset"), "nested_offset cannot be read"),
        (_as(".nested_absmax", torch.int32), "scales are floats"),
        (_as(".nested_quant_map", torch.uint8), "scales are floats"),
        (_as(".absmax", torch.float32), "says that it is quantised"),
    ],
)
def test_a_damaged_checkpoint_is_refused(made, tmp_path, change, reason):
    index = changed(made("nf4-double"), tmp_path, change)
    with pytest.raises(CheckpointError, match=reason):
        bnb.find({}, index, {})


@pytest.mark.parametrize(("variant", "part"), [("nf4", f"{NAME}.absmax"), ("int8", f"{NAME[:-6]}SCB")])
def test_scales_that_are_no_floats_are_refused(made, tmp_path, variant, part):
    index = changed(made(variant), tmp_path, lambda tensors: tensors.update({part: tensors[part].int()}))
    with pytest.raises(CheckpointError, match="scales are floats"):
        bnb.find({}, index, {})


def test_the_orders_of_old_gpus_are_refused(made, tmp_path):
    layout = "model.layers.0.mlp.up_proj.weight_format"
    index = changed(made("int8"), tmp_path, lambda tensors: tensors.update({layout: torch.tensor(2).byte()}))
    with pytest.raises(UnsupportedModelError, match="weight_format"):
        bnb.find({}, index, {})


def test_an_int8_checkpoint_from_before_its_format_was_named(made, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("weight_format")]:
            del tensors[name]

    index = changed(made("int8"), tmp_path, change)
    assert bnb.find({}, index, {}).keys() == packed_bnb.dequantised(made("int8")).keys()


def test_unknown_types_are_refused():
    bnb.check({"load_in_8bit": True})
    with pytest.raises(UnsupportedModelError, match="'af4'"):
        bnb.check({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"})
    for kind in (["nf4"], {"nf4": 1}, None, 4):
        with pytest.raises(UnsupportedModelError, match="4-bit type"):
            bnb.check({"load_in_4bit": True, "bnb_4bit_quant_type": kind})


def test_the_codes_are_those_of_bitsandbytes():
    from bitsandbytes.functional import get_4bit_type

    for kind, values in nf4.CODES.items():
        assert torch.equal(torch.tensor(values), get_4bit_type(kind, device="cpu"))


def test_without_a_gpu_nothing_is_multiplied_packed(made):
    packed = find(made("nf4"))[NAME]
    parts = {attribute: read(info) for attribute, info in packed.parts.items()}
    assert packed.encodings[0].multiply(torch.randn(1, packed.shape[1]), parts, packed.shape, None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("variant", [*VARIANTS, "mixture"])
def test_on_a_gpu(made, variant, library, monkeypatch):
    """With the library's kernels, and without them."""
    if not library:
        monkeypatch.setattr(nf4, "has_kernels", lambda device: False)
    wanted, device = packed_bnb.dequantised(made(variant)), torch.device("cuda")
    for name, packed in find(made(variant)).items():
        parts = {attribute: read(info).to(device) for attribute, info in packed.parts.items()}
        rows, columns = wanted[name].shape
        for dtype in (torch.float32, torch.float16):
            wide = torch.empty(rows, columns + 5, dtype=dtype, device=device)
            for out in (torch.empty(rows, columns, dtype=dtype, device=device), wide[:, 2:-3]):
                packed.encodings[0].unpack(parts, out)
                rtol = 1e-6 if dtype == torch.float32 else 1e-3
                torch.testing.assert_close(out.cpu(), wanted[name].to(dtype), rtol=rtol, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("variant", ["nf4", "nf4-double", "fp4-double"])
def test_the_kernel_of_the_library_on_a_gpu(made, variant, tokens):
    wanted, device, products = packed_bnb.dequantised(made(variant)), torch.device("cuda"), 0
    assert nf4.has_kernels(device)
    for name, packed in find(made(variant)).items():
        parts = {attribute: read(info).to(device) for attribute, info in packed.parts.items()}
        x, bias = torch.randn(1, tokens, packed.shape[1]), torch.randn(packed.shape[0])
        product = packed.encodings[0].multiply(x.half().to(device), parts, packed.shape, bias.half().to(device))
        if product is not None:
            products += 1
            expected = x @ wanted[name].T + bias
            torch.testing.assert_close(product.float().cpu(), expected, rtol=2e-2, atol=2e-2 * math.sqrt(tokens))
    assert products or tokens > 1
