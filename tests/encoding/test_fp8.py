"""FP8 checkpoints against transformers, compressed-tensors, and the definition."""

from __future__ import annotations

import json
from pathlib import Path

import packed_fp8
import pytest
import torch
from safetensors.torch import load_file, save_file

from airllm_nb.encoding import base, fp8
from airllm_nb.encoding.base import Encoded
from airllm_nb.errors import CheckpointError, UnsupportedModelError
from airllm_nb.tensors.dtypes import TORCH_DTYPES
from airllm_nb.tensors.index import ITEMSIZE, TensorInfo, read_index

pytestmark = pytest.mark.usefixtures("one_thread")

DIVIDED = {
    "blocks": {},
    "matrices": {"block": None, "static": True},
    "bytes": {"scales": "bytes"},
    "qwen3_moe": {"model_type": "qwen3_moe"},
    "deepseek_v3": {"model_type": "deepseek_v3", "block": (16, 16)},
}
# 128 × 128 is the published size: here each matrix has one block, or two, the second short in rows or columns.
RAGGED = {
    "published": {"block": (128, 128), "hidden_size": 72, "intermediate_size": 200},
    "ragged": {"block": (24, 40)},
    "ragged-deepseek": {"model_type": "deepseek_v3", "block": (20, 28)},
    "ragged-bytes": {"block": (24, 40), "scales": "bytes"},
}
COMPRESSED = {strategy: {"strategy": strategy} for strategy in ("channel", "tensor", "block")}
ALL = [*DIVIDED, *RAGGED, *COMPRESSED]
has_e8m0 = pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="PyTorch is older than E8M0")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Variant → a checkpoint, made once: copy it before you change it."""
    folders: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in folders:
            folder = tmp_path_factory.mktemp(variant)
            if variant in COMPRESSED:
                folders[variant] = packed_fp8.make_compressed(folder, **COMPRESSED[variant])
            else:
                folders[variant] = packed_fp8.make(folder, **{**DIVIDED, **RAGGED}[variant])
        return folders[variant]

    return get


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]


def find(folder: Path) -> dict[str, Encoded]:
    fp8.check(settings_of(folder))
    return fp8.find(settings_of(folder), read_index(folder), {})


def read(info: TensorInfo) -> torch.Tensor:
    data = bytearray()
    for extent in info.extents:
        data += extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)


def unpacked(packed: Encoded, dtype: torch.dtype = torch.float32, strided: bool = False) -> torch.Tensor:
    rows, columns = packed.shape
    out = torch.full((rows, columns + 3 if strided else columns), torch.nan, dtype=dtype)
    view = out[:, 1 : columns + 1] if strided else out
    packed.encodings[0].unpack({attribute: read(info) for attribute, info in packed.parts.items()}, view)
    if strided:
        assert out[:, 0].isnan().all() and out[:, columns + 1 :].isnan().all()
    return view


@pytest.mark.parametrize("variant", ALL)
def test_every_weight_is_what_the_definition_gives(made, variant):
    wanted, found = packed_fp8.dequantised(made(variant)), find(made(variant))
    assert found.keys() == wanted.keys()
    for name, packed in found.items():
        value = unpacked(packed)
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=0)
        assert torch.equal(unpacked(packed, strided=True), value)
        assert torch.equal(unpacked(packed, torch.bfloat16), value.bfloat16())
        assert torch.equal(unpacked(packed, torch.float16, strided=True), value.half())


@pytest.mark.parametrize("variant", ["blocks", "matrices", "bytes"])
def test_every_weight_is_what_transformers_loads(made, variant):
    model = packed_fp8.reference(made(variant))
    for name, packed in find(made(variant)).items():
        torch.testing.assert_close(unpacked(packed), model.get_parameter(name).data, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["qwen3_moe", "deepseek_v3"])
def test_experts_are_what_transformers_loads(made, variant):
    merged, found = packed_fp8.reference(made(variant)).model.layers[1].mlp.experts, find(made(variant))
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.{{}}_proj.weight"
        gate, up, down = (unpacked(found[name.format(part)]) for part in ("gate", "up", "down"))
        torch.testing.assert_close(merged.gate_up_proj.data[expert], torch.cat([gate, up]), rtol=1e-6, atol=0)
        torch.testing.assert_close(merged.down_proj.data[expert], down, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", RAGGED)
def test_short_blocks_are_what_transformers_dequantises(made, variant):
    """Its loading takes whole blocks alone; what it trains through takes any."""
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(library, "_dequantize_fp8_weight"):
        pytest.skip("this transformers is older than that function")
    tensors, block = load_file(made(variant) / "model.safetensors"), settings_of(made(variant))["weight_block_size"]
    for name, packed in find(made(variant)).items():
        scale = tensors[f"{name}_scale_inv"]
        scale = scale if scale.dtype == torch.float32 else (scale.float() - 127).exp2()
        wanted = library._dequantize_fp8_weight(tensors[name], scale, block, torch.float32)
        torch.testing.assert_close(unpacked(packed), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", COMPRESSED)
def test_every_weight_is_what_compressed_tensors_decompresses(made, variant):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors, settings = load_file(made(variant) / "model.safetensors"), settings_of(made(variant))
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    plain = load_file(made(variant).parent / "plain" / "model.safetensors")
    for name, packed in find(made(variant)).items():
        scale = {"weight_scale": tensors[f"{name}_scale"].float()}
        own = compressor.compress({"weight": plain[name], **scale}, scheme)
        assert own["weight"].dtype == torch.float8_e4m3fn
        assert torch.equal(own["weight"].float(), tensors[name].float())  # what the maker wrote is what it would write
        wanted = compressor.decompress(own, scheme)["weight"]
        torch.testing.assert_close(unpacked(packed), wanted, rtol=1e-6, atol=0)


@has_e8m0
@pytest.mark.skipif("F8_E8M0" not in ITEMSIZE, reason="headers with E8M0 are not read")
def test_scales_of_a_dtype_of_their_own(tmp_path, made):
    folder = packed_fp8.make(tmp_path, scales="ue8m0")
    assert {info.dtype for name, info in read_index(folder).items() if "scale" in name} == {"F8_E8M0"}
    model, same = packed_fp8.reference(folder), find(made("bytes"))
    for name, packed in find(folder).items():
        assert packed.parts["scale"].dtype == "U8"
        torch.testing.assert_close(unpacked(packed), model.get_parameter(name).data, rtol=1e-6, atol=0)
        assert torch.equal(unpacked(packed), unpacked(same[name]))


@has_e8m0
def test_every_power_of_two():
    exponents = torch.arange(256, dtype=torch.uint8)
    wanted = exponents.view(torch.float8_e8m0fnu).float()
    one = torch.ones(255, 1).to(torch.float8_e4m3fn)
    out = torch.empty(255, 1)
    fp8.FP8((1, None), True).unpack({"weight": one, "scale": exponents[:255, None]}, out)
    assert torch.equal(out[:, 0], wanted[:255])  # the last one means: no number


def test_every_byte():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        weight = torch.arange(256, dtype=torch.uint8).view(dtype).view(4, 64)
        for wide in (torch.float32, torch.float16, torch.bfloat16):
            out = torch.empty(4, 64, dtype=wide)
            fp8.FP8((None, None)).unpack({"weight": weight, "scale": torch.ones(1, 1)}, out)
            assert torch.equal(out.nan_to_num(7), weight.to(wide).nan_to_num(7))


@pytest.mark.parametrize("variant", ["blocks", "matrices", "ragged", "channel"])
@pytest.mark.parametrize("values", [1, 100, 1000])
def test_chunk_borders_change_nothing(made, variant, values, monkeypatch):
    for packed in find(made(variant)).values():
        wanted = unpacked(packed)
        monkeypatch.setattr(base, "HOST_VALUES", values)
        assert torch.equal(unpacked(packed), wanted)
        monkeypatch.undo()


@pytest.mark.parametrize(("variant", "step"), [("blocks", 16), ("ragged", 24), ("channel", 1)])
def test_rows_can_be_cut_between_blocks(made, variant, step):
    packed = find(made(variant))["model.layers.0.mlp.up_proj.weight"]
    assert packed.encodings[0].row_steps(packed.shape[-1]) == {"weight": 1, "scale": step}
    parts = {
        attribute: read(info.rows(info.name, [(48 // {"weight": 1, "scale": step}[attribute], info.shape[0])]))
        for attribute, info in packed.parts.items()
    }
    out = torch.empty(packed.shape[0] - 48, packed.shape[1])
    packed.encodings[0].unpack(parts, out)
    assert torch.equal(out, unpacked(packed)[48:])


def test_a_matrix_with_one_scale_cannot_be_cut(made):
    assert all(packed.encodings[0].row_steps(packed.shape[-1]) is None for packed in find(made("matrices")).values())


def test_a_stack_of_matrices(tmp_path):
    """As transformers holds merged experts; a scale may be for each of a stack's columns as well."""
    values = torch.randn(3, 32, 64).to(torch.float8_e4m3fn)
    scales = {"experts.up": torch.rand(3, 2, 2), "experts.down": torch.rand(3, 1, 64), "experts.one": torch.rand(3)}
    tensors = dict.fromkeys(scales, values) | {f"{name}_scale_inv": scale for name, scale in scales.items()}
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    index = read_index(tmp_path)
    blocks, columns = ({name: info for name, info in index.items() if ("down" in name) == is_down}
                       for is_down in (False, True))  # fmt: skip
    found = fp8.find({"weight_block_size": [16, 32]}, blocks, {}) | fp8.find({}, columns, {})
    wide = {"experts.up": scales["experts.up"].repeat_interleave(16, 1).repeat_interleave(32, 2),
            "experts.down": scales["experts.down"], "experts.one": scales["experts.one"][:, None, None]}  # fmt: skip
    assert found.keys() == wide.keys()
    for name, packed in found.items():
        assert (packed.shape, packed.pieces) == ((3, 32, 64), 1)
        parts = {attribute: read(info) for attribute, info in packed.parts.items()}
        for number in range(3):
            out = torch.empty(32, 64)
            packed.encodings[0].unpack({attribute: part[number] for attribute, part in parts.items()}, out)
            torch.testing.assert_close(out, (values.float() * wide[name])[number], rtol=1e-6, atol=0)


def test_only_what_has_a_scale_is_packed(made):
    index, found = read_index(made("matrices")), find(made("matrices"))
    assert "lm_head.weight" in index and "lm_head.weight" not in found
    taken = {info.name for packed in found.values() for info in packed.parts.values()}
    assert {name.rpartition(".")[2] for name in taken} == {"weight", "weight_scale_inv"}


@pytest.mark.parametrize("sibling", ["scale", "qscale_weight"])
def test_other_names_of_scales(made, tmp_path, sibling):
    tensors = load_file(made("blocks") / "model.safetensors")
    renamed = {name.replace("weight_scale_inv", sibling): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    found = fp8.find(settings_of(made("blocks")), read_index(tmp_path), {})
    assert found.keys() == find(made("blocks")).keys()
    assert all(packed.parts["scale"].name.endswith(f".{sibling}") for packed in found.values())


@pytest.mark.parametrize("shape", [(7, 2), (6,), (6, 2, 1), (0, 2), (6, 3), (12, 2), (6, 1), (1, 2)])
def test_scales_that_do_not_fit_are_refused(made, tmp_path, shape):
    name = "model.layers.0.mlp.up_proj.weight"  # [96, 64], blocks of 16 x 32
    tensors = load_file(made("blocks") / "model.safetensors") | {f"{name}_scale_inv": torch.ones(shape)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit"):
        fp8.find(settings_of(made("blocks")), read_index(tmp_path), {})


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64, torch.bool])
def test_scales_of_another_dtype_are_refused(made, tmp_path, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(made("blocks") / "model.safetensors") | {f"{name}_scale_inv": torch.ones((6, 2), dtype=dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit"):
        fp8.find(settings_of(made("blocks")), read_index(tmp_path), {})


def test_rows_and_whole_matrices_may_have_a_scale_beside_blocks(made, tmp_path):
    """Of several groups one may name blocks: the scales of the others have one meaning all the same."""
    name = "model.layers.0.mlp.up_proj.weight"
    for shape, block in (((96, 1), (1, None)), ((96,), (1, None)), ((1,), (None, None)), ((), (None, None))):
        tensors = load_file(made("blocks") / "model.safetensors") | {f"{name}_scale_inv": torch.ones(shape)}
        save_file(tensors, tmp_path / "model.safetensors")
        assert fp8.find(settings_of(made("blocks")), read_index(tmp_path), {})[name].encodings == (fp8.FP8(block),)


def test_without_a_word_of_blocks_they_are_those_of_transformers(tmp_path):
    """Two scales for 192 rows: 128 rows and the rest, not 96 each."""
    from transformers import FineGrainedFP8Config

    assert FineGrainedFP8Config().weight_block_size == fp8.DEFAULT_BLOCK
    folder = packed_fp8.make(tmp_path, block=(128, 128), intermediate_size=192)
    settings, wanted = settings_of(folder), packed_fp8.dequantised(folder)
    del settings["weight_block_size"]
    found = fp8.find(settings, read_index(folder), {})
    assert found["model.layers.0.mlp.up_proj.weight"].parts["scale"].shape == (2, 1)
    for name, packed in found.items():
        torch.testing.assert_close(unpacked(packed), wanted[name], rtol=1e-6, atol=0)
    with pytest.raises(CheckpointError, match="do not fit one another or the config"):
        fp8.find(settings | {"weight_block_size": None}, read_index(folder), {})


def test_one_scale_a_matrix_needs_no_word(made):
    settings = {name: value for name, value in settings_of(made("matrices")).items() if name != "weight_block_size"}
    found = fp8.find(settings, read_index(made("matrices")), {})
    for name, wanted in packed_fp8.dequantised(made("matrices")).items():
        torch.testing.assert_close(unpacked(found[name]), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("size", "fits"), [(16, True), (32, False), (None, False)])
def test_groups_along_a_row(tmp_path, size, fits):
    values, scales = torch.randn(8, 64).to(torch.float8_e4m3fn), torch.rand(8, 4)
    save_file({"x.weight": values, "x.weight_scale": scales}, tmp_path / "model.safetensors")
    settings = _group(strategy="group", group_size=size) if size else _group(strategy="channel")
    if not fits:
        with pytest.raises(CheckpointError, match="do not fit"):
            fp8.find(settings, read_index(tmp_path), {})
        return
    (packed,) = fp8.find(settings, read_index(tmp_path), {}).values()
    torch.testing.assert_close(unpacked(packed), values.float() * scales.repeat_interleave(16, 1), rtol=1e-6, atol=0)


def _group(**weights):
    return {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float", "symmetric": True} | weights}}}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "experts are fp4"),
        ({"quant_method": "fp8", "fmt": "e3m4"}, "e3m4"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"block size is \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "block size"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "block size"),
        ({"weight_block_size": [128]}, r"block size is \[128\]"),
        ({"format": "float-quantized", **_group(block_structure=[128, 128, 1])}, "block size"),
        ({"format": "float-quantized", **_group(block_structure="128xmany")}, "block size"),
        ({"format": "float-quantized", **_group(block_structure="128x²")}, "block size"),
        ({"format": "float-quantized", **_group(block_structure={"rows": 128})}, "block size"),
        ({"format": "pack-quantized", **_group(num_bits=4, type="int")}, "'pack-quantized'"),
        ({"format": "mixed-precision"}, "'mixed-precision'"),
        ({"format": "float-quantized", **_group(num_bits=4)}, "4 bits of type 'float'"),
        ({"format": "naive-quantized", **_group(type="int")}, "type 'int'"),
        ({"format": "float-quantized", **_group(symmetric=False)}, "zero points"),
        ({"format": "float-quantized", **_group(strategy="block")}, "size of its blocks is not said"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt .*'NVFP4' is not one of FP8"),
        ({"quant_method": "modelopt"}, "quant_algo None"),
        ({"format": "float-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ({"format": "float-quantized", "transform_config": {"config_groups": {}}}, "transformed"),
    ],
)
def test_what_cannot_be_unpacked_is_refused(settings, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        fp8.check({"quant_method": "compressed-tensors", **settings})


def test_what_is_only_ignored_is_not_refused():
    fp8.check({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None})
    fp8.check({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    fp8.check({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"})
    fp8.check({"quant_method": "compressed-tensors", "format": "float-quantized", "sparsity_config": {},
               "kv_cache_scheme": {"num_bits": 8}, **_group(block_structure="128x128")})  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ALL)
def test_on_a_gpu(made, variant):
    wanted, device = packed_fp8.dequantised(made(variant)), torch.device("cuda")
    for name, packed in find(made(variant)).items():
        parts = {attribute: read(info).to(device) for attribute, info in packed.parts.items()}
        rows, columns = packed.shape
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            wide = torch.empty(rows, columns + 5, dtype=dtype, device=device)
            for out in (torch.empty(rows, columns, dtype=dtype, device=device), wide[:, 2:-3]):
                packed.encodings[0].unpack(parts, out)
                assert torch.equal(out.cpu(), wanted[name].to(dtype))
