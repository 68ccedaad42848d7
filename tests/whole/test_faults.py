"""Whatever a disk fails at: the right tokens or one line of ours, no file of the user lost, and then all is well."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Faults

from airllm_nb import AutoModel
from airllm_nb.config import LoadOptions
from airllm_nb.engine import facade, machine
from airllm_nb.engine.kept import choose, kept_stores
from airllm_nb.errors import AirLLMError
from airllm_nb.store.names import JOURNAL
from airllm_nb.stream.probe import FALLBACK

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(2, 8)[None]
# What may happen to an operation is tried in turn, and of equal ones on one file the first and the last fail; every
# operation does, in each way that it can, with AIRLLM_NB_FAULTS=4.
TURNS = int(os.environ.get("AIRLLM_NB_FAULTS", "0"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_compute_bandwidth", lambda *_: FALLBACK)  # most of the time of a tiny model
    return tmp_path


@pytest.fixture
def model(place: Path, tiny_llama: Callable[..., Path]) -> Path:
    return Path(shutil.copytree(tiny_llama(shards=2, num_hidden_layers=2), place / "model"))


def generated(model: Path, **options: Any) -> Callable[[], Any]:
    def run() -> Any:
        with AutoModel.from_pretrained(model, device="cpu", **options) as opened:
            return opened.generate(IDS, max_new_tokens=3, do_sample=False).tolist()

    return run


def told(model: Path) -> Callable[[], Any]:
    def run() -> Any:
        with AutoModel.from_pretrained(model, device="cpu") as opened:
            return opened.answer("hello", max_new_tokens=3).token_ids

    return run


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def open_below(folder: Path) -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(str(descriptor.readlink()))
    return [name for name in found if name.startswith(str(folder))]


def _chosen(operations: list[str]) -> list[int]:
    if TURNS:
        return [*range(len(operations))]
    last = {operation: number for number, operation in enumerate(operations)}
    first = {operation: number for number, operation in reversed([*enumerate(operations)])}
    return sorted({*first.values(), *last.values()})


def try_all(
    run: Callable[[], Any], place: Path, model: Path, fresh: Callable[[], None] | None = None,
    look: Callable[[Any], Any] = lambda answer: answer,
) -> int:  # fmt: skip
    """Let the operations of ``run`` fail, one a time; returns how many there are. ``look`` says what it gave."""
    anew = fresh or (lambda: None)
    anew()
    expected, before = look(run()), contents(model)
    anew()
    with Faults([place]).on() as counted:
        run()
    wrong: list[str] = []
    for number, turn in itertools.product(_chosen(counted.operations), range(TURNS or 1)):
        anew()
        faults = Faults([place], number, turn=number + turn)
        try:
            with faults.on():
                answer = run()
            if (found := look(answer)) != expected:
                wrong.append(f"{number} {faults.done}: {found} instead of {expected}")
        except AirLLMError as error:
            if "\n" in str(error):
                wrong.append(f"{number} {faults.done}: {error} is not one line")
        except BaseException as error:  # what must not happen
            wrong.append(f"{number} {faults.done}: {error!r}")
        if contents(model) != before:
            wrong.append(f"{number} {faults.done}: files of the user were changed")
        if left := [*open_below(place), *(t.name for t in threading.enumerate() if "airllm" in t.name)]:
            wrong.append(f"{number} {faults.done}: left {left}")
        if fresh is None and number % 6:
            continue  # nothing is written: each run is like the first
        try:
            if (again := look(run())) != expected:
                wrong.append(f"{number} {faults.done}: afterwards {again}")
        except Exception as error:
            wrong.append(f"{number} {faults.done}: afterwards {error!r}")
    assert not wrong, "\n".join(wrong)
    return len(counted.operations)


MODES: dict[str, dict[str, Any]] = {
    "mapped": {},
    "rehearsed": {"vram_budget": "2MiB"},
}


@pytest.mark.parametrize("mode", MODES)
def test_loading_and_generating(place: Path, model: Path, mode: str) -> None:
    assert try_all(generated(model, **MODES[mode]), place, model) > 50


def test_the_same_model_goes_on_once_the_disk_does(place: Path, model: Path) -> None:
    with AutoModel.from_pretrained(model, device="cpu", ram_budget="200KiB") as opened:

        def run() -> Any:
            return opened.generate(IDS, max_new_tokens=2, do_sample=False).tolist()

        expected = run()
        with Faults([place]).on() as counted:
            run()
        assert any("preadv" in operation for operation in counted.operations)
        for number in range(len(counted.operations)):
            with suppress(AirLLMError), Faults([place], number, turn=number).on():
                assert run() == expected
            with suppress(AirLLMError):  # what was read ahead for this one failed, too
                assert run() == expected
            assert run() == expected


def test_answering(place: Path, model: Path) -> None:
    assert try_all(told(model), place, model) > 50


def test_a_plan(place: Path, model: Path) -> None:
    def run() -> Any:
        return facade.plan_model(model, LoadOptions.create(device="cpu")).tiers

    assert try_all(run, place, model) > 20


@pytest.mark.parametrize("compression", ["8bit"])
def test_converting(place: Path, model: Path, compression: str) -> None:
    def run() -> Any:
        return facade.convert_model(model, LoadOptions.create(compression=compression, device="cpu"))

    def look(folder: Path) -> dict[str, str]:
        return {name: digest for name, digest in contents(folder).items() if name != JOURNAL}

    assert try_all(run, place, model, lambda: shutil.rmtree(place / "cache", ignore_errors=True), look) > 100


def test_loading_a_store(place: Path, model: Path) -> None:
    run = generated(model, compression="4bit")
    run()
    assert try_all(run, place, model) > 50


def test_an_adapter(place: Path, model: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    made = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(r=2, init_lora_weights=False)
    )
    made.save_pretrained(place / "adapter")
    assert try_all(generated(model, adapter=place / "adapter"), place, model) > 50


def test_listing_and_removing_stores(place: Path, model: Path) -> None:
    generated(model, compression="4bit")()
    shutil.copytree(place / "cache", place / "saved")

    def fresh() -> None:
        shutil.rmtree(place / "cache", ignore_errors=True)
        shutil.copytree(place / "saved", place / "cache")

    def run() -> Any:
        from airllm_nb.store.listing import remove_store

        for store in choose(kept_stores(), everything=True):
            remove_store(store.folder)
        return [store.name for store in kept_stores().stores]

    assert try_all(run, place, model, fresh) > 20
