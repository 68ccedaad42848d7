"""Measurements: from Python and from a shell, of real runs on small models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from airllm_nb.bench import BenchResult, bench_model, bench_open
from airllm_nb.bench.synthetic import is_finished
from airllm_nb.cli import main
from airllm_nb.config import LoadOptions
from airllm_nb.engine.facade import open_model
from airllm_nb.errors import OptionError
from airllm_nb.progress import Progress

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where synthetic checkpoints go."""
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path))
    return tmp_path / "synthetic"


@pytest.fixture
def cli(capsys: Any) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def check(result: BenchResult, sweeps: int, batch: int) -> None:
    assert (result.sweeps, result.batch, result.same_tokens) == (sweeps, batch, True)
    assert result.sweep_seconds > 0 and result.predicted_sweep_seconds > 0
    assert result.achieved_of_predicted == pytest.approx(result.predicted_sweep_seconds / result.sweep_seconds)
    # By the wall clock, so with what comes between sweeps, and never faster than they are by much.
    assert 0 < result.tokens_per_second < 3 * batch / result.sweep_seconds
    assert result.first_token_seconds > 0 and result.peak_bytes > 0


def test_the_second_generation_is_measured(tiny_llama: Callable[..., Path]) -> None:
    reports: list[Progress] = []
    result = bench_model(tiny_llama(), sweeps=3, batch=2, progress=reports.append)
    check(result, 3, 2)
    assert result.open_seconds is not None and result.open_seconds > 0
    assert result.stages["compute"]["count"] % 4 == 0, "the prompt and three sweeps, and no warm-up"
    assert result.bound_by in ("disk", "compute") and "link" not in result.links
    assert json.loads(json.dumps(result.as_dict()))["plan"]["sweep_seconds"] == result.predicted_sweep_seconds
    assert f"({result.bound_by}-bound), achieved" in str(result) and "2 generations" not in str(result)


def test_the_links_carry_what_the_plan_says(tiny_llama: Callable[..., Path]) -> None:
    options = LoadOptions(vram_budget=1 << 20, ram_budget=300 << 10, device="cpu", max_seq_len=64)
    with open_model(tiny_llama(), options) as model:
        result = bench_open(model, sweeps=2)
        plan = model.plan
        assert not model.closed
    assert result.open_seconds is None and plan.machine.has_device
    assert result.links["link"]["bytes"] == plan.swept_bytes("ram", "disk") > 0
    assert result.links["disk"]["bytes"] == plan.swept_bytes("disk") > 0
    for name, link in result.links.items():
        assert link["gb_per_second"] == pytest.approx(link["bytes"] / result.sweep_seconds / 1e9)
        assert link["probed_gb_per_second"] == getattr(plan.machine, name) / 1e9 == result.probed[name] / 1e9
    labels = dict(result.rows)
    assert {"speed", "link", "disk", "read", "copy", "probed", "versions"} <= labels.keys()


def test_it_warms_up_once_and_asks_for_equal_lengths(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from airllm_nb.engine.facade import StreamedModel

    runs: list[torch.Tensor] = []
    run = StreamedModel.run

    def spy(self: StreamedModel, kwargs: dict[str, Any], cancel: Any) -> Any:
        runs.append(run(self, kwargs, cancel))
        return runs[-1]

    monkeypatch.setattr(StreamedModel, "run", spy)
    bench_model(tiny_llama(), sweeps=4, prompt_tokens=7)
    assert [tuple(out.shape) for out in runs] == [(1, 7 + 5)] * 2 and torch.equal(*runs)


def test_tokens_that_differ_are_said(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    result = bench_model(tiny_llama(), sweeps=1)
    assert not result.same_tokens and "different tokens" in str(result)


def test_more_than_the_context_is_refused(tiny_llama: Callable[..., Path]) -> None:
    with pytest.raises(OptionError, match="more than the 512"):
        bench_model(tiny_llama(), sweeps=600)
    with pytest.raises(OptionError, match="more than the 20"):
        bench_model(tiny_llama(), LoadOptions(max_seq_len=20), sweeps=5)


def test_a_report_that_raises_ends_it_within_a_unit(tiny_llama: Callable[..., Path]) -> None:
    def stop(report: Progress) -> None:
        if report.stage == "bench":
            raise KeyboardInterrupt

    with open_model(tiny_llama(max_position_embeddings=100_000)) as model:
        with pytest.raises(KeyboardInterrupt):
            bench_open(model, sweeps=50_000, progress=stop)
        assert not model.busy
        check(bench_open(model, sweeps=2), 2, 1)


# ---- from a shell ----------------------------------------------------------------------------------------------------


def test_a_folder(cli: Callable[..., Any], tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    code, out, err = cli("bench", folder, "--sweeps", 2)
    assert (code, err) == (0, "") and out.startswith(f"{folder.name} (not compressed, float32) on ")
    code, out, err = cli("bench", folder, "--sweeps", 2, "--batch", 3, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "") and (document["sweeps"], document["batch"]) == (2, 3)
    assert document["same_tokens"] is True and document["synthetic"] is None
    assert document["machine"]["torch"] == torch.__version__ and document["stages"]["compute"]["seconds"] > 0


def test_a_synthetic_model_goes_at_the_end_unless_it_is_kept(cli: Callable[..., Any], cache: Path) -> None:
    arguments = ("bench", "--synthetic", "small-qwen", "--layers", 2, "--sweeps", 1)
    code, out, _ = cli(*arguments)
    assert code == 0 and "deleted again" in out and list(cache.iterdir()) == []
    code, out, _ = cli(*arguments, "--keep", "--json")
    facts = json.loads(out)["synthetic"]
    folder = cache / "small-qwen-2-layers"
    assert facts == {"shape": "small-qwen", "layers": 2, "layers_of_shape": 4, "folder": str(folder), "kept": True}
    before = (folder / "config.json").stat().st_mtime_ns
    code, out, _ = cli(*arguments)
    assert code == 0 and f"kept in {folder}" in out and (folder / "config.json").stat().st_mtime_ns == before
    code, out, _ = cli(*arguments, "--compression", "8bit", "--json")
    assert json.loads(out)["compression"] == "8bit" and list(cache.iterdir()) == [folder]


def test_it_goes_when_the_measurement_fails_too(cli: Callable[..., Any], cache: Path) -> None:
    code, out, err = cli("bench", "--synthetic", "small-qwen", "--layers", 1, "--ram", "1KiB")
    assert (code, out) == (1, "") and "--ram" in err and list(cache.iterdir()) == []


def test_a_full_disk_is_one_line(cli: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    code, out, err = cli("bench", "--synthetic", "llama-3.1-405b", "--layers", 2)
    assert (code, out, err.count("\n")) == (1, "", 1) and "GiB but" in err and "has 1.0 GiB free" in err
    assert list(cache.iterdir()) == []


def test_a_cap_needs_a_gpu(cli: Callable[..., Any], cache: Path) -> None:
    code, _, err = cli("bench", "--synthetic", "small-qwen", "--cap", "--vram", "1GiB", "--device", "cpu")
    assert code == 2 and "needs a GPU" in err and not cache.exists()


@pytest.mark.gpu
def test_a_cap_is_enforced_and_lifted(tiny_llama: Callable[..., Path]) -> None:
    result = bench_model(tiny_llama(), LoadOptions(vram_budget=512 << 20), cap=True, sweeps=2)
    assert result.vram_cap == 512 << 20 and result.peak_bytes <= 512 << 20
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def test_an_interrupt_keeps_what_is_to_be_kept(
    cli: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("airllm_nb.bench.measure._generate", interrupted)
    arguments = ("bench", "--synthetic", "small-qwen", "--layers", 1)
    code, out, err = cli(*arguments)
    assert (code, out) == (130, "") and "is deleted" in err and list(cache.iterdir()) == []
    code, out, err = cli(*arguments, "--keep")
    assert (code, out) == (130, "") and "is kept" in err
    assert is_finished(cache / "small-qwen-1-layer", "small-qwen", 1)
    assert "what was downloaded" in cli("bench", cache / "small-qwen-1-layer")[2]


def test_ctrl_c_removes_what_it_made(cache: Path) -> None:
    # Its progress is shown in a terminal only; this says on stderr that the measurement runs.
    source = """
import sys
from airllm_nb.bench import measure
from airllm_nb.cli import main
report = measure._report
def announced(*given):
    sys.stderr.write("." * 6)
    sys.stderr.flush()
    measure._report = report
    return report(*given)
measure._report = announced
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["bench", "--synthetic", "small-qwen", "--layers", "1", "--sweeps", "30000"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, "-c", source, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stderr is not None
        assert os.read(process.stderr.fileno(), 6) == b"......"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, b""), err
    assert err.startswith(b"airllm-nb: interrupted; the synthetic checkpoint ") and err.count(b"\n") == 1
    assert list(cache.iterdir()) == []
