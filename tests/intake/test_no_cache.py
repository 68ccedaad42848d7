"""A model that needs no store loads without a cache: no home, a read-only disk, a folder of somebody else."""

from __future__ import annotations

import errno
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from airllm_nb import AutoModel
from airllm_nb.config import LoadOptions
from airllm_nb.engine import facade
from airllm_nb.errors import AirLLMError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(2, 8)[None]


def no_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    for name in ("HOME", "AIRLLM_NB_CACHE", "XDG_CACHE_HOME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", nobody)


def read_only(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("AIRLLM_NB_CACHE", "/proc/airllm_nb")  # nobody makes a folder there


def below_a_file(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    patch.setenv("AIRLLM_NB_CACHE", str(folder / "file" / "cache"))


def of_another_user(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Rights do not hold root off: the system's answer is given here."""
    (folder / "cache").mkdir()
    patch.setenv("AIRLLM_NB_CACHE", str(folder / "cache"))
    for name in ("open", "stat", "listdir", "scandir", "mkdir", "replace"):
        patch.setattr(os, name, _refusing(getattr(os, name), str(folder / "cache" / "")))


def _refusing(real: Any, below: str) -> Any:
    def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
        if not isinstance(path, int) and str(path).startswith(below):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    return call


CACHES = {case.__name__: case for case in (no_home, read_only, below_a_file, of_another_user)}


@pytest.mark.parametrize("case", CACHES)
def test_what_needs_no_store_runs(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    model = tiny_llama()
    CACHES[case](monkeypatch, tmp_path)
    assert facade.plan_model(model, LoadOptions.create(device="cpu")).tiers
    for options in ({}, {"vram_budget": "2MiB"}):
        with AutoModel.from_pretrained(model, device="cpu", **options) as opened:
            assert len(opened.answer("hello", max_new_tokens=2, min_new_tokens=2).token_ids) == 2
            assert opened.generate(IDS, max_new_tokens=2).shape[-1] >= 7


@pytest.mark.parametrize("case", CACHES)
def test_what_needs_one_is_told_where_it_may_go(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    model = tiny_llama()
    CACHES[case](monkeypatch, tmp_path)
    with pytest.raises(AirLLMError) as caught:
        AutoModel.from_pretrained(model, device="cpu", compression="8bit")
    remedies = ("AIRLLM_NB_CACHE", "layer_shards_saving_path", "chmod")
    assert any(remedy in str(caught.value) for remedy in remedies), str(caught.value)
    assert "\n" not in str(caught.value)
    with AutoModel.from_pretrained(
        model, device="cpu", compression="8bit", layer_shards_saving_path=tmp_path / "stores"
    ) as opened:
        assert opened.generate(IDS, max_new_tokens=2).shape[-1] >= 7
