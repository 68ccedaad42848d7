"""Bad input: one line that names the thing, its value and the remedy, of a class that a program can catch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from airllm_nb.config import LoadOptions, parse_bytes
from airllm_nb.engine.facade import open_model, plan_model
from airllm_nb.errors import (
    AirLLMError,
    BudgetError,
    CheckpointError,
    OptionError,
    PromptError,
    SourceError,
    UnsupportedModelError,
)


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama(shards=2), tmp_path / "tiny"))


def fails(kind: type[AirLLMError], words: list[str], attempt: Callable[[], Any]) -> str:
    with pytest.raises(AirLLMError) as caught:
        attempt()
    text = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in text
    assert 20 < len(text) < 500
    for word in words:
        assert word in text, text
    return text


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"compresion": "4bit"}, ["'compresion'", "did you mean 'compression'"]),
    ({"vram": "4GiB"}, ["'vram'", "did you mean 'vram_budget'"]),
    ({"max_length": 5}, ["'max_length'", "did you mean 'max_seq_len'"]),
    ({"zzz": 1}, ["'zzz'", "known options"]),
    ({"compression": "3bit"}, ["compression='3bit'", "'4bit'"]),
    ({"compression": True}, ["compression=True", "'4bit'"]),
    ({"dtype": "float8"}, ["dtype='float8'", "bfloat16"]),
    ({"dtype": torch.int8}, ["dtype='int8'", "bfloat16"]),
    ({"device": "tpu"}, ["device='tpu'", "'cpu'"]),
    ({"device": "cuda:x"}, ["device='cuda:x'", "'cuda:0'"]),
    ({"max_seq_len": 0}, ["max_seq_len=0", "1 or more"]),
    ({"max_seq_len": "many"}, ["max_seq_len='many'", "whole number"]),
    ({"batch_size": -1}, ["batch_size=-1", "1 or more"]),
    ({"batch_size": 1.5}, ["batch_size=1.5", "whole number"]),
    ({"prefetching": -1}, ["prefetching=-1", "True, False"]),
    ({"prefetching": "yes"}, ["prefetching='yes'", "True, False"]),
    ({"delete_original": True}, ["delete_original=True", "compression"]),
    ({"vram_budget": "4 gigs"}, ["vram_budget='4 gigs'", "4GiB"]),
    ({"vram_budget": "-4GiB"}, ["vram_budget='-4GiB'", "size"]),
    ({"ram_budget": -5}, ["ram_budget=-5", "negative"]),
    ({"ram_budget": ""}, ["ram_budget=''", "4GiB"]),
    ({"ram_budget": True}, ["ram_budget=True", "4GiB"]),
    ({"ram_budget": float("nan")}, ["ram_budget=nan", "size"]),
    ({"ram_budget": float("inf")}, ["ram_budget=inf", "size"]),
    ({"ram_budget": [4]}, ["ram_budget=[4]", "size"]),
    ({"ram_budget": "1e9"}, ["ram_budget='1e9'", "size"]),
    ({"max_seq_len": True}, ["max_seq_len=True", "whole number"]),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_options_that_cannot_be_used(options: dict[str, Any], words: list[str]) -> None:
    fails(OptionError, words, lambda: LoadOptions.create(**options))


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("4 gb", 4 * 10**9), ("512MiB", 512 << 20), (" 1.5G ", 3 << 29), ("7", 7), (9, 9), (None, None),
     (".5KiB", 512), ("0", 0), (2.0, 2), ("1TB", 10**12), ("3B", 3)],
)  # fmt: skip
def test_sizes_that_can(text: Any, size: int | None) -> None:
    assert parse_bytes(text) == size


def test_a_gpu_that_is_not_there(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    fails(OptionError, ["device='cuda'", "device='cpu'"], lambda: open_model(folder, LoadOptions.create(device="cuda")))


# ---- sources ---------------------------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def only_config(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


SHARD = "model-00002-of-00002.safetensors"
FOREIGN = {
    "auto_map": {"AutoModelForCausalLM": "modeling_x.X"},
    "model_type": "llamax",
    "architectures": ["LlamaXForCausalLM"],
}
QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}

DAMAGE: dict[str, tuple[Callable[[Path], object], type[AirLLMError], list[str]]] = {
    "no config": (remove("config.json"), CheckpointError, ["tiny", "config.json"]),
    "config is no JSON": (write("config.json", "{"), CheckpointError, ["config.json", "download it again"]),
    "config is a list": (write("config.json", "[]"), CheckpointError, ["config.json"]),
    "config is empty": (write("config.json", "{}"), CheckpointError, ["config.json", "model_type"]),
    "unknown architecture": (config(model_type="lama", architectures=["LamaForCausalLM"]), UnsupportedModelError,
                             ["LamaForCausalLM", "llama"]),
    "foreign code": (config(**FOREIGN), UnsupportedModelError, ["LlamaXForCausalLM", "never run", "llama"]),
    "no language model": (config(model_type="vit", architectures=["ViTModel"]), UnsupportedModelError, ["ViTModel"]),
    "quantised it says": (config(**QUANTISED), CheckpointError, ["gptq", "none of them is"]),
    "config refused by its class": (config(hidden_size="wide"), CheckpointError, ["config.json"]),
    "no weights": (only_config, CheckpointError, ["tiny"]),
    "a missing shard": (remove(SHARD), CheckpointError, [SHARD, "missing", "download"]),
    "a truncated shard": (cut(SHARD, 5000), CheckpointError, [SHARD, "truncated", "download"]),
    "an empty shard": (cut(SHARD, 0), CheckpointError, [SHARD, "download"]),
    "a shard of junk": (write(SHARD, "junk" * 100), CheckpointError, [SHARD, "damaged", "download"]),
    "a Git LFS pointer": (write(SHARD, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
                          CheckpointError, [SHARD, "git lfs pull"]),
    "a damaged index": (write("model.safetensors.index.json", "{"), CheckpointError, ["index.json"]),
    "another model's config": (config(num_hidden_layers=9), CheckpointError, ["lacks", "more"]),
    "another width": (config(intermediate_size=96), CheckpointError, ["shape", "config.json"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "kind", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(
    folder: Path, damage: Callable[[Path], object], kind: type[AirLLMError], words: list[str]
) -> None:
    damage(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    fails(kind, words, lambda: open_model(folder))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before, "nothing is written or lost"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for attempt in (open_model, plan_model):
        fails(SourceError, [str(tmp_path / "nothing")], lambda attempt=attempt: attempt(tmp_path / "nothing"))


def test_an_empty_folder(tmp_path: Path) -> None:
    fails(CheckpointError, [str(tmp_path)], lambda: open_model(tmp_path))


def test_the_folder_above_is_pointed_out(folder: Path) -> None:
    fails(CheckpointError, [str(folder), "name that folder"], lambda: open_model(folder.parent))


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_a_file_in_the_place_of_a_folder(folder: Path, name: str) -> None:
    fails(SourceError, [name, str(folder)], lambda: open_model(folder / name))


@pytest.mark.parametrize("name", ["https://huggingface.co/org/name", "./missing/model", "a b c", "x/y/z/w"])
def test_names_that_are_none(name: str) -> None:
    fails(SourceError, [], lambda: open_model(name))


def test_offline_without_cache_names_the_way_out() -> None:
    text = fails(
        SourceError, ["org/not-here"], lambda: open_model("org/not-here", LoadOptions.create(local_files_only=True))
    )
    assert "offline" in text or "cache" in text or "connection" in text


# ---- budgets and prompts ---------------------------------------------------------------------------------------------


def test_a_ram_budget_that_is_too_small(folder: Path) -> None:
    text = fails(BudgetError, ["ram_budget=1.0 KiB", "smallest that works is"],
                 lambda: open_model(folder, LoadOptions.create(ram_budget="1KiB")))  # fmt: skip
    smallest = text.split("smallest that works is ")[1].split(",")[0]
    with open_model(folder, LoadOptions.create(ram_budget=smallest)) as model:
        assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=2).shape[-1] <= 4


def test_a_vram_budget_that_is_too_small(folder: Path) -> None:
    text = fails(BudgetError, ["vram_budget=1.0 MiB", "smallest that works is", "max_seq_len"],
                 lambda: open_model(folder, LoadOptions.create(vram_budget="1MiB")))  # fmt: skip
    smallest = text.split("smallest that works is ")[1].split(" (")[0]
    with open_model(folder, LoadOptions.create(vram_budget=smallest)) as model:
        assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=2).shape[-1] <= 4


def test_a_generation_that_outgrows_its_budget_leaves_the_model_usable(folder: Path) -> None:
    with open_model(folder, LoadOptions.create(max_seq_len=64)) as model:
        fixed, largest = model.plan.needs.total, max(unit.nbytes for unit in model.plan.units)
    options = LoadOptions.create(max_seq_len=64, vram_budget=fixed + largest + 8192)
    ids = torch.tensor([[1, 5, 9]])
    with open_model(folder, options) as model:
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
        fails(
            BudgetError,
            ["vram_budget", "smallest that works"],
            lambda: model.generate(ids, max_new_tokens=5, num_beams=50),
        )
        assert not model.busy
        assert model.generate(ids, max_new_tokens=5, do_sample=False).equal(expected)


PROMPTS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "empty text": (lambda model: model.answer(""), ["prompt is empty"]),
    "blanks": (lambda model: model.answer("  \n\t "), ["prompt is empty"]),
    "no messages": (lambda model: model.answer([]), ["prompt is empty"]),
    "no tokens": (lambda model: model.generate(torch.empty(1, 0, dtype=torch.long)), ["prompt is empty"]),
    "too long": (lambda model: model.answer("x" * 600), ["600", "context", "512", "shorten"]),
    "too many tokens": (lambda model: model.generate(torch.ones(1, 512, dtype=torch.long)), ["512", "shorten"]),
}


@pytest.mark.parametrize(("attempt", "words"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_that_cannot_be_answered(
    tiny_llama: Callable[..., Path], attempt: Callable[[Any], Any], words: list[str]
) -> None:
    with open_model(tiny_llama(shards=2)) as model:
        fails(PromptError, words, lambda: attempt(model))
        assert model.answer("ok", max_new_tokens=2).text is not None


def test_a_shard_that_is_cut_while_the_model_is_open(folder: Path) -> None:
    ids = torch.tensor([[1, 5, 9]])
    with open_model(folder, LoadOptions.create(ram_budget=600_000)) as model:
        model.plan.tiers.index("disk")
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
        raw, times = (folder / SHARD).read_bytes(), (folder / SHARD).stat()
        os.truncate(folder / SHARD, 3000)
        fails(CheckpointError, [SHARD, "changed while"], lambda: model.generate(ids, max_new_tokens=5))
        (folder / SHARD).write_bytes(raw)
        os.utime(folder / SHARD, ns=(times.st_atime_ns, times.st_mtime_ns))
        for _ in range(2):
            try:
                assert model.generate(ids, max_new_tokens=5, do_sample=False).equal(expected)
                break
            except CheckpointError:  # what was read ahead while the file was short
                pass
        assert model.generate(ids, max_new_tokens=5, do_sample=False).equal(expected)


def test_a_config_cannot_name_an_implementation(tiny_llama, tmp_path):
    """It may be code on the Hub."""
    import json
    import shutil

    from airllm_nb import AutoModel

    folder = shutil.copytree(tiny_llama(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    named = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel", "experts_implementation": "x"}
    (folder / "config.json").write_text(json.dumps(config | named))
    with AutoModel.from_pretrained(folder) as model:
        assert "evil" not in str(model.config) and "evil" not in str(model.config._attn_implementation)


@pytest.mark.parametrize(
    "quantised",
    [{"compression_config": {"bits": 4}}, {"quantization_config": {"bits": 4}},
     {"text_config": {"quantization_config": {"quant_method": "hqq"}}}],
    ids=str,
)  # fmt: skip
def test_what_is_quantised_otherwise_is_refused_wherever_it_says_so(quantised):
    from airllm_nb.errors import UnsupportedModelError
    from airllm_nb.model.architecture import check_supported

    with pytest.raises(UnsupportedModelError, match=r"is quantised with .*these can: bitsandbytes, fp8"):
        check_supported({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **quantised})
