"""Merged experts in 4 and 8 bits: every matrix is what the codec makes of it alone, and one expert is one read."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from gguf_files import dequantised_gguf, tiny_qwen2moe_gguf
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

from airllm_nb import AutoModel
from airllm_nb.config import LoadOptions
from airllm_nb.encoding.formats import get_encoding
from airllm_nb.encoding.linear import EncodedLinear
from airllm_nb.encoding.scratch import Scratch
from airllm_nb.engine.preview import Preview
from airllm_nb.errors import CheckpointError, StoreError
from airllm_nb.intake import prepare, written
from airllm_nb.model.placing import compress, merged_experts
from airllm_nb.model.skeleton import build
from airllm_nb.store import space
from airllm_nb.store.manifest import open_store
from airllm_nb.store.names import parse_expert
from airllm_nb.store.portions import WeightFile, plan_portions
from airllm_nb.store.shard import ALIGNMENT, PAGE
from airllm_nb.store.space import OVERHEAD
from airllm_nb.store.writer import Writer
from airllm_nb.stream.mapped import MappedFiles
from airllm_nb.tensors.dtypes import torch_dtype
from airllm_nb.tensors.index import Extent, TensorInfo, read_header, read_index

# Of transformers' interface for experts, transposed ones with biases, and classes whose own code reads the stacks.
INDEXED = ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "nemotron_h", "granitemoe", "kimi_k25"]
OTHERS = ["gpt_oss", "llama4_text", "jetmoe", "longcat_flash", "inkling_text"]


def options(base: Path, compression: str = "4bit", **more: Any) -> LoadOptions:
    how = {"dtype": "float32", "device": "cpu", "layer_shards_saving_path": base}
    return LoadOptions.create(compression=compression, **how, **more)


def resident(path: Path) -> Any:
    return dequantised_gguf(path) if path.suffix == ".gguf" else tiny_models.resident(path)


@torch.no_grad()
def decoded(folder: Path, compression: str, skeleton: Any, experts: bool = True) -> Any:
    """transformers' model, whose matrices were encoded and decoded one by one."""
    native, codec = resident(folder), get_encoding(compression)
    names = [f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, EncodedLinear)]
    found = merged_experts(native)
    for name in names + (found if experts else []):
        parameter = native.get_parameter(name)
        for matrix in parameter if parameter.ndim == 3 else [parameter]:
            codec.unpack(codec.encode(matrix.contiguous()), values := torch.empty(matrix.shape))
            assert not torch.equal(values, matrix)
            matrix.copy_(values)
    if any(hasattr(module, "is_transposed") for module in native.modules()):
        native.set_experts_implementation("eager" if experts else "grouped_mm")
    return native


@pytest.mark.parametrize("compression", ["4bit", "8bit"])
@pytest.mark.parametrize("model_type", INDEXED + OTHERS)
def test_streamed_equals_resident(model_type: str, compression: str, tiny: Any, tmp_path: Path) -> None:
    folder = tiny(model_type)
    with tiny_models.streamed(folder, compression=compression, layer_shards_saving_path=tmp_path) as model:
        skeleton = model._prepared.skeleton
        assert merged_experts(tiny_models.resident(folder))
        tokens, logits = tiny_models.run(model)
        expected, resident = tiny_models.run(decoded(folder, compression, skeleton))
    assert torch.equal(tokens, expected)
    assert torch.equal(logits, resident)


@pytest.mark.parametrize("compression", ["4bit", "8bit"])
def test_of_a_gguf_file_they_are_compressed_too(compression: str, tmp_path: Path, one_thread: None) -> None:
    path = tiny_qwen2moe_gguf(tmp_path / "tiny.gguf")
    ids = torch.tensor([[5, 9, 3, 40, 41, 7]])
    with AutoModel.from_pretrained(path, compression=compression, dtype="float32", device="cpu",
                                   layer_shards_saving_path=tmp_path) as model:  # fmt: skip
        assert_in_one_piece(model.folder)
        native = decoded(path, compression, model._prepared.skeleton)
        torch.testing.assert_close(model(ids).logits, native(ids).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(tiny_models.generated(model, ids), tiny_models.generated(native, ids))


def test_the_original_may_go(tiny: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("gpt_oss"), tmp_path / "model"))
    how = {"compression": "8bit", "dtype": "float32", "layer_shards_saving_path": tmp_path / "stores"}
    with AutoModel.from_pretrained(folder, **how) as model:
        expected = model(tiny_models.IDS).logits
    for delete in (True, False):
        with AutoModel.from_pretrained(folder, **how, delete_original=delete) as model:
            assert torch.equal(model(tiny_models.IDS).logits, expected)
        assert not list(folder.glob("*.safetensors"))


def test_routers_and_heads_stay_as_they_are(tiny: Any, tmp_path: Path) -> None:
    prepared = prepare.prepare(tiny("qwen3_moe"), options(tmp_path))
    for name in ("lm_head.weight", "model.layers.0.mlp.gate.weight", "model.embed_tokens.weight"):
        assert prepared.tensors[name].dtype == "F32"


def test_memory_for_what_takes_all_matrices_at_once(tiny: Any, tmp_path: Path) -> None:
    """Llama 4 multiplies a whole stack, which must be unpacked for it; who takes one at a time needs room for one."""
    needed = {}
    for model_type in ("llama4_text", "mixtral"):
        prepared = prepare.prepare(tiny(model_type), options(tmp_path))
        needed[model_type] = max(getattr(module, "scratch_bytes", 0) for module in prepared.skeleton.modules())
    one = 256 * 64 * 4
    assert needed == {"llama4_text": 5 * one, "mixtral": one}


# ---- where they lie --------------------------------------------------------------------------------------------------


def experts_of(folder: Path) -> dict[tuple[str, int], list[TensorInfo]]:
    """The tensors of each expert of a store, in the order in which they lie."""
    found: dict[tuple[str, int], list[TensorInfo]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, info in sorted(read_header(path).items(), key=lambda item: item[1].extents[0].offset):
            if said := parse_expert(name):
                found.setdefault(said[:2], []).append(info)
    return found


def assert_in_one_piece(folder: Path) -> None:
    experts = experts_of(folder)
    assert experts
    for tensors in experts.values():
        assert len({info.extents[0].path for info in tensors}) == 1
        begin, last = tensors[0].extents[0].offset, tensors[-1].extents[0]
        assert begin % PAGE == 0
        held = sum(-(-info.nbytes // ALIGNMENT) * ALIGNMENT for info in tensors)
        assert last.offset + last.nbytes - begin <= held


@pytest.mark.parametrize("compression", ["4bit", "8bit"])
def test_one_expert_lies_in_one_piece(compression: str, tiny: Any, tmp_path: Path) -> None:
    """Its biases too; and what is there is what the codec makes of each matrix alone."""
    folder = tiny("gpt_oss")
    prepared, codec = prepare.prepare(folder, options(tmp_path, compression)), get_encoding(compression)
    assert_in_one_piece(prepared.folder)
    native = tiny_models.resident(folder)
    parts = len(codec.parts((64, 256), "F32"))
    assert {len(tensors) for tensors in experts_of(prepared.folder).values()} == {2 * (parts + 1)}
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["format"] == 2
    for name in merged_experts(native):
        path, _, attribute = name.rpartition(".")
        for part in codec.parts((64, 256), "F32"):
            info = prepared.tensors[f"{path}.{attribute}__{part.attribute}"]
            assert len(info.extents) == 4 and info.shape[0] == 4
        with safe_open(info.extents[0].path, "pt") as file:
            for number, matrix in enumerate(native.get_parameter(name)):
                for part, expected in codec.encode(matrix.detach()).items():
                    assert torch.equal(file.get_tensor(f"{path}[{number}].{attribute}.{part}"), expected)
                bias = file.get_tensor(f"{path}[{number}].{attribute}_bias")
                assert torch.equal(bias, native.get_parameter(f"{name}_bias")[number])


def test_other_models_are_written_as_before(tiny_llama: Any, tmp_path: Path) -> None:
    prepared = prepare.prepare(tiny_llama(), options(tmp_path, "8bit"))
    assert json.loads((prepared.folder / "manifest.json").read_text())["format"] == 1


@pytest.mark.parametrize("lack", ["gate_up_proj.absmax", "down_proj.weight"])
def test_an_expert_that_is_lacking_is_named(lack: str, tiny: Any, tmp_path: Path) -> None:
    folder = prepare.prepare(tiny("mixtral"), options(tmp_path)).folder
    shard, manifest = folder / "layer-00001.safetensors", json.loads((folder / "manifest.json").read_text())
    data = shard.read_bytes()
    name = f"experts[2].{lack}".encode()
    assert data.count(name) == 1
    shard.write_bytes(data.replace(name, name.replace(b"[2]", b"[9]")))
    assert manifest["shards"][1]["file"] == shard.name
    with pytest.raises(StoreError, match="not there for each expert alike"):
        AutoModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("experts", [3, 5])
def test_another_number_of_experts_is_refused_before_anything_is_written(
    experts: int, tiny: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("gpt_oss"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": experts}))
    with pytest.raises(CheckpointError, match="do not belong together"):
        prepare.prepare(folder, options(tmp_path / "stores"))
    assert not list(tmp_path.glob("stores/*/*.safetensors"))


def test_what_two_files_hold_of_an_expert_is_written_together(tiny: Any, tmp_path: Path) -> None:
    """Of the first file, each gone before the next is here, is copied what the second completes."""
    folder = tmp_path / "model"
    native = tiny_models.resident(tiny("mixtral"))
    state = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    native.config.save_pretrained(folder)
    for number in (0, 1):
        some = {name: tensor for name, tensor in state.items() if ("down_proj" in name) == bool(number)}
        save_file(some, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
    whole = prepare.prepare(folder, options(tmp_path / "whole")).folder
    expected = open_store(whole)
    assert expected is not None
    skeleton = build(AutoConfig.from_pretrained(folder), torch.float32, torch.device("cpu"))
    jobs_of = functools.partial(written._jobs, skeleton=skeleton, codec=get_encoding("4bit"), dtype=torch.float32)
    tensors = written._experts_apart(read_index(folder), skeleton)
    (tmp_path / "here").mkdir()
    files = [WeightFile(path, tmp_path / "here" / path.name, path.stat().st_size, True)
             for path in sorted(folder.glob("*.safetensors"))]  # fmt: skip
    store = tmp_path / "store"
    portions = plan_portions(tensors, files, store, jobs_of)
    assert [len(portion.carried) for portion in portions] == [1, 0]
    assert sum(job.nbytes for job in portions[0].carried) < 1.1 * sum(
        tensor.nbytes for name, tensor in state.items() if "gate_up_proj" in name
    )
    made = Writer(store, expected.meta, bring=lambda file: shutil.copy(file.named, file.path),
                  remove=lambda file: file.path.unlink()).write(portions)  # fmt: skip
    assert_in_one_piece(store)
    assert not list(tmp_path.glob("here/*")) and made.index.keys() == expected.index.keys()
    files_there = MappedFiles()
    for name, info in made.index.items():
        one, other = (files_there.tensor(each, torch_dtype(each)) for each in (info, expected.index[name]))
        assert torch.equal(one, other)


# ---- interrupted, and from earlier versions --------------------------------------------------------------------------


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class Stopped(Exception):
    pass


def stopped_at(share: float) -> Callable[[Any], None]:
    def progress(report: Any) -> None:
        if report.stage == "convert" and report.done >= share * report.total:
            raise Stopped

    return progress


def test_stopped_anywhere_it_goes_on(tiny: Any, tmp_path: Path) -> None:
    source, kept = tiny("mixtral"), set()
    whole = shards(prepare.prepare(source, options(tmp_path / "whole")).folder)
    for number in range(12):
        base = tmp_path / str(number)
        for share in (number / 13, number / 13 + 0.05):
            with contextlib.suppress(Stopped):
                prepare.prepare(source, options(base), progress=stopped_at(share))
            kept |= {len(shards(folder)) for folder in base.glob("*--4bit--*")}
        assert shards(prepare.prepare(source, options(base)).folder) == whole
    assert len(kept) > 3, "it is stopped in many places"


@pytest.fixture
def as_earlier(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Stores are written as by versions that left experts as they are, until it is undone."""
    monkeypatch.setattr(written, "_experts_apart", lambda tensors, skeleton: dict(tensors))
    monkeypatch.setattr(written, "merged_experts", lambda skeleton: [])
    return monkeypatch


@pytest.mark.parametrize("named", ["model", "store"])
def test_a_store_of_an_earlier_version_is_what_it_was(
    named: str, tiny: Any, tmp_path: Path, as_earlier: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny("mixtral")
    store = prepare.prepare(source, options(tmp_path)).folder
    before = shards(store)
    as_earlier.undo()
    caplog.clear()
    with AutoModel.from_pretrained(source if named == "model" else store, compression="4bit", dtype="float32",
                                   device="cpu", layer_shards_saving_path=tmp_path) as model:  # fmt: skip
        tokens, logits = tiny_models.run(model)
        expected, resident = tiny_models.run(decoded(source, "4bit", model._prepared.skeleton, experts=False))
    assert torch.equal(tokens, expected) and torch.equal(logits, resident)
    assert shards(store) == before
    assert "earlier version" in caplog.text and str(store) in caplog.text


@pytest.mark.parametrize("how", ["unfinished", "damaged", "removed"])
def test_what_of_it_must_be_written_again_is_written_anew(
    how: str, tiny: Any, tmp_path: Path, as_earlier: pytest.MonkeyPatch
) -> None:
    source = tiny("mixtral")
    if how == "unfinished":
        with pytest.raises(Stopped):
            prepare.prepare(source, options(tmp_path), progress=stopped_at(0.8))
        assert list(tmp_path.glob("*/layer-*.safetensors"))
    else:
        store = prepare.prepare(source, options(tmp_path)).folder
        shutil.rmtree(store) if how == "removed" else (store / "layer-00002.safetensors").unlink()
    as_earlier.undo()
    store = prepare.prepare(source, options(tmp_path)).folder
    assert shards(store) == shards(prepare.prepare(source, options(tmp_path / "fresh")).folder)
    opened = open_store(store)
    assert opened is not None
    opened.verify()


# ---- bytes -----------------------------------------------------------------------------------------------------------

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
    "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(("compression", "bits"), [("4bit", 4.5), ("8bit", 9)])
def test_a_30b_mixture_is_planned_at_its_bits(compression: str, bits: float, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    codec, device = get_encoding(compression), torch.device("cpu")
    skeleton = build(AutoConfig.from_pretrained(tmp_path), torch.bfloat16, device)
    plain = prepare.sizes_only(skeleton)
    jobs = written.store_jobs(plain, skeleton, codec, torch.bfloat16)
    compress(skeleton, codec, torch.bfloat16, Scratch())
    planned, store = (sum(each.nbytes for each in some) for some in (prepare.sizes_only(skeleton).values(), jobs))
    values = sum(info.nbytes for info in plain.values()) // 2
    tables = 2 * 151936 * 2048
    assert values == 30_532_122_624
    assert math.isclose(planned, tables * 2 + (values - tables) * bits / 8, rel_tol=0.002)
    assert planned < store < planned * 1.001
    assert store / (2 * values) < bits / 16 + 0.02


def test_the_plan_and_the_refusal_know_the_bytes(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny("mixtral")
    planned = Preview(source, options(tmp_path, ram_budget="1GiB")).plan().fit
    whole = prepare.prepare(source, options(tmp_path / "whole"))
    written_bytes = sum(map(len, shards(whole.folder).values()))
    held = sum(info.nbytes for info in whole.tensors.values())
    # Beside the bytes of the weights: headers, and what fills pages before experts. Of this size that is much.
    assert held <= planned.spaces[-1].nbytes < held + PAGE < written_bytes < held + 5 * 3 * PAGE + 16 * PAGE
    need = written_bytes + OVERHEAD
    monkeypatch.setattr(space, "free_disk", lambda _: need - 1)
    with pytest.raises(StoreError, match="needs"):
        prepare.prepare(source, options(tmp_path / "small"))
    assert not list(tmp_path.glob("small/*/*.safetensors"))
    monkeypatch.setattr(space, "free_disk", lambda _: need)
    prepare.prepare(source, options(tmp_path / "small"))


_MEMORY = """
import sys, torch
from pathlib import Path
from airllm_nb import LoadOptions
from airllm_nb.encoding.formats import get_encoding
from airllm_nb.intake.prepare import prepare
torch.set_num_threads(2)
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10
tiny, large, base, codec = sys.argv[1:]
get_encoding(codec).require()
prepare(tiny, LoadOptions.create(compression=codec, device="cpu", layer_shards_saving_path=base))
rest = peak = anonymous()
def step(_):
    global peak
    peak = max(peak, anonymous())
prepare(large, LoadOptions.create(compression=codec, device="cpu", layer_shards_saving_path=base), progress=step)
print(peak - rest)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("codec", ["4bit", "8bit"])
def test_a_merged_stack_needs_little_memory(codec: str, tiny: Any, tmp_path: Path) -> None:
    """Of 200 MB in one parameter and 100 MB in the other some rows are in memory at a time."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_local_experts": 24, "vocab_size": 260}  # fmt: skip
    native = MixtralForCausalLM(MixtralConfig(**sizes)).to(torch.bfloat16)
    native.save_pretrained(tmp_path / "large", save_original_format=False)
    stack = native.model.layers[0].mlp.experts.gate_up_proj
    assert stack.nbytes == 24 * 4096 * 1024 * 2
    del native
    command = [sys.executable, "-c", _MEMORY, str(tiny("mixtral")), str(tmp_path / "large"), str(tmp_path), codec]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert grown < 96 << 20


def test_apart_is_each_row() -> None:
    chance = torch.Generator().manual_seed(0)
    for _ in range(200):
        count, width = (int(torch.randint(1, 9, (1,), generator=chance)) for _ in range(2))
        total, extents = count * width * 4, []
        while total:
            taken = int(torch.randint(1, total + 1, (1,), generator=chance))
            extents.append(Extent(Path(f"{len(extents) % 2}"), 1000 * len(extents), taken))
            total -= taken
        info = TensorInfo("a", "F32", (count, width), tuple(extents))
        for number, one in enumerate(info.apart()):
            assert one.shape == (width,) and one.extents == info.rows("a", [(number, number + 1)]).extents
