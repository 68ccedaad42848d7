"""Some thousands of damages to everything that is read, the same ones each time; ``make fuzz`` does more, for long."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import fuzz
import fuzz_models
import pytest
import transformers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    ours, theirs = logging.getLogger("airllm_nb"), transformers.logging
    before, said, has_bar = ours.level, theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    fuzz_models.quiet()
    yield fuzz.made(tmp_path_factory.mktemp("bases"))
    ours.setLevel(before)  # other tests of this process look at what is logged
    theirs.set_verbosity(said)
    if has_bar:
        theirs.enable_progress_bar()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_what_reads_files(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    count = 100 if name == "pickle" else 600  # torch takes its time
    counts = fuzz.run(name, range(count), bases, tmp_path)
    assert min(counts.values()) > count // 50, "too harmless, or too wild, to find anything"


@pytest.mark.parametrize("name", fuzz.MODELS)
def test_what_loads_models(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    counts = fuzz.run(name, range(12), bases, tmp_path)
    assert sum(counts.values()) == 12


def test_a_finding_names_what_gives_it_again(bases: dict[str, Path], tmp_path: Path) -> None:
    def wrong(folder: Path, file: Path) -> None:
        raise KeyError("x")

    fuzz.TARGETS["wrong"] = fuzz.READERS["index"]._replace(holds=wrong)
    try:
        with pytest.raises(fuzz.Finding, match="wrong 7: KeyError"):
            fuzz.run("wrong", range(7, 9), bases, tmp_path)
    finally:
        del fuzz.TARGETS["wrong"]
