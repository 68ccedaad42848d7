"""AWQ: what is unpacked equals what AutoAWQ makes of it; what cannot be done is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_awq
import pytest
import torch
from safetensors.torch import load_file

from airllm_nb.encoding import awq, base
from airllm_nb.errors import CheckpointError, UnsupportedModelError
from airllm_nb.tensors.index import TensorInfo, read_index

VARIANTS: list[dict[str, Any]] = [{}, {"zero_point": False}, {"group_size": 64}, {"group_size": -1}]


@pytest.fixture
def made(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """``made(**variant)``: a checkpoint and its settings."""

    def make(**variant: Any) -> tuple[Path, dict[str, Any]]:
        folder = packed_awq.make(tmp_path / "awq", tiny_llama(num_hidden_layers=1), **variant)
        return folder, json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]

    return make


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weights_are_those_of_autoawq(made: Any, variant: dict[str, Any]) -> None:
    folder, settings = made(**variant)
    stored, wanted = load_file(folder / "model.safetensors"), packed_awq.weights(folder)
    awq.check(settings)
    found = awq.find(settings, read_index(folder), {name: tuple(value.shape) for name, value in wanted.items()})
    assert len(found) == 7
    for name, packed in found.items():
        (how,), (rows, columns) = packed.encodings, packed.shape
        assert how.transposed and how.row_steps(packed.shape[-1]) is None and packed.shape == wanted[name].shape
        parts = {part: stored[info.name] for part, info in packed.parts.items()}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.full((columns, rows), torch.nan, dtype=dtype)
            how.unpack(parts, out)
            expected = wanted[name].to(dtype)
            if dtype == torch.float32:
                torch.testing.assert_close(out.t(), expected, rtol=1e-6, atol=1e-9)
            else:
                assert torch.equal(out.t(), expected)


def test_the_model_is_dequantised_near_to_the_plain_one(made: Any, tiny_llama: Callable[..., Path]) -> None:
    """The reference itself: rounding to 4 bits moves weights by less than a step, and changes them."""
    folder, _ = made()
    plain = load_file(tiny_llama(num_hidden_layers=1) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = packed_awq.reference(folder).get_parameter(name)
    step = (plain[name].max() - plain[name].min()) / 15
    assert 0 < (weight - plain[name]).abs().max() < step


@pytest.mark.parametrize("values", [1, 700, 5000])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_chunks_and_strides_change_nothing(
    made: Any, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any], values: int
) -> None:
    folder, settings = made(**variant)
    stored = load_file(folder / "model.safetensors")
    packed = awq.find(settings, read_index(folder), {})["model.layers.0.mlp.down_proj.weight"]
    parts = {part: stored[info.name] for part, info in packed.parts.items()}
    wanted, room = torch.empty(128, 64), torch.full((128, 88), torch.nan)
    packed.encodings[0].unpack(parts, wanted)
    monkeypatch.setattr(base, "HOST_VALUES", values)
    packed.encodings[0].unpack(parts, room[:, 8:-16])
    assert torch.equal(room[:, 8:-16], wanted)
    assert room[:, :8].isnan().all() and room[:, -16:].isnan().all()


def test_both_ways_to_take_words_apart_agree() -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (7, 9), generator=torch.Generator().manual_seed(0)).int()
    host, device = torch.empty(2, 7, 9, 8, dtype=torch.uint8)
    awq._fill_on_host(words, host)
    awq._fill_on_device(words, device)
    assert torch.equal(host, device)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 4, "version": "gemv"}, "'gemv'"),
        ({"bits": 4, "version": "GEMV_FAST"}, "'gemv_fast'"),
        ({"bits": 4, "version": "marlin"}, "'marlin'"),
        ({"bits": 4, "checkpoint_format": "gemv"}, "'gemv'"),
        ({"bits": 4, "version": "gemm", "backend": "llm-awq"}, "'llm-awq'"),
        ({"bits": 8, "version": "gemm"}, "8 bits"),
        ({"w_bit": 3}, "3 bits"),
    ],
)
def test_other_versions_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        awq.check(settings)


def test_plain_settings_pass() -> None:
    for settings in ({}, {"bits": 4, "version": "GEMM"}, {"bits": 4, "checkpoint_format": "gemm", "version": None}):
        awq.check(settings)


def _info(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(f"a.{name}", dtype, shape, ())


@pytest.mark.parametrize(
    "wrong",
    [
        _info("qweight", "I32", 64, 5),
        _info("qweight", "I32", 65, 4),
        _info("qweight", "I16", 64, 4),
        _info("qzeros", "I32", 3, 4),
        _info("scales", "F16", 2, 31),
        _info("scales", "F16", 0, 32),
    ],
    ids=lambda info: f"{info.name} {info.dtype} {info.shape}",
)
def test_tensors_that_do_not_fit_are_refused(wrong: TensorInfo) -> None:
    infos = [_info("qweight", "I32", 64, 4), _info("qzeros", "I32", 2, 4), _info("scales", "F16", 2, 32)]
    index = {info.name: info for info in infos}
    assert awq.find({}, index, {})["a.weight"].shape == (32, 64)
    with pytest.raises(CheckpointError, match=r"a: its packed tensors do not fit"):
        awq.find({}, index | {wrong.name: wrong}, {})
    with pytest.raises(CheckpointError, match=r"a: its packed tensors do not fit"):
        awq.find({}, index, {"a.weight": (64, 32)})
    with pytest.raises(CheckpointError, match=r"a\.qzeros is missing"):
        awq.find({}, {name: info for name, info in index.items() if name != "a.qzeros"}, {})
