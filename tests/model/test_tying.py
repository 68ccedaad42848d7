"""The config ties two weights, and the checkpoint has both: what runs is what transformers makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from gguf_files import tiny_gpt2_gguf, tiny_llama_gguf
from safetensors.torch import load_file, save_file

from airllm_nb import AutoModel, plan_model
from airllm_nb.checkpoint.gguf.header import read_gguf
from airllm_nb.config import LoadOptions
from airllm_nb.errors import CheckpointError
from airllm_nb.model import tying
from airllm_nb.tensors.index import Extent, TensorInfo

pytestmark = pytest.mark.usefixtures("one_thread")

# Each with another class of head, of table, or of ties; bart and t5-like ones tie several names to one weight.
KINDS = ("llama", "gpt2", "gemma2", "opt", "bloom", "bart", "bert", "mamba", "falcon")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path / "cache"))


def tied(kind: str, folder: Path) -> dict[str, str]:
    """Saves a tiny model whose config ties; returns the names of the tied weights → what they are tied to."""
    config = tiny_models.tiny_config(kind)
    config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny_models.full_class(config).from_config(config, dtype=torch.float32).eval()
        tiny_models.randomise(model)
    model.save_pretrained(folder)
    return dict(model.all_tied_weights_keys)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def noise(like: torch.Tensor, seed: int = 7) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def own_heads(folder: Path, ties: dict[str, str]) -> Path:
    """Every weight that the config ties gets values of its own in the file."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        for at, (target, source) in enumerate(ties.items()):
            weights[target] = noise(weights[source], at)

    return change(folder, edit)


def equal_heads(folder: Path, ties: dict[str, str]) -> Path:
    return change(folder, lambda weights: weights.update({n: weights[source].clone() for n, source in ties.items()}))


def check(folder: Path, ties: dict[str, str]) -> Any:
    right = tiny_models.resident(folder)
    with tiny_models.streamed(folder) as model:
        for ours, theirs in zip(tiny_models.run(model), tiny_models.run(right), strict=True):
            assert torch.equal(ours, theirs)
        prepared = model._prepared
        bound = [*prepared.small, *(binding.weight for unit in prepared.units for binding in unit.bindings)]
        for pair in ties.items():
            modules = {prepared.skeleton.get_submodule(name.rpartition(".")[0]) for name in pair}
            shared = any(modules <= {module for module, _ in weight.owners} for weight in bound)
            assert shared == (right.get_parameter(pair[0]) is right.get_parameter(pair[1]))
    return right


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_of_the_file_are_used(tmp_path: Path, kind: str) -> None:
    ties = tied(kind, tmp_path)
    assert ties, "nothing is tied: nothing is tested"
    right = check(own_heads(tmp_path, ties), ties)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(right.get_parameter(name), weights[name]) for name in ties)


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_equal_copies_stay_tied(tmp_path: Path, kind: str) -> None:
    ties = tied(kind, tmp_path)
    check(equal_heads(tmp_path, ties), ties)


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_what_others_are_tied_to_may_be_missing(tmp_path: Path, kind: str) -> None:
    ties = tied(kind, tmp_path)
    target, source = next(iter(ties.items()))
    check(change(tmp_path, lambda weights: weights.update({target: weights.pop(source)})), ties)


def test_the_plan_counts_what_is_not_tied(tmp_path: Path) -> None:
    ties, sizes = tied("llama", tmp_path), []
    options = LoadOptions.create(device="cpu")
    for edit in (lambda folder: folder, lambda folder: own_heads(folder, ties)):
        sizes.append(plan_model(edit(tmp_path), options).fit.weights)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].nbytes
    assert abs(sizes[1] - sizes[0] - table) < 4096  # a place on a cache line of its own


@pytest.mark.parametrize(("compression", "equal"), [("4bit", False), ("8bit", False), ("8bit", True)])
def test_a_store_keeps_the_head(tmp_path: Path, compression: str, equal: bool) -> None:
    """As the same weights do whose config says that nothing is tied."""
    ties, untied = tied("llama", tmp_path / "tied"), tmp_path / "untied"
    if equal:
        equal_heads(tmp_path / "tied", ties)
    else:
        own_heads(tmp_path / "tied", ties)
    shutil.copytree(tmp_path / "tied", untied)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    results = []
    for folder in (untied, tmp_path / "tied", tmp_path / "tied"):  # the last from the store that the one before wrote
        with AutoModel.from_pretrained(folder, compression=compression, device="cpu", dtype="float32") as model:
            results.append(tiny_models.run(model))
    for tokens, logits in results[1:]:
        assert torch.equal(tokens, results[0][0]) and torch.equal(logits, results[0][1])


@pytest.mark.parametrize("shared", [False, True])
def test_pickles_that_hold_both(tmp_path: Path, shared: bool) -> None:
    """Those of torch always do: both names for the same bytes."""
    ties = tied("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for target, source in ties.items():
        weights[target] = weights[source] if shared else noise(weights[source])
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    check(tmp_path, ties)


def test_a_head_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airllm_nb.intake.planning.slice_limit", lambda *_: 40_000)
    ties = tied("llama", tmp_path)
    right = check(own_heads(tmp_path, ties), {})
    assert right.lm_head.weight.nbytes > 40_000


def test_an_adapter_on_top(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    own_heads(folder, tied("llama", folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        trained = get_peft_model(
            tiny_models.resident(folder), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        )
    trained.save_pretrained(adapter)
    right = PeftModel.from_pretrained(tiny_models.resident(folder), adapter).eval()
    with AutoModel.from_pretrained(folder, adapter=adapter, device="cpu", dtype="float32") as model:
        assert torch.equal(model(tiny_models.IDS).logits, right(tiny_models.IDS).logits)


@pytest.mark.parametrize("make", [tiny_llama_gguf, tiny_gpt2_gguf])
def test_gguf_files(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "tiny.gguf")
    right = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    has_own = "output.weight" in read_gguf(path).tensors
    assert has_own != (right.get_output_embeddings().weight is right.get_input_embeddings().weight)
    with AutoModel.from_pretrained(path, device="cpu", dtype="float32") as model:
        assert torch.equal(model(tiny_models.IDS % 60).logits, right(tiny_models.IDS % 60).logits)


def test_a_head_that_is_neither_tied_nor_there_is_refused(tmp_path: Path) -> None:
    """transformers would make one up."""
    tied("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        AutoModel.from_pretrained(tmp_path, device="cpu").close()


@pytest.mark.parametrize("how", ["own", "equal"])
def test_a_plan_reads_some_rows_at_most_and_an_open_reads_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    ties = tied("llama", tmp_path)
    (own_heads if how == "own" else equal_heads)(tmp_path, ties)
    read: list[int] = []
    chunks = tying._chunks

    def counted(files: Any, info: Any, as_bytes: bool) -> Any:
        read.append(info.nbytes)
        return chunks(files, info, as_bytes)

    monkeypatch.setattr(tying, "_chunks", counted)
    weights = load_file(tmp_path / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    some = 2 * 16 * table[0].nbytes
    plan_model(tmp_path, LoadOptions.create(device="cpu"))
    assert 0 < sum(read) <= some < table.nbytes
    for opened in range(2):
        AutoModel.from_pretrained(tmp_path, device="cpu").close()
        assert sum(read) == some + (2 * table.nbytes if how == "equal" else 0), opened
    weights["lm_head.weight"][1] += 1  # between the rows that are looked at first
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    check(tmp_path, ties)
    assert sum(read) >= 2 * some, "another file is looked at anew"


def test_heads_that_are_not_here_stay_tied_and_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_models.tiny_config("llama")
    config.tie_word_embeddings = True
    model = tiny_models.full_class(config).from_config(config)
    where = Extent(tmp_path / "not here", 0, 100), Extent(tmp_path / "not here", 100, 100)
    names = "model.embed_tokens.weight", "lm_head.weight"
    tensors = {name: TensorInfo(name, "F32", (5, 5), (at,)) for name, at in zip(names, where, strict=True)}
    with caplog.at_level("INFO"):
        tying.untie(model, tensors)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [record.levelname for record in caplog.records if "tied" in record.getMessage()] == ["INFO"]
