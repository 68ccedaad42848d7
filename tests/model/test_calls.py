"""What the source of a forward says of its children; and weights that are read where no hook brings them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from airllm_nb.model.absent import AbsentWeight
from airllm_nb.model.calls import calls_of, in_order_of_use
from airllm_nb.model.skeleton import build
from airllm_nb.tensors.index import read_header


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def backwards(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.inner, self.image = Leaf(), Leaf(), Leaf(), Leaf()
        self.layers = nn.ModuleList([Leaf()])


class Orderly(Parent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.last.weight.dtype:  # is no use of it
            x = x + self.image.width if hasattr(self.image, "width") else x
        x = self.last(self._begin(x))
        for layer in self.layers:
            x = layer(x)
        return x

    def _begin(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.inner.scale


class Inherited(Orderly):
    def _begin(self, x: torch.Tensor) -> torch.Tensor:
        return super()._begin(self.image(x))


class Taker(Parent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.inner
        x = nn.functional.linear(x, self.first.weight) + torch.sum(x, *[0], out=None)
        return nn.functional.linear(x, inner.weight.t()) + compute(self.last, x)


def decorated(function: Any) -> Any:
    """Without functools.wraps."""

    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


class Decorated(Parent):
    @decorated
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(self.last(x))


class Bypasser(Parent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first.backwards(self.inner.extra_repr() or x)


class Seeing(Parent):
    def forward(self, x: torch.Tensor, pixel_values: Any = None, depth: Any = None) -> torch.Tensor:
        if pixel_values is not None and depth != 1:
            x = x + self._look(pixel_values)
        x = x if pixel_values is None else self.inner(x)
        return self.first(x)

    def _look(self, image: torch.Tensor) -> torch.Tensor:
        return self.first(self.image(image))


def compute(layer: Leaf, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.weight


def test_children_are_in_the_order_of_their_use() -> None:
    assert calls_of(Orderly()).order == ["first", "inner", "last", "layers"]
    assert [name for name, _ in in_order_of_use(Orderly())] == ["first", "inner", "last", "image", "layers"]
    assert calls_of(Inherited()).order == ["image", "first", "inner", "last", "layers"]
    assert calls_of(Decorated()).order == ["last", "first"]
    assert [name for name, _ in in_order_of_use(nn.Sequential(Leaf(), Leaf()))] == ["0", "1"]


def test_matrices_that_are_read_without_a_call_are_taken() -> None:
    assert calls_of(Taker()).taken == {"first", "inner", "last"}
    # A vector is always there; a dtype is known without the weight.
    assert not calls_of(Orderly()).taken
    assert not calls_of(Leaf()).taken


def test_what_runs_by_another_method_is_bypassed() -> None:
    assert calls_of(Bypasser()).bypassed == {"first"}
    assert calls_of(Bypasser()).taken == {"first"}


def test_what_only_an_image_needs_is_optional() -> None:
    assert calls_of(Seeing()).optional == {"image", "inner"}
    assert not calls_of(Orderly()).optional


@pytest.mark.parametrize(
    ("model_type", "path", "expected"),
    [
        ("phi3", "model.layers.0.self_attn", ["qkv_proj", "o_proj"]),
        ("opt", "model.decoder.layers.0.self_attn", ["q_proj", "k_proj", "v_proj", "out_proj"]),
        ("qwen3_moe", "model.layers.0.mlp", ["gate", "experts"]),
    ],
)
def test_real_blocks_are_read(model_type: str, path: str, expected: list[str]) -> None:
    order = calls_of(native(model_type).get_submodule(path)).order
    assert [name for name in order if name in expected] == expected


def test_real_mixers_take_and_real_towers_are_optional() -> None:
    assert "conv1d" in calls_of(native("mamba").get_submodule("backbone.layers.0.mixer")).taken
    assert calls_of(native("jetmoe").get_submodule("model.layers.0.self_attention")).bypassed == {"experts"}
    assert calls_of(native("gemma3").model).optional == {"vision_tower", "multi_modal_projector"}


def native(model_type: str) -> Any:
    return build(tiny_models.tiny_config(model_type), torch.float32, torch.device("cpu"))


def test_source_that_cannot_be_read_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", nothing)

    class Frozen(Parent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(self.last(x))

    assert calls_of(Frozen()).order == []
    assert [name for name, _ in in_order_of_use(Frozen())] == ["last", "first", "inner", "image", "layers"]


# ---- weights that are elsewhere --------------------------------------------------------------------------------------


@pytest.fixture
def absent(tmp_path: Path) -> tuple[AbsentWeight, torch.Tensor]:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_file({"weight": values}, tmp_path / "model.safetensors")
    info = read_header(tmp_path / "model.safetensors")["weight"]
    meta = torch.empty(4, 3, device="meta")
    return AbsentWeight(meta, info, torch.bfloat16, torch.device("cpu"), torch.float32), values.float()


def test_an_absent_weight_is_read_when_it_is_used(absent: tuple[AbsentWeight, torch.Tensor]) -> None:
    weight, values = absent
    x = torch.ones(2, 3)
    assert nn.functional.linear(x, weight).equal(nn.functional.linear(x, values))
    assert torch.cat([weight, weight]).equal(torch.cat([values, values]))
    assert (weight[1] * 2).equal(values[1] * 2)
    assert (x @ weight.T).equal(x @ values.T)
    assert weight.data.equal(values)
    assert weight.to(torch.float64).equal(values.double())


def test_what_is_known_of_an_absent_weight_is_said_without_reading(
    absent: tuple[AbsentWeight, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _ = absent
    monkeypatch.setattr(AbsentWeight, "fetch", lambda self: pytest.fail("it was read"))
    assert (weight.shape, weight.dtype, weight.dim(), weight.numel()) == ((4, 3), torch.float32, 2, 12)
    assert weight.device == torch.device("cpu")
    assert weight.size(0) == weight.shape[0] == 4
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert "AbsentWeight" in repr(weight)


def test_every_weight_of_a_skeleton_has_one(tmp_path: Path) -> None:
    tiny_models.save_tiny("llama", tmp_path)
    with tiny_models.streamed(tmp_path) as model:
        weight = model.native.model.layers[2].mlp.down_proj.weight
        assert isinstance(weight, AbsentWeight)
        assert weight.clone().equal(tiny_models.resident(tmp_path).model.layers[2].mlp.down_proj.weight)
        assert AutoConfig.from_pretrained(tmp_path).hidden_size == 64
