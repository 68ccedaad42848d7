"""Weight files that are replaced or overwritten while a model computes on them: said when the run ends, at latest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import tiny_llama_gguf
from safetensors.torch import load_file
from transformers import LogitsProcessor, LogitsProcessorList

from airllm_nb import AutoModel
from airllm_nb.errors import CheckpointError
from airllm_nb.store.manifest import StoreMeta
from airllm_nb.store.shard import ShardJob, plain
from airllm_nb.store.writer import write_store
from airllm_nb.tensors import files, pages

IDS = torch.arange(2, 10)[None]
MODES: dict[str, dict[str, Any]] = {
    "mapped": {},
    "streamed": {"ram_budget": "200KiB"},
    "rehearsed": {"vram_budget": "2MiB"},
}


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-4096, os.SEEK_END)
        opened.write(bytes(4096))


def replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(bytes(file.stat().st_size + 4096))
    other.replace(file)


def lengthen(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"x")


def rewrite(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


CHANGES = {change.__name__: change for change in (overwrite, replace, lengthen, rewrite)}


class During(LogitsProcessor):
    """Does something once, in the middle of a generation."""

    def __init__(self, act: Callable[[], None]):
        self.act: Callable[[], None] | None = act

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.act is not None:
            act, self.act = self.act, None
            act()
        return scores


@pytest.fixture
def model(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama(eos_token_id=None), tmp_path / "model"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_a_run_is_said_when_it_ends(model: Path, mode: str, change: str) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    with AutoModel.from_pretrained(model, device="cpu", **MODES[mode]) as opened:
        expected = opened.generate(IDS, max_new_tokens=3)
        during = LogitsProcessorList([During(lambda: CHANGES[change](file))])
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"model\.safetensors .*(load the model|[Dd]ownload it) again"):
                opened.generate(IDS, max_new_tokens=3, logits_processor=during)
    file.write_bytes(whole)
    with AutoModel.from_pretrained(model, device="cpu", **MODES[mode]) as opened:
        assert torch.equal(opened.generate(IDS, max_new_tokens=3), expected)


def test_a_direct_forward_says_it_too(model: Path) -> None:
    with AutoModel.from_pretrained(model, device="cpu") as opened:
        hook = opened.native.model.register_forward_pre_hook(lambda *_: overwrite(model / "model.safetensors"))
        with pytest.raises(CheckpointError, match="was changed while the model was open"):
            opened(IDS)
        hook.remove()


def test_what_was_made_of_an_answer_is_kept_and_the_error_is_raised(model: Path) -> None:
    with AutoModel.from_pretrained(model, device="cpu") as opened:
        generation = opened.stream("hello", max_new_tokens=5)
        with pytest.raises(CheckpointError, match="was changed"), generation:
            for number, _ in enumerate(generation):
                if number == 0:
                    lengthen(model / "model.safetensors")
        assert generation.result is not None and len(generation.result.token_ids) >= 1


def test_a_run_that_is_stopped_says_it_too(model: Path) -> None:
    with AutoModel.from_pretrained(model, device="cpu") as opened:
        generation = opened.stream("hello", max_new_tokens=400)
        next(iter(generation))
        lengthen(model / "model.safetensors")
        opened.stop()
        with pytest.raises(CheckpointError, match="was changed"), generation:
            for _ in generation:
                pass


def test_another_error_is_not_masked(model: Path) -> None:
    def fail() -> None:
        lengthen(model / "model.safetensors")
        raise ZeroDivisionError

    with AutoModel.from_pretrained(model, device="cpu") as opened, pytest.raises(ZeroDivisionError):
        opened.generate(IDS, max_new_tokens=3, logits_processor=LogitsProcessorList([During(fail)]))


def test_a_file_that_is_deleted_keeps_its_pages(model: Path) -> None:
    with AutoModel.from_pretrained(model, device="cpu") as opened:
        expected = opened.generate(IDS, max_new_tokens=3)
        during = LogitsProcessorList([During((model / "model.safetensors").unlink)])
        assert torch.equal(opened.generate(IDS, max_new_tokens=3, logits_processor=during), expected)


# ---- while a store is written ----------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin", "gguf"])
@pytest.mark.parametrize("change", [overwrite, _truncate], ids=["overwritten", "cut"])
def test_what_a_conversion_read_of_a_changed_file_is_not_kept(
    model: Path, tmp_path: Path, kind: str, change: Callable[[Path], None]
) -> None:
    file = model / "model.safetensors"
    if "bin" in kind:
        tensors = load_file(file)
        file.unlink()
        file = model / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "bin")
    elif kind == "gguf":
        file = model = tiny_llama_gguf(tmp_path / "tiny.gguf")
    whole, stamp = file.read_bytes(), file.stat()
    options: dict[str, Any] = {"device": "cpu", "layer_shards_saving_path": tmp_path / "stores"}
    if kind != "old bin":
        options["compression"] = "8bit"

    def at_first(progress: Any) -> None:
        nonlocal changed
        if not changed and progress.stage == "convert":
            changed = True
            change(file)

    changed = False
    with pytest.raises(CheckpointError, match=file.name):
        AutoModel.from_pretrained(model, progress=at_first, **options)
    assert changed
    file.write_bytes(whole)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as if nothing had been: the same store is gone on with
    with AutoModel.from_pretrained(model, **options) as again:
        found = again(IDS).logits
    options["layer_shards_saving_path"] = tmp_path / "others"
    with AutoModel.from_pretrained(model, **options) as fresh:
        assert torch.equal(fresh(IDS).logits, found)


@pytest.mark.parametrize("pages_lost", [False, True])
def test_sources_are_looked_at_once_a_shard_and_their_pages_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages_lost: bool
) -> None:
    """A disk of a network takes its time for each look."""
    source, steps, shards = tmp_path / "source", 20, 3
    source.write_bytes(b"x")
    looks, losses = [0], [0]
    stamp = files._stamp
    unchanged = files.Unchanged([source])

    def looked(path: Path) -> Any:
        looks[0] += 1
        return stamp(path)

    def produce() -> Iterator[torch.Tensor]:
        for step in range(steps):
            losses[0] += pages_lost and step == steps // 2
            yield torch.zeros(1)

    monkeypatch.setattr(files, "_stamp", looked)
    for name in ("total", "losses"):
        monkeypatch.setattr(pages, name, lambda *_: losses[0])
    jobs = [ShardJob(f"layer-{n:05}.safetensors", (plain(f"t{n}", "F32", (steps,), produce),)) for n in range(shards)]
    told: list[Any] = []

    def write() -> None:
        write_store(tmp_path / "store", jobs, StoreMeta("none", "original", "f"), unchanged=unchanged,
                    progress=told.append)  # fmt: skip

    if pages_lost:
        with pytest.raises(CheckpointError, match="source became shorter"):
            write()
        assert len(told) < steps
        assert looks == [0]
    else:
        write()
        assert looks == [shards] and len(told) >= shards * steps


def test_a_weight_that_is_read_after_its_file_shrank_is_no_zeros(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama(), tmp_path / "model"))
    with AutoModel.from_pretrained(folder, device="cpu", ram_budget="200KiB") as model:
        weight = model.model.layers[2].mlp.up_proj.weight
        before = weight.abs().sum()
        os.truncate(folder / "model.safetensors", 8192)
        with pytest.raises(CheckpointError, match="shorter"):
            weight.abs().sum()
        assert before > 0
