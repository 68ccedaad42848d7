"""MXFP4: what is unpacked equals what transformers dequantises; tensors that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import packed_mxfp4
import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from airllm_nb.encoding import base, mxfp4
from airllm_nb.encoding.base import Encoded
from airllm_nb.errors import CheckpointError
from airllm_nb.tensors.index import TensorInfo, read_index

STEM = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_mxfp4.make(tmp_path_factory.mktemp("mxfp4") / "gpt-oss", tiny_llama())


def unpack(packed: Encoded, stored: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """``[experts, rows, columns]``, unpacked one expert at a time."""
    (how,), (experts, rows, columns) = packed.encodings, packed.shape
    assert how.transposed and how.row_steps(packed.shape[-1]) is None and packed.pieces == 1
    out = torch.full((experts, columns, rows), torch.nan, dtype=dtype)
    for expert in range(experts):
        how.unpack({part: stored[info.name][expert] for part, info in packed.parts.items()}, out[expert])
    return out.transpose(1, 2)


def test_weights_are_those_of_transformers(folder: Path) -> None:
    model, stored = packed_mxfp4.reference(folder), load_file(folder / "model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    mxfp4.check({"quant_method": "mxfp4"})
    found = mxfp4.find({}, read_index(folder), shapes)
    assert set(found) == {f"model.layers.{i}.mlp.experts.{name}_proj" for i in (0, 1) for name in ("gate_up", "down")}
    for name, packed in found.items():
        wanted = model.get_parameter(name)
        assert packed.nbytes == wanted.numel() * 17 // 32
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(unpack(packed, stored, dtype), wanted.to(dtype))


def test_every_value_and_every_scale() -> None:
    """All bytes at all powers of two, also those that float32 holds with fewer digits; the last one says NaN."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(1, 1, 16)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].t()
    out = torch.empty(256, 512)
    mxfp4.MXFP4().unpack({"weight": blocks[0], "scale": scales[0]}, out)
    assert torch.equal(out[:255], wanted[:255])
    assert out[255].isnan().all()
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.empty(256, 512, dtype=dtype)
        mxfp4.MXFP4().unpack({"weight": blocks[0], "scale": scales[0]}, half)
        assert torch.equal(half[:255], wanted[:255].to(dtype))


@pytest.mark.parametrize("values", [1, 500, 3000])
def test_chunks_and_strides_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    stored = load_file(folder / "model.safetensors")
    packed = mxfp4.find({}, read_index(folder), {})[STEM]
    parts = {part: stored[info.name][2] for part, info in packed.parts.items()}
    wanted = unpack(packed, stored, torch.float32)[2].t()
    monkeypatch.setattr(base, "HOST_VALUES", values)
    room = torch.full((wanted.shape[0], wanted.shape[1] + 24), torch.nan)
    packed.encodings[0].unpack(parts, room[:, 8:-16])
    assert torch.equal(room[:, 8:-16], wanted)
    assert room[:, :8].isnan().all() and room[:, -16:].isnan().all()


@pytest.mark.parametrize(
    ("suffix", "dtype", "shape"),
    [
        ("blocks", "U8", (4, 192, 2, 15)),
        ("blocks", "U8", (4, 191, 2, 16)),
        ("blocks", "I8", (4, 192, 2, 16)),
        ("scales", "U8", (4, 192)),
        ("scales", "U8", (4, 192, 3)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder: Path, suffix: str, dtype: str, shape: tuple[int, ...]) -> None:
    index: dict[str, TensorInfo] = dict(read_index(folder))
    name = f"{STEM}_{suffix}"
    index[name] = replace(index[name], dtype=dtype, shape=shape)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: its packed tensors do not fit"):
        mxfp4.find({}, index, {})


def test_a_missing_tensor_and_another_shape_are_refused(folder: Path) -> None:
    index = dict(read_index(folder))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        mxfp4.find({}, index, {STEM: (4, 192, 64)})
    del index[f"{STEM}_scales"]
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scales is missing"):
        mxfp4.find({}, index, {})


def test_blocks_may_lie_flat(folder: Path) -> None:
    """``[experts, out, in / 2]``, as the native parameter of packed bytes has them."""
    index, stored = dict(read_index(folder)), load_file(folder / "model.safetensors")
    wanted = unpack(mxfp4.find({}, index, {})[STEM], stored, torch.float32)
    name = f"{STEM}_blocks"
    stored[name] = stored[name].flatten(2)
    index[name] = replace(index[name], shape=tuple(stored[name].shape))
    assert torch.equal(unpack(mxfp4.find({}, index, {})[STEM], stored, torch.float32), wanted)
