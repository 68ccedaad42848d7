"""Matrices that pass in slices of rows: the cut is exact, and the model says what the resident one says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from airllm_nb.config import LoadOptions
from airllm_nb.encoding.base import encoded
from airllm_nb.encoding.formats import get_encoding
from airllm_nb.encoding.linear import EncodedLinear
from airllm_nb.encoding.scratch import Scratch
from airllm_nb.engine.facade import StreamedModel, open_model
from airllm_nb.errors import BudgetError, CheckpointError
from airllm_nb.intake import planning, prepare
from airllm_nb.model import skeleton as skeleton_module
from airllm_nb.model.skeleton import build, collect_weights, cut_units, is_tied
from airllm_nb.model.slices import ROW_STEP, UNIT_BYTES, SlicedLinear, row_counts, slice_limit, slice_linears
from airllm_nb.plan.experts import staging
from airllm_nb.tensors.index import Extent, TensorInfo

pytestmark = pytest.mark.usefixtures("one_thread")

# Of float32 matrices 256 wide: two steps of rows.
LIMIT = 270_000
SMALL = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 1000, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 512, "num_key_value_heads": 2}
FAMILIES = {
    "llama": {**GATED, "tie_word_embeddings": False},
    "mistral": {**GATED, "tie_word_embeddings": True, "sliding_window": 8},
    "qwen2": GATED,
    "gemma2": {**GATED, "head_dim": 64, "tie_word_embeddings": True, "final_logit_softcapping": 5.0},
    "gemma3_text": {**GATED, "head_dim": 64, "tie_word_embeddings": True},
    "phi": {**SMALL, "intermediate_size": 512},
    "gpt_neox": {**SMALL, "intermediate_size": 512},
    "mixtral": {**GATED, "num_local_experts": 4, "tie_word_embeddings": False},
    "opt": {**SMALL, "ffn_dim": 512, "word_embed_proj_dim": 256, "max_position_embeddings": 128},
    "mamba": {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 1000, "state_size": 8},
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.tensor([[5, 70, 990, 33, 60]])


@pytest.fixture
def slicing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``slicing(limit, rearrange=…)``: models opened from now on have units and slices of up to ``limit`` bytes."""

    def switch_on(limit: int = LIMIT, rearrange: Callable[..., Any] = lambda tensors: tensors) -> None:
        def collect(model: Any, tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> Any:
            return collect_weights(model, slice_linears(model, rearrange(tensors), limit), dtype)

        monkeypatch.setattr(planning, "collect_weights", collect)
        monkeypatch.setattr(skeleton_module.cut_units, "__defaults__", (limit,))

    return switch_on


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``family("llama", stored="float32", **config)``: a folder with a random model of random biases."""
    made: dict[str, Path] = {}

    def factory(name: str, stored: str = "float32", **config: Any) -> Path:
        key = json.dumps([name, stored, config], sort_keys=True)
        if key not in made:
            torch.manual_seed(0)
            settings = AutoConfig.for_model(name, **FAMILIES[name] | TOKENS | config)
            model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, stored)).eval()
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
            made[key] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[key])
        return made[key]

    return factory


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        mask = torch.ones_like(IDS)
        tokens = model.generate(IDS, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return tokens, model(IDS).logits


def expected_of(folder: Path, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    return run(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval())


def budgets_of(folder: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Nothing streamed; from disk to the host; and through a device that holds a few units, from disk and RAM."""
    with open_model(folder, LoadOptions.create(max_seq_len=16, **options)) as model:
        banks = [unit.experts for unit in model._prepared.sizes if unit.experts]
        dense = [unit.nbytes * 21 // 20 for unit in swept(model) if not unit.experts]
        room = max(5 * LIMIT, *dense) + staging(banks, 0)[1]
        needed = model.plan.needs.total
    yield {}
    yield {"ram_budget": room}
    yield {"vram_budget": needed + room, "ram_budget": room, "max_seq_len": 16}


def open_plain(folder: Path) -> StreamedModel:
    """The same model with nothing sliced, whatever is patched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "collect_weights", collect_weights)
        patch.setattr(skeleton_module.cut_units, "__defaults__", (UNIT_BYTES,))
        return open_model(folder, LoadOptions.create())


def swept(model: StreamedModel) -> list[Any]:
    return [unit for unit in model._prepared.units if unit.kind != "embedding"]


def read_bytes(model: StreamedModel) -> int:
    return sum(unit.stream.read_bytes for unit in swept(model))


def sliced(model: Any) -> dict[str, SlicedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SlicedLinear)}


# ---- the cut ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 100_000), st.sampled_from([1, 16, 128]))
def test_rows_are_shared_out_within_the_limit(rows: int, row_bytes: int, limit: int, step: int) -> None:
    counts = row_counts(rows, rows * row_bytes, limit, step)
    assert sum(counts) == rows
    assert all(count > 0 for count in counts)
    assert all(count % step == 0 for count in counts[:-1])
    assert max(counts) * row_bytes <= max(limit, min(step, rows) * row_bytes)
    # Nearly equal, and no more of them than needed.
    assert max(counts[:-1], default=0) - min(counts[:-1], default=0) <= step
    if len(counts) > 1:
        most = max(limit // (row_bytes * step), 1) * step
        assert (len(counts) - 1) * most < rows


@given(st.data())
def test_rows_lie_where_the_whole_has_them(data: st.DataObject) -> None:
    """Extents of chance over two files, cut anywhere, rows of several bytes: reading a slice reads its rows."""
    rows, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows * width * 2), max_size=6)) - {rows * width * 2})
    content = {Path("a"): data.draw(st.randoms()).randbytes(1000), Path("b"): bytes(range(250)) * 4}
    extents = []
    for start, end in zip([0, *cuts], [*cuts, rows * width * 2], strict=True):
        extents.append(Extent(data.draw(st.sampled_from([*content])), data.draw(st.integers(0, 500)), end - start))
    whole = TensorInfo("w", "BF16", (rows, width), tuple(extents))

    def read(info: TensorInfo) -> bytes:
        return b"".join(content[e.path][e.offset : e.offset + e.nbytes] for e in info.extents)

    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    part = whole.rows("part", [(first, last)])
    assert part.shape == (last - first, width)
    assert part.dtype == "BF16"
    assert read(part) == read(whole)[first * width * 2 : last * width * 2]
    assert all(extent.nbytes for extent in part.extents)


@pytest.mark.parametrize(
    ("vram", "ram", "limit"),
    [(4 << 30, 64 << 30, 512 << 20), (80 << 30, 8 << 30, 1 << 30), (1 << 30, 64 << 30, UNIT_BYTES), (0, 0, UNIT_BYTES)],
)
def test_the_limit_follows_the_smaller_budget(vram: int, ram: int, limit: int) -> None:
    assert slice_limit(vram, ram, has_device=True) == limit
    assert slice_limit(vram, ram, has_device=False) > 1 << 60


@pytest.mark.parametrize("bias", [True, False])
def test_slices_compute_what_the_whole_computes(bias: bool) -> None:
    """In whole numbers, so that the order of the sums does not matter."""
    whole = nn.Linear(24, 300, bias=bias, dtype=torch.float64)
    for parameter in whole.parameters():
        parameter.data = torch.randint(-8, 8, parameter.shape).double()
    counts, first, slices = row_counts(300, 300 * 24 * 8, 128 * 24 * 8), 0, []
    assert counts == [128, 128, 44]
    for rows in counts:
        part = nn.Linear(24, rows, bias=bias, dtype=torch.float64)
        for name, parameter in part.named_parameters():
            parameter.data = whole.get_parameter(name)[first : first + rows]
        slices.append(part)
        first += rows
    module = SlicedLinear(whole, slices, is_tied=False)
    for shape in [(24,), (1, 24), (2, 3, 24), (0, 24)]:
        x = torch.randint(-8, 8, shape).double()
        assert torch.equal(module(x), whole(x))
    assert module.weight is whole.weight
    assert module.bias is whole.bias
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"slices"}


# ---- the same words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_sliced_equals_resident(family: Callable[..., Path], slicing: Callable[..., None], name: str) -> None:
    folder = family(name)
    expected_tokens, expected_logits = expected_of(folder, "float32")
    slicing()
    for options in budgets_of(folder):
        with open_model(folder, LoadOptions.create(**options)) as model:
            assert model.native.get_output_embeddings() in sliced(model.native).values()
            tokens, logits = run(model)
            assert torch.equal(tokens, expected_tokens)
            scale = expected_logits.abs().max().item()
            torch.testing.assert_close(logits, expected_logits, atol=1e-5 * scale, rtol=0)
            if options:
                assert streamed_slices(model), "no slice was streamed"


def streamed_slices(model: StreamedModel) -> list[str]:
    placed = zip(model.plan.units, model.plan.tiers, strict=True)
    home = "gpu" if model.plan.machine.has_device else "ram"
    return [unit.name for unit, tier in placed if tier != home and ".slices." in unit.name]


def test_units_are_slices_within_the_limit(family: Callable[..., Path], slicing: Callable[..., None]) -> None:
    slicing()
    with open_model(family("llama"), LoadOptions.create()) as model:
        units = {unit.name: unit for unit in swept(model)}
        assert max(unit.nbytes for unit in units.values()) <= LIMIT
        heads = {name for name, unit in units.items() if unit.kind == "head"}
        assert heads == {f"lm_head.slices.{index}" for index in range(4)}
        assert {"model.layers.0.mlp.down_proj.slices.1", "model.layers.1.mlp.up_proj.slices.0"} <= set(units)
        assert model.native.get_output_embeddings() is model.native.lm_head
        assert (model.native.lm_head.in_features, model.native.lm_head.out_features) == (256, 1000)
        assert model.native.lm_head.weight.shape == (1000, 256)
        assert model.native.lm_head.weight.is_meta
        with open_plain(family("llama")) as plain:
            assert read_bytes(model) == read_bytes(plain)
            assert model.native.num_parameters() == plain.native.num_parameters()


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16",) * 2])
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_a_cast_slice_gives_what_a_resident_cast_gives(
    family: Callable[..., Path], slicing: Callable[..., None], name: str, stored: str, dtype: str
) -> None:
    folder = family(name, stored)
    expected_tokens, expected_logits = expected_of(folder, dtype)
    slicing(LIMIT // 2 if (stored, dtype) == ("bfloat16",) * 2 else LIMIT)
    for options in budgets_of(folder, dtype=dtype):
        with open_model(folder, LoadOptions.create(dtype=dtype, **options)) as model:
            assert len(sliced(model.native)) == 7
            tokens, logits = run(model)
            assert torch.equal(tokens, expected_tokens)
            tolerance = 1e-5 if dtype == "float32" else 1e-2
            torch.testing.assert_close(logits, expected_logits, atol=tolerance, rtol=0)


def test_slices_of_a_weight_in_several_runs_of_bytes(family: Callable[..., Path], slicing: Callable[..., None]) -> None:
    """As a merge of several tensors gives them; the cuts fall inside of rows and slices."""

    def in_pieces(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        def cut(whole: Extent) -> tuple[Extent, ...]:
            at = whole.nbytes * 2 // 5 + 3
            return (
                Extent(whole.path, whole.offset, at),
                Extent(whole.path, whole.offset + at, whole.nbytes - at),
            )

        return {name: dataclasses.replace(info, extents=cut(*info.extents)) for name, info in tensors.items()}

    folder = family("qwen2")
    expected = expected_of(folder, "float32")
    slicing(rearrange=in_pieces)
    for options in ({}, {"ram_budget": "1200KB"}):
        with open_model(folder, LoadOptions.create(**options)) as model:
            assert sliced(model.native)
            tokens, logits = run(model)
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(logits, expected[1], atol=1e-5, rtol=0)


def test_beams_and_lookup_with_slices_are_the_same(family: Callable[..., Path], slicing: Callable[..., None]) -> None:
    folder = family("mistral")
    resident = AutoModelForCausalLM.from_pretrained(folder).eval()
    ways = [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}]
    common = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False}
    expected = [resident.generate(IDS, **common, **way) for way in ways]
    slicing()
    with open_model(folder, LoadOptions.create(ram_budget="1200KB")) as model:
        for way, tokens in zip(ways, expected, strict=True):
            assert torch.equal(model.generate(IDS, **common, **way), tokens)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_a_model_whose_head_is_too_large_fits_in_slices(
    family: Callable[..., Path], slicing: Callable[..., None]
) -> None:
    folder = family("llama", vocab_size=4096)
    with open_model(folder, LoadOptions.create(max_seq_len=16)) as model:
        budget = model.plan.needs.total + 3 * LIMIT  # the head has 4 MiB
    options = LoadOptions.create(max_seq_len=16, vram_budget=budget, ram_budget=budget)
    with pytest.raises(BudgetError):
        open_model(folder, options)
    slicing()
    with open_model(folder, options) as model:
        assert model.plan.device_bytes <= budget
        assert torch.equal(run(model)[0], expected_of(folder, "float32")[0])


def test_llama_405b_passes_through_4_gib() -> None:
    """Its matrices, of two layers: planned, not run."""
    config = AutoConfig.for_model(
        "llama", hidden_size=16384, intermediate_size=53248, num_hidden_layers=2, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    model = build(config, torch.bfloat16, torch.device("cpu"))
    limit = slice_limit(4 << 30, 64 << 30, has_device=True)
    tensors = slice_linears(model, prepare.sizes_only(model), limit)
    units, _ = cut_units(model, collect_weights(model, tensors, torch.bfloat16))
    streamed = [unit for unit in units if unit.kind != "embedding"]
    assert sum(unit.nbytes for unit in streamed) == sum(
        tensor.nbytes for name, tensor in model.named_parameters() if tensor.dim() > 1 and "embed" not in name
    )
    assert max(unit.nbytes for unit in streamed) <= limit == 512 << 20
    assert sum("lm_head.slices." in unit.name for unit in streamed) == 8
    assert {m.out_features for n, m in model.named_modules() if "up_proj.slices." in n} == {53248 // 4}


# ---- tied ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3_text", "opt"])
def test_a_tied_table_keeps_its_bytes_and_takes_none_of_its_own(
    family: Callable[..., Path], slicing: Callable[..., None], name: str
) -> None:
    folder = family(name)
    slicing()
    with open_model(folder, LoadOptions.create()) as model, open_plain(folder) as plain:
        native, units = model.native, {unit.name: unit for unit in model._prepared.units}
        (table,) = [unit for unit in units.values() if unit.kind == "embedding" and is_tied(unit)]
        (planned,) = [unit for unit in model.plan.units if unit.name == table.name]
        assert planned.nbytes == 0
        (whole,) = table.stream.pieces
        assert native.lm_head.weight.shape == native.get_input_embeddings().weight.shape
        at = whole.extent.offset
        for index in range(4):
            (piece,) = units[f"lm_head.slices.{index}"].stream.pieces
            assert (piece.extent.path, piece.extent.offset) == (whole.extent.path, at)
            at += piece.extent.nbytes
        assert at == whole.extent.offset + whole.extent.nbytes
        assert read_bytes(model) == read_bytes(plain)


def test_a_checkpoint_that_holds_both_names_of_a_tied_weight(family: Callable[..., Path]) -> None:
    """The first name counts, as it does for the whole; so it does when sizes come from the config alone."""
    config = AutoConfig.from_pretrained(family("mistral"))
    model = build(config, torch.float32, torch.device("cpu"))
    tensors = prepare.sizes_only(model)
    assert tensors["lm_head.weight"].extents != tensors["model.embed_tokens.weight"].extents
    added = slice_linears(model, tensors, LIMIT)
    assert added["lm_head.slices.0.weight"].extents[0].offset == tensors["model.embed_tokens.weight"].extents[0].offset
    units, _ = cut_units(model, collect_weights(model, added, torch.float32), LIMIT)
    assert [is_tied(unit) for unit in units if unit.kind == "embedding"] == [True]


# ---- encoded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["4bit", "8bit"])
def test_encoded_matrices_are_sliced_and_so_is_their_scratch(
    family: Callable[..., Path], slicing: Callable[..., None], tmp_path: Path, compression: str
) -> None:
    options = {"compression": compression, "layer_shards_saving_path": tmp_path, "max_seq_len": 16}
    with open_model(family("phi"), LoadOptions.create(**options)) as model:
        expected, scratch = run(model), model.plan.needs.scratch
        needed = model.plan.needs.total
    # The encoded bytes are below it; what they become is not.
    slicing()
    for budgets in ({}, {"ram_budget": "600KB"}, {"vram_budget": needed + 3 * LIMIT, "ram_budget": "600KB"}):
        with open_model(family("phi"), LoadOptions.create(**options, **budgets)) as model:
            encoded = [m for module in sliced(model.native).values() for m in module.slices]
            assert sum(isinstance(module, EncodedLinear) for module in encoded) == 8
            assert model.plan.needs.scratch == scratch // 2
            tokens, logits = run(model)
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(logits, expected[1], atol=1e-5, rtol=0)


# ---- what stays whole ------------------------------------------------------------------------------------------------


class Parent(nn.Module):
    """What is asked of a model, and room for children of every kind."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def get_output_embeddings(self) -> None:
        return None


class Taker(Parent):
    """Computes with a weight below it without calling the layer that owns it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.inner.proj.weight)


class OtherLinear(nn.Linear):
    pass


def whole(rows: int = 4 * ROW_STEP) -> nn.Linear:
    return nn.Linear(8, rows, bias=False, device="meta")


def shared_twice() -> nn.Module:
    linear = whole()
    return Parent(one=linear, two=Parent(again=linear))


def tied_linears() -> nn.Module:
    one, two = whole(), whole()
    two.weight = one.weight
    return Parent(one=one, two=two)


def tied_to_positions() -> nn.Module:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    table, head = OPTLearnedPositionalEmbedding(4 * ROW_STEP - 2, 8), whole()
    table.weight = head.weight
    return Parent(table=table, head=head)


@pytest.mark.parametrize(
    "model",
    [
        Parent(other=OtherLinear(8, 4 * ROW_STEP, device="meta")),
        Parent(mixer=Taker(inner=Parent(proj=whole()))),
        Parent(few=whole(ROW_STEP)),
        Parent(ragged=EncodedLinear(encoded(get_encoding("8bit"), (4 * ROW_STEP, 40)), True, torch.float32, Scratch())),
        shared_twice(),
        tied_linears(),
        tied_to_positions(),
    ],
    ids=["subclass", "taken", "few rows", "blocks across rows", "shared", "tied linears", "tied to positions"],
)
def test_what_may_be_used_otherwise_stays_whole(model: nn.Module) -> None:
    tensors = prepare.sizes_only(model)
    assert slice_linears(model, tensors, 4096) is tensors
    assert not sliced(model)


def test_a_missing_or_misshapen_weight_is_reported_as_ever(family: Callable[..., Path]) -> None:
    model = build(AutoConfig.from_pretrained(family("llama")), torch.float32, torch.device("cpu"))
    tensors = prepare.sizes_only(model)
    lacking = {name: info for name, info in tensors.items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight;"):
        collect_weights(model, slice_linears(model, lacking, LIMIT), torch.float32)
    model = build(AutoConfig.from_pretrained(family("llama")), torch.float32, torch.device("cpu"))
    wrong = {**tensors, "lm_head.weight": dataclasses.replace(tensors["lm_head.weight"], shape=(1000, 255))}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[1000, 255\]"):
        collect_weights(model, slice_linears(model, wrong, LIMIT), torch.float32)
