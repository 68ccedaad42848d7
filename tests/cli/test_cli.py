"""``airllm-nb`` as a shell runs it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import tiny_llama_gguf

from airllm_nb import AutoModel, __version__
from airllm_nb.cli import main
from airllm_nb.cli.commands import ProgressLine
from airllm_nb.cli.doctor import PACKAGES
from airllm_nb.config import LoadOptions
from airllm_nb.errors import SourceError
from airllm_nb.flags import in_flags
from airllm_nb.intake.pointer import original_of
from airllm_nb.notebook.progress_line import progress_text
from airllm_nb.progress import Meter, Progress

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "airllm_nb", *map(str, arguments)]


def shell(*arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"stdin": subprocess.DEVNULL} | how if "input" not in how else how
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **how)


@pytest.fixture
def cli(capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, which has torch loaded: code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def endless(tiny_llama: Callable[..., Path]) -> Path:
    """A model that never ends by itself."""
    return tiny_llama(eos_token_id=None, max_position_embeddings=120_000)


def test_the_text_is_on_stdout_and_the_facts_on_stderr(endless: Path) -> None:
    done = shell("generate", endless, "hello", "-n", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and done.stdout.strip()
    assert done.stderr.count("\n") == 1 and "8 tokens" in done.stderr and "tok/s" in done.stderr
    assert re.search(r" · predicted \S+ m?s a token( \(\w+-bound\))?, achieved \S+ m?s \(\d+%\) · ", done.stderr), (
        done.stderr
    )


@pytest.mark.parametrize("dash", [(), ("-",)])
def test_the_prompt_comes_from_stdin(endless: Path, dash: tuple[str, ...]) -> None:
    done = shell("generate", endless, *dash, "-n", 3, "--json", "--chat", input="hi\n")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["prompt"] == "user: hi\nassistant:"
    assert len(document["token_ids"]) == 3 and document["stopped_by"] == "length"
    assert document["tokens_per_second"] > 0 and document["trace"]["sweeps"] == 3


# With --json nothing is written before the end; this says on stderr when the generation runs.
ANNOUNCED = """
import sys
from airllm_nb.cli import main
from airllm_nb.trace import Trace
end_sweep = Trace.end_sweep
def announced(*given):
    end_sweep(*given)
    sys.stderr.write("." * 6)
    sys.stderr.flush()
    Trace.end_sweep = end_sweep
Trace.end_sweep = announced
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_keeps_the_text_so_far(endless: Path) -> None:
    with subprocess.Popen(
        command("generate", endless, "hello", "-n", 100_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert first and out.endswith(b"\n") and b"stopped by you" in err and err.count(b"\n") == 1


def test_ctrl_c_keeps_the_document(endless: Path) -> None:
    arguments = [sys.executable, "-c", ANNOUNCED, "generate", str(endless), "hello", "-n", "100000", "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stderr is not None
        assert os.read(process.stderr.fileno(), 6) == b"......"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert json.loads(out)["stopped_by"] == "user" and err == b""


def test_a_closed_pipe_is_no_traceback(endless: Path) -> None:
    line = " ".join(command("generate", f"'{endless}'", "hello", "-n", "300")) + " | head -c 2"
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=ENVIRONMENT, timeout=120)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr


def test_plan(cli: Callable[..., Any], endless: Path) -> None:
    code, out, err = cli("plan", endless, "--units")
    assert (code, err) == (0, "") and "s a token" in out and "model.layers.3" in out
    code, out, _ = cli("plan", endless, "--units", "--json", "--vram", "1GiB", "--ram", "64MiB")
    document = json.loads(out)
    assert code == 0 and document["sweep_seconds"] > 0 and document["vram_budget"] == 1 << 30
    assert "model.layers.3" in [unit["name"] for unit in document["units"]]
    code, out, _ = cli("plan", endless, "--json")
    assert "units" not in json.loads(out)


def test_convert_prints_the_folder_of_the_store(cli: Callable[..., Any], endless: Path, tmp_path: Path) -> None:
    code, out, _ = cli("convert", endless, "--compression", "4bit", "--shards", tmp_path)
    assert code == 0 and Path(out.strip()).is_dir() and Path(out.strip()).parent == tmp_path
    code, again, _ = cli("convert", endless, "--compression", "4bit", "--shards", tmp_path, "--json")
    document = json.loads(again)
    assert code == 0 and document["folder"] == out.strip() and document["bytes"] > 0


def test_generating_repeats_with_a_seed_and_stops_at_a_text(cli: Callable[..., Any], endless: Path) -> None:
    sample = ("generate", endless, "hello", "-n", 6, "-t", 2, "--json", "--seed")
    first, again, other = (json.loads(cli(*sample, seed)[1])["token_ids"] for seed in (1, 1, 2))
    assert first == again != other
    code, _, err = cli("generate", endless, "hello", "-n", 2, "--profile")
    assert code == 0 and "compute ms" in err


def test_doctor(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = cli("doctor", "--json")
    document = json.loads(out)
    checks = {check["name"]: check for check in document["checks"]}
    assert code == (0 if document["ok"] else 1)
    assert {"place", "python", "ram", "disk, stores", "disk, Hub cache", "4bit works", *PACKAGES} <= set(checks)
    assert checks["torch"]["verdict"] == checks["python"]["verdict"] == "ok"
    assert all(check["remedy"] for check in document["checks"] if check["verdict"] == "fix")
    monkeypatch.setattr("airllm_nb.cli.doctor.PACKAGES", ("no_such_package",))
    monkeypatch.setattr("airllm_nb.cli.doctor._bitsandbytes", lambda: checks_only("4bit works"))
    code, out, _ = cli("doctor")
    assert code == 1 and "fix  no_such_package not installed" in out and "-> pip install 'no_such_package'" in out


def checks_only(name: str) -> Any:
    from airllm_nb.cli.doctor import Check

    return Check(name, "ok", "")


MISTAKES = [
    (2, "COMMAND", ()),
    (2, "invalid choice: 'lod'", ("lod",)),
    (2, "MODEL", ("plan",)),
    (2, "did you mean --vram?", ("plan", "x", "--vrma", "4GiB")),
    (2, "quotes", ("generate", "x", "hello", "world")),
    (2, "4bit", ("plan", "x", "--compression", "5bit")),
    (2, "4GiB", ("plan", "x", "--vram", "lots")),
    (2, "--max-seq-len", ("plan", "x", "--max-seq-len", "0")),
    (2, "NO_SUCH_TOKEN", ("plan", "x", "--token-env", "NO_SUCH_TOKEN")),
    (2, "compression", ("convert", "x", "--delete-original")),
    (2, "1 token or more", ("generate", "x", "hi", "-n", "0")),
    (2, "0 (greedy)", ("generate", "x", "hi", "-t=-1")),
    (2, "-t 0.7", ("generate", "x", "hi", "--top-k", "5")),
    (2, "--stop", ("generate", "x", "hi", "--stop", "")),
    (1, "empty", ("generate", "x", " ")),
    (1, "check the path", ("generate", "/nowhere/at/all", "hi")),
    (1, "check the path", ("convert", "/nowhere/at/all")),
    (1, "cache", ("plan", "org/name")),
    (2, "MODEL or --synthetic SHAPE", ("bench",)),
    (2, "not both", ("bench", "x", "--synthetic", "small")),
    (2, "--keep is of a synthetic", ("bench", "x", "--keep")),
    (2, "--layers is of a synthetic", ("bench", "x", "--layers", "2")),
    (2, "did you mean llama-2-70b?", ("bench", "--synthetic", "llama2-70b")),
    (2, "1 layer or more", ("bench", "--synthetic", "small", "--layers", "0")),
    (2, "sweeps=0", ("bench", "x", "--sweeps", "0")),
    (2, "batch=0", ("bench", "--synthetic", "small", "--batch", "0")),
    (2, "add --vram 4GiB", ("bench", "--synthetic", "small", "--cap")),
    (2, "invalid int", ("bench", "x", "--sweeps", "few")),
    (1, "check the path", ("bench", "/nowhere/at/all")),
]


@pytest.mark.parametrize(("code", "remedy", "arguments"), MISTAKES)
def test_a_mistake_is_one_line_on_stderr(
    cli: Callable[..., Any], code: int, remedy: str, arguments: tuple[str, ...]
) -> None:
    got, out, err = cli(*arguments)
    assert (got, out) == (code, ""), err
    assert err.startswith("airllm-nb") and err.count("\n") == 1 and remedy in err, err


@pytest.mark.parametrize("name", ["", "plan", "convert", "generate", "bench", "doctor", "cache"])
def test_help(cli: Callable[..., Any], name: str) -> None:
    code, out, err = cli(*filter(None, (name,)), "--help")
    assert (code, err) == (0, "") and out.startswith("usage: airllm-nb")
    assert name == "" or "--json" in out


def test_the_help_of_bench_names_the_shapes(cli: Callable[..., Any]) -> None:
    from airllm_nb.bench.shapes import SHAPES

    shown = "".join(cli("bench", "--help")[1].split())  # lines are broken after hyphens too
    assert all(shape in shown for shape in SHAPES)


def test_direct_io_reaches_the_options() -> None:
    from airllm_nb.cli.arguments import load_options, make_parser

    parser = make_parser(**dict.fromkeys(("plan", "convert", "generate", "bench", "doctor", "cache"), lambda _: 0))
    flags = {"--direct-io": True, "--no-direct-io": False, "--offline": None}
    assert {flag: load_options(parser.parse_args(["plan", "x", flag])).direct_io for flag in flags} == flags
    assert load_options(parser.parse_args(["plan", "x", "--attn", "eager"])).attn_implementation == "eager"


def test_version_comes_without_torch(cli: Callable[..., Any]) -> None:
    assert cli("--version")[1].strip() == __version__
    source = (
        "import sys, airllm_nb.cli as c; c.main(['plan', '/nowhere', '--vram', 'x']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout == "False\n"


def test_a_full_gpu_is_one_line(cli: Callable[..., Any], endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import airllm_nb.engine.facade

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(airllm_nb.engine.facade, "open_model", fails)
    code, out, err = cli("generate", endless, "hi")
    assert (code, out, err.count("\n")) == (1, "", 1) and "--vram" in err


# ---- the prompt's place ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("MODEL", "-n", "2", "a prompt"),
        ("MODEL", "a prompt", "-n", "2"),
        ("-n", "2", "MODEL", "a prompt"),
        ("-n", "2", "MODEL", "--seed", "1", "a prompt"),
        ("MODEL", "--stop", "x", "-n", "2", "--", "-a prompt"),
    ],
)
def test_the_prompt_may_stand_behind_the_options(
    cli: Callable[..., Any], endless: Path, words: tuple[str, ...]
) -> None:
    code, out, err = cli("generate", "--json", *(endless if word == "MODEL" else word for word in words))
    assert code == 0, err
    document = json.loads(out)
    assert document["prompt"] == next(word for word in words if word.endswith("prompt"))
    assert len(document["token_ids"]) == 2


def test_a_dash_behind_the_options_reads_stdin(endless: Path) -> None:
    done = shell("generate", endless, "-n", 2, "--json", "-", input="hi\n")
    assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == "hi", done.stderr


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("x", "-n", "2", "two", "words"), "quotes"),
        (("x", "one", "-n", "2", "more"), "quotes"),
        (("x", "-n", "2", "--stpo", "a"), "did you mean --stop?"),
        (("x", "-n", "2", "-q"), "unknown option -q"),
    ],
)
def test_other_words_are_still_refused(cli: Callable[..., Any], words: tuple[str, ...], remedy: str) -> None:
    code, out, err = cli("generate", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and remedy in err, err


# ---- what was opened -------------------------------------------------------------------------------------------------


def test_generate_says_which_file_was_chosen(cli: Callable[..., Any], tmp_path: Path) -> None:
    for kind in ("Q4_0", "Q8_0"):
        tiny_llama_gguf(tmp_path / f"tiny.{kind}.gguf", kind=kind)
    asked = ("generate", tmp_path, "a b", "-n", 2, "--shards", tmp_path / "shards", "--ram", "1GiB")
    code, _, err = cli(*asked)
    chosen = next(line for line in err.splitlines() if line.startswith("chosen: "))
    assert code == 0 and "tiny.Q8_0.gguf" in chosen and err.count("\n") == 2
    code, out, err = cli(*asked, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "") and f"chosen: {document['chosen']}" == chosen
    assert "Q8_0" in document["compression"] and document["adapter"] is None


def test_generate_names_the_adapter(cli: Callable[..., Any], endless: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(2, 64), name.format("B"): torch.zeros(128, 2)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    asked = ("generate", endless, "hello", "-n", 2, "--adapter", tmp_path)
    code, _, err = cli(*asked)
    said = next(line for line in err.splitlines() if line.startswith("adapter: "))
    assert code == 0 and tmp_path.name in said
    document = json.loads(cli(*asked, "--json")[1])
    assert f"adapter: {document['adapter']}" == said and document["chosen"] is document["compression"] is None


# ---- a folder beside a GGUF file -------------------------------------------------------------------------------------


def test_the_folder_beside_a_file_stands_for_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_llama_gguf(tmp_path / "tiny.gguf")
    with AutoModel.from_pretrained(path, layer_shards_saving_path=tmp_path / "shards") as model:
        beside = model.folder
    assert "--normalised--" in beside.name
    with caplog.at_level("INFO"):
        assert original_of(beside, tmp_path / "shards") == path
    assert str(path) in caplog.text
    for other in (path, tmp_path, tmp_path / "shards", "org/name", ""):
        assert original_of(other) == other
    words = f"holds only what was written beside {path}; name that file"
    with pytest.raises(SourceError, match=re.escape(words)):
        original_of(beside)  # not where stores are: whoever made the folder may have written that
    path.unlink()
    with pytest.raises(SourceError, match=re.escape(words)):
        original_of(beside, tmp_path / "shards")


def test_a_store_of_a_file_stands_for_itself(tmp_path: Path) -> None:
    """Whole, though it was made of one."""
    from airllm_nb.checkpoint.gguf.weights import convert_gguf
    from airllm_nb.intake.find.resolve import resolve

    source = resolve(tiny_llama_gguf(tmp_path / "tiny.gguf"), LoadOptions())
    whole = convert_gguf(source, tmp_path / "tiny--none--float32--00000001", "float32")
    assert original_of(whole) == whole


# ---- words and rates -------------------------------------------------------------------------------------------------


def test_compression_is_named_as_the_flag_is() -> None:
    assert in_flags("load it, with compression='4bit' if it should be small") == (
        "load it, with --compression 4bit if it should be small"
    )
    assert in_flags("delete_original=True needs compression='4bit' or '8bit': x") == (
        "--delete-original needs --compression 4bit or 8bit: x"
    )
    assert in_flags("compression=None") == "compression=None"


def test_a_refusal_names_the_flag(cli: Callable[..., Any], tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((tiny_llama() / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    (tmp_path / "model.safetensors").symlink_to(tiny_llama() / "model.safetensors")
    code, _, err = cli("plan", tmp_path)
    assert code == 1 and "quantised with hqq" in err and "--compression 4bit" in err and "compression=" not in err


GiB = 1 << 30
# Two conversions one after the other: what the second had to begin with is no speed of its own.
FOLLOWS = {
    "another total": (Progress("convert", 2 * GiB, 8 * GiB), Progress("convert", 3 * GiB, 8 * GiB)),
    "less done": (Progress("convert", 0, 4 * GiB), Progress("convert", GiB, 4 * GiB)),
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_the_rate_counts_from_the_beginning_of_a_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("airllm_nb.cli.commands.time.monotonic", lambda: now[0])
    line, meter, texts = ProgressLine(), Meter(lambda: now[0]), {}
    reports = [Progress("convert", GiB, 4 * GiB), Progress("convert", 2 * GiB, 4 * GiB), *FOLLOWS[name]]
    for now[0], report in zip((0.0, 10.0, 20.0, 30.0), reports, strict=True):
        line.show(report)
        texts[now[0]] = (line._text(report), progress_text(meter, report))
    for at, has_rate in ((10.0, True), (20.0, False), (30.0, True)):
        assert all(("102.4 MiB/s" in text) is has_rate and ("/s" in text) is has_rate for text in texts[at]), texts


def test_a_log_has_a_line_of_progress_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where nobody looks at a terminal, stages that change all the time are no reason to be silent."""
    now = 1000.0
    monkeypatch.setattr("airllm_nb.cli.commands.time.monotonic", lambda: now)
    with ProgressLine() as line:
        for step in range(100):
            line.show(Progress("download" if step % 2 else "convert", step, 100, detail="org/m"))
            now += 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(text.startswith(("download org/m", "convert org/m")) for text in said)


@pytest.mark.parametrize("kept", [None, b"{}", b"no json"])
def test_a_tokenizer_that_is_not_there_is_one_line(
    cli: Callable[..., Any], endless: Path, tmp_path: Path, kept: bytes | None
) -> None:
    folder = Path(shutil.copytree(endless, tmp_path / "model"))
    for file in [*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("merges*")]:
        if kept is None or "special" in file.name:
            file.unlink()
        elif file.name == "tokenizer.json":
            file.write_bytes(kept)
    code, out, err = cli("generate", folder, "hello", "-n", 2)
    assert (code, out) == (1, "") and err.count("\n") == 1 and "give token ids to model.generate" in err
    assert ("holds no tokenizer" in err) is (kept is None) and ("cannot be read" in err) is (kept is not None)


def test_warnings_are_in_the_words_of_a_shell(cli: Any, monkeypatch: pytest.MonkeyPatch, endless: Path) -> None:
    def plan_model(*args: Any, **kwargs: Any) -> None:
        logging.getLogger("airllm_nb.intake.written").warning("%s stays: delete_original=True came too late", "x")
        raise SourceError("no model")

    monkeypatch.setattr("airllm_nb.engine.facade.plan_model", plan_model)
    for _ in range(2):  # once each
        code, out, err = cli("plan", endless)
        assert (code, out) == (1, "")
        assert err == "airllm-nb: x stays: --delete-original came too late\nairllm-nb: no model\n"


def test_what_does_not_apply_is_said(cli: Any, endless: Path) -> None:
    code, _, err = cli("plan", endless, "--revision", "v2")
    assert code == 1 and "has no revision 'v2'" in err and err.count("\n") == 1
    code, _, err = cli("convert", endless, "--compression", "8bit", "--adapter", "x")
    assert code == 2 and "give it when the model is used" in err
