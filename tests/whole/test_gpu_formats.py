"""On a real GPU: every packed format says what its dequantised model says there, whatever streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

pytest.importorskip("gguf")  # the files of one format are written by it

import packed_gptq
from test_formats import CASES_BY_NAME
from test_gpu_families import streamed

from airllm_nb import AutoModel
from airllm_nb.encoding.kernels import launch
from airllm_nb.model import skeleton

pytestmark = pytest.mark.gpu

# What has made a format's files, where that may be missing.
LIBRARIES = {"GPTQ": "auto_gptq", "AWQ": "awq"}

# Rounding of the compute dtype, through two layers and a head.
NEAR = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


@pytest.fixture(scope="module", params=CASES_BY_NAME)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Iterator[tuple[Path, Any]]:
    """A checkpoint and its dequantised model, in float32 on the GPU."""
    case = CASES_BY_NAME[request.param]
    if case.format in LIBRARIES and not (packed_gptq.FORMATS / LIBRARIES[case.format]).is_dir():
        pytest.skip("its library is missing; run: make formats")
    if case.format == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    path = case.make(tmp_path_factory.mktemp("packed"), tiny_llama())
    # Not its own `cuda`: transformers refuses to move what was loaded in 8 bits, which is dequantised here.
    yield path, torch.nn.Module.cuda(case.reference(path))


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix or two, so that every device memory is used several times in a sweep."""
    monkeypatch.setattr(skeleton.cut_units, "__defaults__", (12_000,))


@pytest.mark.parametrize(("dtype", "has_kernels"), [*((dtype, True) for dtype in NEAR), ("bfloat16", False)])
def test_it_says_what_the_dequantised_model_says(
    made: tuple[Path, Any], dtype: str, has_kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reference = made
    if not has_kernels:  # an old GPU, or no Triton
        monkeypatch.setattr(launch, "usable", lambda device: False)
    ids = tiny_models.IDS.cuda()
    with torch.inference_mode():
        expected = reference(ids).logits
    found = []
    for budget in ("2GiB", None):
        options = {"dtype": dtype, "max_seq_len": 32, "layer_shards_saving_path": tmp_path}
        model = AutoModel.from_pretrained(path, vram_budget=budget, **options) if budget else streamed(path, **options)
        with model:
            assert model.device.type == "cuda" and bool(budget) != (model.plan.streamed_bytes > model.plan.arena_bytes)
            found.append((model(ids).logits.float(), tiny_models.generated(model, ids)))
    (resident, resident_tokens), (moved, moved_tokens) = found
    assert torch.equal(resident, moved) and torch.equal(resident_tokens, moved_tokens)
    assert ((resident - expected).abs().max() / expected.abs().max()).item() <= NEAR[dtype]
    if dtype == "float32":
        assert torch.equal(resident_tokens, tiny_models.generated(reference, ids))
