"""GGUF files streamed as they lie: the same text as transformers, and no byte but the file's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gemma3 import gemma3_gguf
from gguf_files import dequantised_gguf, mixed, tiny_gpt2_gguf, tiny_llama_gguf, tiny_qwen2moe_gguf

from airllm_nb import AutoModel
from airllm_nb.checkpoint.gguf.header import read_gguf
from airllm_nb.checkpoint.gguf.in_place import in_place
from airllm_nb.checkpoint.gguf.weights import GGUFWeights, gguf_config
from airllm_nb.model.slices import SlicedLinear

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 9, 3, 40, 41, 7], [1, 2, 3, 4, 5, 6]])


def greedy(model: Any, ids: torch.Tensor, tokens: int = 8) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )


def check(path: Path, expected: Any, shards: Path, **options: Any) -> None:
    """Logits and greedy tokens, computed in float32."""
    with AutoModel.from_pretrained(path, dtype="float32", layer_shards_saving_path=shards, **options) as model:
        with torch.inference_mode():
            wanted = expected(IDS).logits
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        assert torch.equal(greedy(model, IDS), greedy(expected, IDS))


LLAMAS = {
    **{kind: {"kind": kind} for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "F32", "BF16")},
    **{kind: {"kind": kind, "hidden": 256, "inner": 512} for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")},
    **{kind: {"kind": kind, "hidden": 256, "inner": 512} for kind in ("IQ1_S", "IQ2_XXS", "IQ3_XXS", "IQ4_XS")},
    "IQ4_NL": {"kind": "IQ4_NL"},
    "Q4_K_M": {"kind": mixed, "hidden": 256, "inner": 512},
    "Q4_K_M, tied": {"kind": mixed, "hidden": 256, "inner": 512, "tied": True},
}


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_in_every_common_type(tmp_path: Path, name: str) -> None:
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", **LLAMAS[name])
    expected = dequantised_gguf(path)
    check(path, expected, tmp_path / "shards")
    check(path, expected, tmp_path / "shards", vram_budget="40MiB")


@pytest.mark.parametrize("make", [tiny_qwen2moe_gguf, tiny_gpt2_gguf])
def test_architectures_with_their_own_layout(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "tiny.gguf")
    expected = dequantised_gguf(path)
    check(path, expected, tmp_path / "shards")
    check(path, expected, tmp_path / "shards", vram_budget="60MiB")


def test_large_matrices_pass_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows of the packed bytes, a tied head among them; not those whose rows lie in another order."""
    monkeypatch.setattr("airllm_nb.model.slices.UNIT_BYTES", 100 << 10)
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", kind="Q4_K", hidden=256, inner=512, tied=True, words=300)
    options: dict[str, Any] = {"vram_budget": "40MiB", "ram_budget": "512KiB"}
    check(path, dequantised_gguf(path), tmp_path / "shards", **options)
    with AutoModel.from_pretrained(path, layer_shards_saving_path=tmp_path / "shards", **options) as model:
        sliced = {name for name, module in model.native.named_modules() if isinstance(module, SlicedLinear)}
        assert {"lm_head", "model.layers.1.mlp.up_proj"} <= sliced
        assert not any("q_proj" in name for name in sliced)


def test_the_files_own_bytes_move(tmp_path: Path) -> None:
    """Every matrix of the layers once a sweep, packed, and nothing of it is written again."""
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", kind=mixed, hidden=256, inner=512)
    tensors = read_gguf(path).tensors
    matrices = sum(
        tensor.nbytes for name, tensor in tensors.items() if name.startswith("blk.") and len(tensor.shape) > 1
    )
    with AutoModel.from_pretrained(
        path, layer_shards_saving_path=tmp_path / "shards", vram_budget="40MiB", prefetching=False
    ) as model:
        blocks = [unit for unit in model._prepared.units if unit.kind == "block"]
        assert sum(unit.nbytes for unit in blocks) == matrices
        assert {piece.extent.path for unit in model._prepared.units for piece in unit.stream.pieces} == {path}
        model(IDS)
        assert model.trace.totals["copy"].nbytes == model.plan.streamed_bytes
    written = sum(file.stat().st_size for file in (tmp_path / "shards").rglob("*.safetensors"))
    assert written < 0.1 * path.stat().st_size + 20_000, "vectors and the tokenizer, no matrix"


def test_experts_are_read_where_they_lie(tmp_path: Path) -> None:
    path = tiny_qwen2moe_gguf(tmp_path / "tiny.gguf")
    with AutoModel.from_pretrained(path, layer_shards_saving_path=tmp_path / "shards") as model:
        experts = model.native.model.layers[0].mlp.experts
        assert experts.gate_up_proj.shape == (4, 2 * experts.intermediate_dim, 64)
        assert "gate_up_proj" not in experts._parameters and experts.gate_up_proj__weight.dtype == torch.uint8


MIXED_EXPERTS = {
    "gate smaller": lambda name: "Q4_0" if "ffn_gate_exps" in name else "Q8_0",
    "up smaller": lambda name: "Q5_1" if "ffn_up_exps" in name else "Q8_0",
    "gate not packed": lambda name: "F16" if "ffn_gate_exps" in name else "Q8_0",
}


@pytest.mark.parametrize("name", MIXED_EXPERTS)
def test_experts_of_two_types_stay_packed(tmp_path: Path, name: str) -> None:
    path = tiny_qwen2moe_gguf(tmp_path / "tiny.gguf", kind=MIXED_EXPERTS[name])
    expected = dequantised_gguf(path)
    check(path, expected, tmp_path / "shards")
    check(path, expected, tmp_path / "shards", vram_budget="60MiB", ram_budget="1MiB")
    file = read_gguf(path)
    found = in_place(GGUFWeights(file, gguf_config(file), "float32"))
    experts = {tensor.name: tensor.nbytes for tensor in file.tensors.values() if "_exps" in tensor.name}
    assert sum(weight.nbytes for weight in found.packed.values() if len(weight.shape) == 3) == sum(experts.values())
    assert not any("experts" in name for name in found.rest)


def test_much_that_is_written_once_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2's matrices lie transposed: they are the values of others."""
    path = tiny_gpt2_gguf(tmp_path / "tiny.gguf")
    file = read_gguf(path)
    weights = GGUFWeights(file, gguf_config(file), "float32")
    in_place(weights)
    assert not caplog.records, "so little"
    monkeypatch.setattr("airllm_nb.checkpoint.gguf.in_place.WORTH_A_WARNING", 1)
    in_place(weights)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("tiny.gguf: 8 matrices (transformer.h.0.attn.c_attn.weight, …) cannot be streamed")
    assert line.endswith("which takes 384.0 KiB")


# ---- real models -----------------------------------------------------------------------------------------------------


class Real(NamedTuple):
    """A file, what transformers makes of it, and where what is written once is shared."""

    path: Path
    expected: Any
    shards: Path


@pytest.mark.parametrize(
    ("budgets", "tokens"),
    [({}, 7), ({"vram_budget": "330MiB", "ram_budget": "60MiB"}, 12)],
    ids=["in place", "streamed"],
)
def test_smollm2_says_what_transformers_says(smollm2: Real, budgets: dict[str, str], tokens: int) -> None:
    path, expected, shards = smollm2
    with AutoModel.from_pretrained(path, dtype="float32", layer_shards_saving_path=shards, **budgets) as model:
        prompt = [{"role": "user", "content": "What is the capital of France?"}]
        ids = model.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        ours = greedy(model, ids, tokens)
        assert torch.equal(ours, greedy(expected, ids, tokens))
        assert "Paris" in model.tokenizer.decode(ours[0, ids.shape[1] :])


@pytest.mark.parametrize(
    ("budgets", "tokens"),
    [({}, 2), ({"vram_budget": "330MiB", "ram_budget": "260MiB"}, 8)],
    ids=["in place", "streamed"],
)
def test_gemma3_says_what_transformers_says(gemma3: Real, budgets: dict[str, str], tokens: int) -> None:
    """Q4_K, Q6_K, Q5_0 and Q8_0 in one file, a table of a quarter million rows that is also the head."""
    path, expected, shards = gemma3
    options: dict[str, Any] = {"dtype": "float32", "max_seq_len": 64, "layer_shards_saving_path": shards, **budgets}
    with AutoModel.from_pretrained(path, **options) as model:
        ids = model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = expected(ids).logits
            wanted = greedy(expected, ids, tokens)
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
        ours = greedy(model, ids, tokens)
        assert torch.equal(ours, wanted)
        assert tokens < 8 or "is the capital of" in model.tokenizer.decode(ours[0])
        assert bool(budgets) == bool(model.plan.streamed_bytes)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    return Real(smollm2_gguf, dequantised_gguf(smollm2_gguf), tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Real:
    path = gemma3_gguf()
    return Real(path, dequantised_gguf(path), tmp_path_factory.mktemp("shards"))
