"""The kernels that unpack on a GPU: they run or compile without one, and whatever fails, PyTorch unpacks instead."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from kernel_cases import COLUMNS, PACKINGS, ROWS, WITH_PRODUCT, by_kernel, by_product, by_pytorch, empty, parts_of
from test_ggml import Kind, every_type, random_rows, reference

from airllm_nb.encoding.base import Encoding, Plain
from airllm_nb.encoding.ggml import encoding_of
from airllm_nb.encoding.kernels import launch
from airllm_nb.encoding.mxfp4 import MXFP4

HERE = Path(__file__).parent
META = torch.device("meta")
TRITON = HERE.parents[1] / "build" / "triton"  # by `make triton`
GPTQ_4 = next(found for found in PACKINGS if found.name == "4-bit")


@pytest.mark.parametrize("script", ["kernels_interpreted", "slots_interpreted", "kernels_compiled"])
def test_without_a_gpu(script: str, tmp_path: Path) -> None:
    """In a process of its own: what imports triton once has it for all tests, and interpreted or not for good."""
    if not TRITON.is_dir() and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is missing; run: make triton (there is one for Linux)")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TRITON), os.environ.get("PYTHONPATH", "")]),
        "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": str(int(script.endswith("interpreted"))),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"{script}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert not done.returncode and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-5000:]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that nothing was tried on yet, and cannot be: what is launched there is each test's own."""
    monkeypatch.setattr(launch, "_usable", set())
    monkeypatch.setattr(launch, "_failed", Counter())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(launch, "_try", lambda device: None)
    return torch.device("cuda", 0)


def fail(*args: object) -> None:
    raise RuntimeError("the compiler was ended\nby a signal")


def test_what_fails_is_tried_once_more(
    fresh: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C goes to the compiler too: that must not make a whole session slow."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_try", fail)
        assert not launch.usable(fresh)
    assert launch.usable(fresh) and launch.usable(fresh) and len(caplog.records) == 1
    assert "the compiler was ended" in caplog.text and "by a signal" not in caplog.text


def test_what_fails_twice_is_left_alone(
    fresh: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_try", fail)
    assert not any(launch.usable(fresh) for _ in range(5)) and len(caplog.records) == 2


def test_where_nothing_is_tried(fresh: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launch.usable(torch.device("cpu")) and not launch.usable(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))  # its compiler may abort
    monkeypatch.setattr(launch, "_try", None)
    assert not launch.usable(fresh) and not launch._failed


def test_too_little_memory_is_no_fault_of_a_kernel(fresh: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(device: torch.device) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(launch, "_try", lack)
    with pytest.raises(torch.OutOfMemoryError):
        launch.usable(fresh)
    assert not launch._failed


def test_where_a_kernel_fails_pytorch_does_it_and_the_plan_counts_that(
    fresh: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, x = parts_of(GPTQ_4), torch.ones(1, ROWS)
    wanted = by_pytorch(GPTQ_4, parts, empty(ROWS, COLUMNS))
    monkeypatch.setattr(launch, "usable", lambda device: True)
    monkeypatch.setitem(launch._UNPACK, "words", fail)
    monkeypatch.setitem(launch.MULTIPLY, "words", fail)
    assert not GPTQ_4.temporary_bytes(1 << 24, META)
    for device in ("cpu", META):
        for _ in range(3):
            out = empty(ROWS, COLUMNS, device=device)
            GPTQ_4.unpack({name: part.to(device) for name, part in parts.items()}, out)
            assert out.is_meta or torch.equal(out, wanted)
            assert GPTQ_4.multiply(x.to(device), parts, (COLUMNS, ROWS), None) is None
    assert set(launch._failed.values()) == {2} and len(launch._failed) == 4
    assert GPTQ_4.temporary_bytes(1 << 24, META)


def test_a_kernel_takes_no_memory_beside_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    q4_k = encoding_of(12)
    assert q4_k is not None
    assert q4_k.temporary_bytes(1 << 24, META) and GPTQ_4.temporary_bytes(1 << 24, META)
    monkeypatch.setattr(launch, "usable", lambda device: device.type == "meta")
    assert not q4_k.temporary_bytes(1 << 24, META) and not GPTQ_4.temporary_bytes(1 << 24, META)
    assert q4_k.temporary_bytes(1 << 24, torch.device("cpu"))


def test_which_way_round_a_matrix_is_multiplied() -> None:
    """A kernel has one way; experts of gpt-oss want the other than a linear layer."""
    q4_k = encoding_of(12)
    assert q4_k is not None
    for found, transposed in ((q4_k, False), (GPTQ_4, False), (MXFP4(), True), (MXFP4(transposed=False), False)):
        assert launch.multiplies(found, transposed) and not launch.multiplies(found, not transposed)
    assert not launch.multiplies(Plain(), False)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("found", PACKINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(found: Encoding, dtype: torch.dtype) -> None:
    parts = {name: part.cuda() for name, part in parts_of(found).items()}
    wanted = by_pytorch(found, parts, empty(ROWS, COLUMNS, dtype=dtype, device="cuda"))
    for transposed in (False, True):
        out = by_kernel(found, parts, empty(ROWS, COLUMNS, transposed, dtype=dtype, device="cuda"))
        assert torch.allclose(out, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("found", WITH_PRODUCT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_on_a_gpu(found: Encoding, dtype: torch.dtype) -> None:
    parts = {name: part.cuda() for name, part in parts_of(found).items()}
    weight = by_pytorch(found, parts, empty(ROWS, COLUMNS, device="cuda"))
    weight = weight.t() if found.transposed else weight
    x = torch.randn(1, weight.shape[1], device="cuda").to(dtype)
    bias = torch.randn(len(weight), device="cuda").to(dtype)
    for beside in (bias, None):
        wanted = torch.nn.functional.linear(x.double(), weight.double(), None if beside is None else beside.double())
        out = by_product(found, parts, x, len(weight), beside)
        assert out.dtype == dtype and torch.equal(out, by_product(found, parts, x, len(weight), beside))
        assert ((out - wanted).abs().max() / wanted.abs().max()).item() <= 2 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.gpu
@every_type
def test_products_with_blocks_on_a_gpu(kind: Kind) -> None:
    found, blocks = encoding_of(int(kind)), random_rows(kind, rows=33, columns=4096)
    assert found is not None
    x = torch.randn(1, 1, 4096)
    wanted = torch.nn.functional.linear(x.double(), reference(kind, blocks).double())
    out = by_product(found, {"weight": blocks.cuda()}, x.cuda(), 33, None).cpu()
    assert ((out - wanted).abs().max() / wanted.abs().max()).item() <= 1e-5


@pytest.mark.gpu
def test_they_are_used_on_a_gpu_and_take_no_memory() -> None:
    """A matrix as large as a 70B model's; on an old GPU, or without Triton, this fails and is meant to."""
    device, q4_k = torch.device("cuda", 0), encoding_of(12)
    assert launch.usable(device) and q4_k is not None
    blocks = torch.zeros(28672, 8192 // 256 * 144, dtype=torch.uint8, device=device)
    out = torch.full((28672, 8192), torch.nan, dtype=torch.bfloat16, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    q4_k.unpack({"weight": blocks}, out)
    assert torch.cuda.max_memory_allocated() == before and not launch._failed
    assert not out.count_nonzero()


@pytest.mark.gpu
def test_a_gradient_passes() -> None:
    """Through PyTorch: no kernel passes one on."""
    parts = {name: part.cuda() for name, part in parts_of(GPTQ_4).items()}
    x = torch.ones(1, ROWS, device="cuda", requires_grad=True)
    assert GPTQ_4.multiply(x, parts, (COLUMNS, ROWS), None) is None
    with torch.no_grad():
        assert GPTQ_4.multiply(x, parts, (COLUMNS, ROWS), None) is not None
        assert GPTQ_4.multiply(x.expand(2, -1), parts, (COLUMNS, ROWS), None) is None


@pytest.mark.gpu
def test_more_values_than_an_int_counts() -> None:
    """The last rows of a matrix of more than 2^31 values are its own."""
    found, rows, columns = encoding_of(8), 70_000, 32_768
    assert found is not None
    blocks = torch.zeros(rows, columns // 32 * 34, dtype=torch.uint8, device="cuda")
    blocks[-1] = torch.tensor([0, 0x3C, *range(32)], dtype=torch.uint8, device="cuda").repeat(columns // 32)
    out = by_kernel(found, {"weight": blocks}, empty(rows, columns, dtype=torch.float16, device="cuda"))
    assert torch.equal(out[-1].view(-1, 32)[0].long().cpu(), torch.arange(32)) and not out[-2].count_nonzero()
