"""GPTQ: every variant unpacks to what the libraries of the format make of it; what cannot be done is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_gptq
import pytest
import torch
from safetensors.torch import load_file, save_file

from airllm_nb.encoding import base, gptq
from airllm_nb.encoding.base import Encoded
from airllm_nb.errors import CheckpointError, UnsupportedModelError
from airllm_nb.tensors.index import TensorInfo, read_index

VARIANTS: list[dict[str, Any]] = [
    *({"bits": bits, "sym": sym} for bits in (2, 3, 4, 8) for sym in (True, False)),
    *({"bits": bits, "sym": False, "checkpoint_format": "gptq_v2"} for bits in (2, 3, 4, 8)),
    *({"bits": bits, "desc_act": True} for bits in (2, 3, 4, 8)),
    {"group_size": -1},
    {"group_size": -1, "desc_act": True, "sym": False},
    {"group_size": 128},  # more than the 64 inputs that most matrices have
    {"bits": 3, "group_size": 16},  # half of what three words hold
    {"lm_head": True, "checkpoint_format": "gptq_v2"},
]
STEM = "model.layers.0.mlp.down_proj"


@pytest.fixture
def made(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """``made(**variant)``: a checkpoint and its settings."""

    def make(**variant: Any) -> tuple[Path, dict[str, Any]]:
        source = tiny_llama(num_hidden_layers=1, vocab_size=288)
        folder = packed_gptq.make(tmp_path / "gptq", source, **variant)
        return folder, json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]

    return make


def unpack(packed: Encoded, stored: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[rows, columns]``."""
    (packing,), (rows, columns) = packed.encodings, packed.shape
    assert packing.transposed and packing.row_steps(columns) is None
    out = torch.full((columns, rows), torch.nan, dtype=dtype)
    packing.unpack({name: stored[info.name] for name, info in packed.parts.items()}, out)
    return out.t()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{key}={value}" for key, value in v.items()))
def test_weights_are_those_of_gptqmodel(made: Any, variant: dict[str, Any]) -> None:
    folder, settings = made(**variant)
    index, stored, wanted = read_index(folder), load_file(folder / "model.safetensors"), packed_gptq.weights(folder)
    gptq.check(settings)
    found = gptq.find(settings, index, {name: tuple(value.shape) for name, value in wanted.items()})
    assert set(found) == {name.replace(".qweight", ".weight") for name in stored if name.endswith(".qweight")}
    assert len(found) == 7 + bool(variant.get("lm_head"))
    for name, packed in found.items():
        assert packed.nbytes >= packed.parts["weight"].nbytes == wanted[name].numel() * settings["bits"] // 8
        is_ordered = settings["desc_act"] and settings["group_size"] != -1
        assert ("group_index" in packed.parts) == is_ordered
        assert packed.encodings[0].even is (True if is_ordered else None)
        torch.testing.assert_close(unpack(packed, stored), wanted[name], rtol=1e-6, atol=1e-9)
        for half in (torch.bfloat16, torch.float16):
            assert torch.equal(unpack(packed, stored, half), wanted[name].to(half))


@pytest.mark.parametrize("variant", [{"bits": 4, "desc_act": True}, {"bits": 3, "sym": False}, {"bits": 8}], ids=str)
def test_weights_are_those_of_autogptq(made: Any, variant: dict[str, Any]) -> None:
    folder, settings = made(**variant)
    stored = load_file(folder / "model.safetensors")
    for name, packed in gptq.find(settings, read_index(folder), {}).items():
        (rows, columns), stem = packed.shape, name.removesuffix("weight")
        layer = packed_gptq.library("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear(
            settings["bits"], settings["group_size"], columns, rows, False
        )
        parts = {part: stored[stem + part] for part in ("qweight", "qzeros", "scales", "g_idx")}
        layer.load_state_dict(parts)
        wanted = layer.float()(torch.eye(columns))
        torch.testing.assert_close(unpack(packed, stored), wanted.t(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("values", [1, 700, 5000, 1 << 18])
@pytest.mark.parametrize("variant", [{}, {"desc_act": True}, {"group_size": -1}, {"bits": 3, "sym": False}], ids=str)
def test_chunks_and_strides_change_nothing(
    made: Any, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any], values: int
) -> None:
    folder, settings = made(**variant)
    stored = load_file(folder / "model.safetensors")
    packed = gptq.find(settings, read_index(folder), {})[f"{STEM}.weight"]
    wanted = unpack(packed, stored).t()
    monkeypatch.setattr(base, "HOST_VALUES", values)
    room = torch.full((wanted.shape[0], wanted.shape[1] + 24), torch.nan)
    parts = {name: stored[info.name] for name, info in packed.parts.items()}
    copies = {name: value.clone() for name, value in parts.items()}
    packed.encodings[0].unpack(parts, room[:, 8:-16])
    assert torch.equal(room[:, 8:-16], wanted)
    assert room[:, :8].isnan().all() and room[:, -16:].isnan().all()
    assert all(torch.equal(parts[name], copies[name]) for name in parts)


def test_the_last_group_may_be_shorter() -> None:
    """96 inputs in groups of 64; group sizes that words do not fill are looked up by input."""
    for bits, group in ((4, 64), (4, 20), (3, 40), (2, 24)):
        weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
        parts = packed_gptq.pack(weight, bits, group, False, None)
        out = torch.empty(96, 32)
        named = {"weight": parts["qweight"], "zeros": parts["qzeros"], "scale": parts["scales"]}
        gptq.GPTQ(bits, group, 1).unpack(named, out)
        layer = packed_gptq.library("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear(bits, group, 96, 32, False)
        layer.load_state_dict(parts)
        torch.testing.assert_close(out, layer.float()(torch.eye(96)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_zero_has_borrowed_from_the_next(bits: int) -> None:
    """GPTQModel writes the first format by taking one away from each field of whole words, borrows included."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(-(1 << 31), 1 << 31, (3, 2 * bits), generator=generator).int()
    words[0] = 0
    qweight = torch.randint(-(1 << 31), 1 << 31, (3 * bits, 64), generator=generator).int()
    scale = torch.rand(3, 64, generator=generator).half()
    outs = []
    for offset, zeros in ((0, words), (1, words - ones)):
        outs.append(torch.empty(96, 64))
        gptq.GPTQ(bits, 32, offset).unpack({"weight": qweight, "zeros": zeros, "scale": scale}, outs[-1])
    assert torch.equal(*outs)


def test_rules_for_single_matrices(made: Any) -> None:
    """GPTQModel's ``dynamic`` gives some matrices other bits and groups: what lies there says which."""
    folder, settings = made(desc_act=False)
    settings["dynamic"] = {"+:.*down_proj": {"bits": 8, "group_size": 64, "desc_act": True}, "-:.*lm_head": {}}
    stored = load_file(folder / "model.safetensors")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1)) // 64
    stored |= {f"{STEM}.{part}": value for part, value in packed_gptq.pack(weight, 8, 64, False, order).items()}
    save_file(stored, folder / "model.safetensors")
    gptq.check(settings)
    found = gptq.find(settings, read_index(folder), {})
    assert found[f"{STEM}.weight"].encodings == (gptq.GPTQ(8, 64, 1, True),)
    assert (unpack(found[f"{STEM}.weight"], stored) - weight).abs().max() < 0.05
    # The others keep theirs, though it says nothing: of experts, matrices of both kinds may be stacked.
    assert all("group_index" in packed.parts for packed in found.values())


def test_experts_have_names_of_their_own(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = packed_gptq.tiny_qwen2_moe(tmp_path / "plain", tiny_llama())
    folder = packed_gptq.make(tmp_path / "gptq", source)
    settings = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    found = gptq.find(settings, read_index(folder), {})
    stored, wanted = load_file(folder / "model.safetensors"), packed_gptq.weights(folder)
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    torch.testing.assert_close(unpack(found[name], stored), wanted[name], rtol=1e-6, atol=1e-9)
    assert packed_gptq.reference(folder)(torch.arange(3, 9)[None]).logits.isfinite().all()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"is_marlin_format": True}, "'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "'gptq_p'"),
        ({"bits": 5}, "5 bits"),
        ({"bits": 4.0}, "4.0 bits"),
        ({"bits": [4]}, r"\[4\] bits"),
        ({"bits": 4, "dynamic": {"+:.*q_proj": {"bits": 6}}}, "6 bits"),
        ({"bits": 4, "pack_dtype": "int64"}, "int64"),
    ],
)
def test_other_layouts_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        gptq.check(settings)


def test_plain_settings_pass() -> None:
    for settings in ({}, {"bits": 3, "format": "gptq"}, {"pack_dtype": "torch.int32", "dynamic": None}):
        gptq.check(settings)


@pytest.mark.parametrize("dynamic", [[], ["+:.*"], 3, "all", {"+:.*": 4}, {"+:.*": None}], ids=str)
def test_rules_that_are_none_say_nothing(dynamic: Any) -> None:
    index = {name: _info(name.removeprefix("a."), *entry) for name, entry in WHOLE.items()}
    settings = {"bits": 4, "desc_act": False, "dynamic": dynamic}
    gptq.check(settings)
    assert gptq.find(settings, index, {})["a.weight"].encodings == (gptq.GPTQ(4, 32, 1),)


WHOLE: dict[str, tuple[Any, ...]] = {
    "a.qweight": ("I32", 8, 32), "a.qzeros": ("I32", 2, 4), "a.scales": ("F16", 2, 32), "a.g_idx": ("I32", 64),
}  # fmt: skip


def _info(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(f"a.{name}", dtype, shape, ())


@pytest.mark.parametrize(
    "wrong",
    [
        _info("qweight", "I32", 8, 48),
        _info("qweight", "F32", 8, 32),
        _info("qweight", "I32", 8, 32, 1),
        _info("qzeros", "I32", 3, 4),
        _info("qzeros", "I32", 2, 5),
        _info("scales", "F16", 9, 32),
        _info("scales", "I32", 2, 32),
        _info("g_idx", "I32", 63),
        _info("g_idx", "F32", 64),
    ],
    ids=lambda info: f"{info.name} {info.dtype} {info.shape}",
)
def test_tensors_that_do_not_fit_are_refused(wrong: TensorInfo) -> None:
    infos = [_info("qweight", "I32", 8, 32), _info("qzeros", "I32", 2, 4), _info("scales", "F16", 2, 32)]
    index = {info.name: info for info in [*infos, _info("g_idx", "I32", 64)]}
    assert gptq.find({"bits": 4, "desc_act": True}, index, {})["a.weight"].shape == (32, 64)
    with pytest.raises(CheckpointError, match=r"a: its packed tensors do not fit"):
        gptq.find({"bits": 4, "desc_act": True}, index | {wrong.name: wrong}, {})


def test_a_lost_order_is_refused() -> None:
    index = {name: _info(name.removeprefix("a."), *entry) for name, entry in WHOLE.items() if "g_idx" not in name}
    for settings in ({"bits": 4}, {"bits": 4, "desc_act": False}):
        assert "group_index" not in gptq.find(settings, index, {})["a.weight"].parts
    with pytest.raises(CheckpointError, match=r"a\.g_idx is missing"):
        gptq.find({"bits": 4, "desc_act": True}, index, {})
    one = {"a.qzeros": _info("qzeros", "I32", 1, 4), "a.scales": _info("scales", "F16", 1, 32)}
    assert gptq.find({"bits": 4, "desc_act": True}, index | one, {}).keys() == {"a.weight"}  # one group has no order


@pytest.mark.parametrize("desc_act", [None, 0, "", "false"])
def test_without_its_file_only_a_plain_no_lets_an_order_be_left_out(desc_act: Any) -> None:
    index = {name: _info(name.removeprefix("a."), *entry) for name, entry in WHOLE.items()}
    assert "group_index" in gptq.find({"bits": 4, "desc_act": desc_act}, index, {})["a.weight"].parts
    assert "group_index" not in gptq.find({"bits": 4, "desc_act": False}, index, {})["a.weight"].parts


@pytest.fixture
def ordered(tmp_path: Path) -> Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], Encoded]]:
    """``ordered(g_idx)``: 64 outputs of 96 inputs in three groups, packed in a file, and what is found of it."""

    def make(order: torch.Tensor) -> tuple[dict[str, torch.Tensor], Encoded]:
        weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
        parts = packed_gptq.pack(weight, 4, 32, False, order.clamp(0, 2))
        stored = {f"a.{part}": value for part, value in parts.items()} | {"a.g_idx": order.int()}
        save_file(stored, tmp_path / "model.safetensors")
        settings = {"bits": 4, "group_size": 32, "desc_act": False}
        return stored, gptq.find(settings, read_index(tmp_path), {})["a.weight"]

    return make


def test_the_order_that_lies_there_counts_whatever_the_config_says(ordered: Any) -> None:
    """As for GPTQModel; groups may be of several sizes, as those of the last inputs are."""
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    for order, even in ((shuffled // 32, True), (shuffled // 40, False)):
        stored, packed = ordered(order)
        assert packed.encodings == (gptq.GPTQ(4, 32, 1, even),) and "group_index" in packed.parts
        layer = packed_gptq.library("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear(4, 32, 96, 64, False)
        layer.load_state_dict({name.removeprefix("a."): value for name, value in stored.items()})
        torch.testing.assert_close(unpack(packed, stored), layer.float()(torch.eye(96)).t(), rtol=1e-6, atol=1e-9)


def test_an_order_that_is_none_does_not_move(ordered: Any) -> None:
    stored, packed = ordered(torch.arange(96) // 32)
    assert packed.parts.keys() == {"weight", "zeros", "scale"} and packed.encodings == (gptq.GPTQ(4, 32, 1),)
    assert unpack(packed, stored).isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_groups_that_are_not_there_are_refused(ordered: Any, wrong: int, tmp_path: Path) -> None:
    order = torch.arange(96) // 32
    order[7] = wrong
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a\.g_idx names groups from .* of 3; download"):
        ordered(order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_even_groups_are_unpacked_as_any_are(ordered: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever the chunks; an odd number of outputs has no words of eight bytes."""
    stored, packed = ordered(torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32)
    parts, (packing_found,) = {name: stored[info.name] for name, info in packed.parts.items()}, packed.encodings
    # What a GPU does is done on the processor here.
    scale, words, groups = parts["scale"].float(), parts["weight"], parts["group_index"]
    minimum = packing_found._zeros(parts["zeros"]).float().mul_(scale).neg_()
    wanted = unpack(packed, stored, dtype).t()
    for outputs in (64, 53):
        for values in (1, 96 * 16, 1 << 18):
            monkeypatch.setattr(base, "HOST_VALUES", values)
            out = torch.full((96, 80), torch.nan, dtype=dtype)
            given = (part[:, :outputs] for part in (words, scale, minimum))
            packing_found._unpack_even(*given, groups, out[:, 3 : 3 + outputs])
            assert torch.equal(out[:, 3 : 3 + outputs], wanted[:, :outputs])
            assert out[:, :3].isnan().all() and out[:, 3 + outputs :].isnan().all()


def test_no_groups_at_all_are_refused() -> None:
    index = {name: _info(name.removeprefix("a."), *entry) for name, entry in WHOLE.items()}
    none = {"a.qzeros": _info("qzeros", "I32", 0, 4), "a.scales": _info("scales", "F16", 0, 32)}
    with pytest.raises(CheckpointError, match="do not fit"):
        gptq.find({"bits": 4, "desc_act": True}, index | none, {})


def test_a_missing_tensor_and_another_shape_are_refused() -> None:
    index = {"a.qweight": _info("qweight", "I32", 8, 32), "a.qzeros": _info("qzeros", "I32", 2, 4)}
    with pytest.raises(CheckpointError, match=r"a\.scales is missing"):
        gptq.find({"bits": 4}, index, {})
    index["a.scales"] = _info("scales", "F16", 2, 32)
    with pytest.raises(UnsupportedModelError, match="Conv1D"):
        gptq.find({"bits": 4}, index, {"a.weight": (64, 32)})
