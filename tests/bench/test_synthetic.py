"""Checkpoints with random weights: what the real ones look like, whole or not at all."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from airllm_nb.bench import synthetic, synthetic_model
from airllm_nb.bench.shapes import SHAPES, shape_config, weights_by_file
from airllm_nb.bench.synthetic import is_finished, remove, write
from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import open_model
from airllm_nb.errors import OptionError, StoreError
from airllm_nb.store.names import SYNTHETIC_MARKER
from airllm_nb.tensors.index import read_index
from airllm_nb.trace import Progress

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block shorter than a matrix, as for the large shapes; a prime too."""
    monkeypatch.setattr(synthetic, "BLOCK", 65_521)


def native(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.parametrize("shape", ["small", "small-qwen"])
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


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_names_and_sizes_of_its_class(shape: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape_config(shape, 2))
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    assert {name: size for group in weights_by_file(shape_config(shape, 2)) for name, size in group.items()} == expected
    rope = SHAPES[shape]["rope_theta"]
    assert config.rope_parameters["rope_theta"] == rope and type(made).__name__ == SHAPES[shape]["architectures"][0]


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
    plain = sum(
        2 * torch.Size(size).numel() for g in weights_by_file(shape_config("small-qwen", 2)) for size in g.values()
    )
    assert nbytes < plain


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
