"""Checkpoints with random weights: what the real ones look like, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from airllm_nb.bench import synthetic, synthetic_model
from airllm_nb.bench.shapes import SHAPES, shape_config, skeleton_of, tensors_by_file
from airllm_nb.bench.synthetic import is_finished, remove, write
from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import open_model
from airllm_nb.errors import OptionError, StoreError
from airllm_nb.progress import Progress
from airllm_nb.store.manifest import read_manifest
from airllm_nb.store.names import SYNTHETIC_MARKER
from airllm_nb.tensors.index import read_index

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block shorter than a matrix, as for the large shapes; a prime too."""
    monkeypatch.setattr(synthetic, "BLOCK", 65_521)


def native(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.parametrize("shape", ["small", "small-qwen", "small-moe"])
def test_a_checkpoint_loads_in_transformers_and_generates_the_same_here(tmp_path: Path, shape: str) -> None:
    nbytes = write(tmp_path / "made", shape, 2)
    resident = native(tmp_path / "made")
    assert resident.dtype == torch.bfloat16
    assert sum(p.numel() * 2 for p in resident.parameters()) == nbytes == read_index(tmp_path / "made").nbytes
    expected = resident.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with open_model(tmp_path / "made") as model:
        got = model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert model.tokenizer.decode(model.tokenizer("hällo you")["input_ids"]) == "hällo you"
        assert len(model.tokenizer.decode([300, 999])) > 8
    assert got.tolist() == expected.tolist()


# What is said of each by whoever published it, without DeepSeek's layer that predicts a second token.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616, "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800, "qwen2.5-32b": 32_763_876_352,
    "mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624, "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672, "deepseek-v3": 671_026_404_352,
}  # fmt: skip


@pytest.mark.parametrize("shape", PARAMETERS)
def test_a_shape_is_that_of_the_real_model(shape: str) -> None:
    assert PARAMETERS.keys() == {name for name in SHAPES if not name.startswith("small")}
    config = shape_config(shape, SHAPES[shape]["num_hidden_layers"])
    made = skeleton_of(config)
    assert sum(parameter.numel() for parameter in made.parameters()) == PARAMETERS[shape]
    assert made.config.rope_parameters["rope_theta"] == SHAPES[shape]["rope_theta"]
    assert type(made).__name__ == SHAPES[shape]["architectures"][0]


# As the publishers' index files and headers have them.
PUBLISHED = {
    "llama-2-7b": {"model.layers.1.mlp.up_proj.weight": ("BF16", (11008, 4096))},
    "qwen3-30b-a3b": {
        "model.layers.1.mlp.experts.127.up_proj.weight": ("BF16", (768, 2048)),
        "model.layers.1.mlp.experts.0.down_proj.weight": ("BF16", (2048, 768)),
        "model.layers.1.mlp.gate.weight": ("BF16", (128, 2048)),
        "model.layers.1.self_attn.q_norm.weight": ("BF16", (128,)),
    },
    "mixtral-8x7b": {
        "model.layers.1.block_sparse_moe.experts.7.w1.weight": ("BF16", (14336, 4096)),
        "model.layers.1.block_sparse_moe.experts.7.w2.weight": ("BF16", (4096, 14336)),
        "model.layers.1.block_sparse_moe.gate.weight": ("BF16", (8, 4096)),
    },
    "gpt-oss-120b": {
        "model.layers.1.mlp.experts.gate_up_proj_blocks": ("U8", (128, 5760, 90, 16)),
        "model.layers.1.mlp.experts.gate_up_proj_scales": ("U8", (128, 5760, 90)),
        "model.layers.1.mlp.experts.gate_up_proj_bias": ("BF16", (128, 5760)),
        "model.layers.1.mlp.experts.down_proj_blocks": ("U8", (128, 2880, 90, 16)),
        "model.layers.1.mlp.router.bias": ("BF16", (128,)),
        "model.layers.1.self_attn.sinks": ("BF16", (64,)),
    },
    "deepseek-v3": {
        "model.layers.1.mlp.up_proj.weight": ("F8_E4M3", (18432, 7168)),
        "model.layers.3.mlp.experts.255.down_proj.weight": ("F8_E4M3", (7168, 2048)),
        "model.layers.3.mlp.experts.255.down_proj.weight_scale_inv": ("F32", (56, 16)),
        "model.layers.3.mlp.shared_experts.up_proj.weight": ("F8_E4M3", (2048, 7168)),
        "model.layers.3.mlp.gate.weight": ("BF16", (256, 7168)),
        "model.layers.3.mlp.gate.e_score_correction_bias": ("F32", (256,)),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": ("F8_E4M3", (576, 7168)),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("F32", (5, 56)),
        "model.embed_tokens.weight": ("BF16", (129280, 7168)),
        "lm_head.weight": ("BF16", (129280, 7168)),
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", PUBLISHED)
def test_tensors_are_those_that_are_published(shape: str) -> None:
    files = tensors_by_file(shape_config(shape, 4))
    found = {name: (info.dtype, info.shape) for file in files for name, info in file.items()}
    assert found.items() >= PUBLISHED[shape].items()
    assert len(files) == 5 and all(f".layers.{number}." in name for number in range(4) for name in files[number])
    assert not any(".layers." in name for name in files[4])


TINY = {
    "gpt-oss-120b": {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 640, "eos_token_id": 2,
                     "pad_token_id": 3},
    "deepseek-v3": {"hidden_size": 160, "intermediate_size": 320, "moe_intermediate_size": 136, "n_routed_experts": 16,
                    "num_experts_per_tok": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32,
                    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
                    "vocab_size": 640},
    "mixtral-8x7b": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "vocab_size": 640},
}  # fmt: skip


def test_a_packed_mixture_is_what_a_conversion_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "plain", "small-moe", 2)
    write(tmp_path / "packed", "small-moe", 2, "4bit")
    with open_model(tmp_path / "plain", LoadOptions("4bit", layer_shards_saving_path=tmp_path / "stores")) as model:
        converted = model.folder
    made, wanted = (read_manifest(folder) for folder in (tmp_path / "packed", converted))
    assert made is not None and wanted is not None and made.index.keys() == wanted.index.keys()
    for name, info in wanted.index.items():
        found = made.index[name]
        assert (found.dtype, found.shape, found.nbytes) == (info.dtype, info.shape, info.nbytes)
        assert len(found.extents) == len(info.extents) == (16 if ".experts." in name else 1)


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("compression", [None, "4bit"])
def test_a_mixture_runs_as_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, compression: str | None
) -> None:
    monkeypatch.setitem(SHAPES, shape, SHAPES[shape] | TINY[shape])
    write(tmp_path / "made", shape, 4, compression)
    with open_model(tmp_path / "made", LoadOptions(compression=compression)) as model:
        logits = model(IDS).logits.float()
        assert torch.isfinite(logits).all() and logits.std() > 0.01
        packed = {type(module).__name__ for module in model.modules()}
        assert ("EncodedLinear" in packed) == (compression is not None or shape == "deepseek-v3")
        assert model.tokenizer.decode(model.tokenizer("hello")["input_ids"]) == "hello"
        assert len(model.tokenizer) == 640
    if shape != "deepseek-v3" and compression is None:  # transformers reads FP8 on GPUs only
        # Its grouped products round in another order.
        torch.testing.assert_close(native(tmp_path / "made")(IDS).logits.float(), logits, atol=0.01, rtol=0.02)


def test_no_two_rows_are_the_same(tmp_path: Path) -> None:
    write(tmp_path / "made", "small-qwen", 1)
    head = native(tmp_path / "made").lm_head.weight
    assert len(torch.unique(head, dim=0)) == len(head)
    assert 0.019 < float(head.detach().float().std()) < 0.021


@pytest.mark.parametrize("compression", ["4bit", "8bit"])
def test_a_packed_one_is_a_finished_store(tmp_path: Path, compression: str) -> None:
    nbytes = write(tmp_path / "made", "small-qwen", 2, compression)
    with open_model(tmp_path / "made", LoadOptions(compression=compression)) as model:
        logits = model(IDS).logits.float()
        assert model.folder == tmp_path / "made"
    assert torch.isfinite(logits).all() and logits.std() > 0.01
    files = tensors_by_file(shape_config("small-qwen", 2))
    assert nbytes < sum(2 * math.prod(info.shape) for file in files for info in file.values())


def test_what_is_there_is_used_again_and_what_is_damaged_is_written_anew(tmp_path: Path) -> None:
    folder, seen = tmp_path / "made", []
    write(folder, "small-qwen", 1)
    first = (folder / "model-00001-of-00002.safetensors").read_bytes()
    write(folder, "small-qwen", 1, progress=seen.append)
    assert seen == [] and is_finished(folder, "small-qwen", 1)
    assert not is_finished(folder, "small-qwen", 2) and not is_finished(folder, "small-qwen", 1, "4bit")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"cut")
    assert not is_finished(folder, "small-qwen", 1)
    write(folder, "small-qwen", 1, progress=seen.append)
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == first
    assert seen[-1].done == seen[-1].total and [p.done for p in seen] == sorted(p.done for p in seen)
    remove(folder)
    remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(StoreError, match="something else"):
        write(tmp_path / "thesis", "small-qwen", 1)
    write(tmp_path / "made", "small-qwen", 1)
    with pytest.raises(StoreError, match="something else"):
        write(tmp_path / "made", "small-qwen", 2)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "thesis"]


@pytest.mark.parametrize("compression", [None, "4bit"])
def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None) -> None:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path))

    def interrupt(report: Progress) -> None:
        if report.done > report.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic_model("small-qwen", 2, compression, interrupt)
    assert list((tmp_path / "synthetic").iterdir()) == []
    folder = synthetic_model("small-qwen", 2, compression)
    assert is_finished(folder, "small-qwen", 2, compression) and list((tmp_path / "synthetic").iterdir()) == [folder]


def test_what_a_kill_left_is_taken_for_nothing_and_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".made.partial" / "made"
    left.mkdir(parents=True)
    (left / "model-00001-of-00002.safetensors").write_bytes(b"cut")
    write(tmp_path / "made", "small-qwen", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    (tmp_path / "made" / SYNTHETIC_MARKER).write_text("{")
    assert not is_finished(tmp_path / "made", "small-qwen", 1)


def test_two_at_once_write_it_once(tmp_path: Path) -> None:
    go, wrote = threading.Barrier(2), []

    def work() -> None:
        go.wait()
        write(tmp_path / "made", "small-qwen", 1, progress=lambda p: wrote.append(p) if p.stage == "write" else None)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_finished(tmp_path / "made", "small-qwen", 1)
    assert sum(p.done == p.total for p in wrote) == 1


def test_a_full_disk_is_said_before_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    with pytest.raises(StoreError, match=r"needs 1\d+\.\d GiB but .* has 3\.0 MiB free"):
        write(tmp_path / "made", "llama-3-70b", 4)
    with pytest.raises(StoreError, match=r"needs \d+\.\d MiB but .* has 3\.0 MiB free"):
        write(tmp_path / "made", "small", 4, "4bit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression", [None, "8bit"])
def test_a_disk_that_fills_meanwhile_is_one_line(tmp_path: Path, compression: str | None) -> None:
    def full(_: Progress) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match=r"No space left on device.*nothing of it is left"):
        if compression:
            write(tmp_path / "made", "small-qwen", 1, compression, progress=full)
        else:
            write(tmp_path / "made", "small-qwen", 1, progress=full)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"did you mean qwen2\.5-32b"):
        write(tmp_path / "made", "qwen-32b", 1)
    with pytest.raises(OptionError, match="1 layer or more"):
        write(tmp_path / "made", "small", 0)


def test_the_header_is_what_safetensors_writes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path / "made", "small-qwen", 1)
    file = tmp_path / "made" / "model-00001-of-00002.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert length % 8 == 0 and header["__metadata__"] == {"format": "pt"} and not any("pad" in name for name in header)
    tensors = load_file(file)
    assert torch.equal(tensors["model.layers.0.input_layernorm.weight"], torch.ones(256, dtype=torch.bfloat16))
