"""The magics in a real IPython, as a user types them."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import airllm_nb.engine.facade
from airllm_nb.bench import synthetic_model
from airllm_nb.errors import PromptError, SourceError
from airllm_nb.flags import in_flags
from airllm_nb.notebook.cards import Card, bench_card, count
from airllm_nb.notebook.generating import Waiting
from airllm_nb.notebook.loading import Loading
from airllm_nb.notebook.options import one_line
from airllm_nb.notebook.progress_line import ProgressLine, clock_time, progress_text
from airllm_nb.notebook.prompt_variables import expand
from airllm_nb.progress import Meter, Progress
from airllm_nb.trace import Trace

MAGICS = ("load", "plan", "bench", "status", "trace", "unload")
LONG = 60_000


class Ran(NamedTuple):
    out: str
    err: str
    error: BaseException | None


class Notebook:
    """A shell, and what its cells wrote."""

    def __init__(self, shell: Any, capsys: Any):
        self.shell, self._capsys = shell, capsys

    def __call__(self, cell: str) -> Ran:
        self._capsys.readouterr()
        done = self.shell.run_cell(cell)
        out, err = self._capsys.readouterr()
        return Ran(out, err, done.error_in_exec or done.error_before_exec)

    def good(self, cell: str) -> str:
        ran = self(cell)
        assert ran.error is None, ran.err + ran.out
        return ran.out

    def __getitem__(self, name: str) -> Any:
        return self.shell.user_ns[name]


@pytest.fixture(scope="module")
def shell() -> Iterator[Any]:
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    InteractiveShell.clear_instance()


@pytest.fixture
def notebook(shell: Any, capsys: Any) -> Iterator[Notebook]:
    shell.reset(new_session=False)
    made = Notebook(shell, capsys)
    assert made.good("%load_ext airllm_nb") == ""
    yield made
    shell.run_cell("%unload_ext airllm_nb")


@pytest.fixture
def endless(tiny_llama: Callable[..., Path]) -> Callable[..., Path]:
    """Models that never end by themselves."""
    return functools.partial(tiny_llama, eos_token_id=None, max_position_embeddings=2 * LONG)


@pytest.fixture
def loaded(notebook: Notebook, endless: Callable[..., Path]) -> Notebook:
    notebook.good(f'%airllm_load "{endless()}"')
    return notebook


@contextlib.contextmanager
def interrupted_when(*conditions: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C in the main thread, as soon as each condition holds in turn."""
    main, over = threading.main_thread().ident, threading.Event()
    assert main is not None

    def watch() -> None:
        for condition in conditions:
            while not condition():
                if over.wait(0.005):
                    return
            signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def waits_for_work() -> bool:
    """Whether the main thread waits for what a thread of :class:`Loading` does, which has begun."""
    return runs("result", "wait") and not runs("start")


def runs(*names: str) -> bool:
    """Whether the main thread is in functions of these names."""
    frames = traceback.walk_stack(sys._current_frames()[threading.main_thread().ident])
    return {*names} <= {frame.f_code.co_name for frame, _ in frames}


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("airllm")]


# ---- the extension ---------------------------------------------------------------------------------------------------


def test_load_ext_imports_nothing_heavy() -> None:
    source = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "airllm_nb")
shell.run_cell("%airllm_status\\n%airllm_load --help")
print(sorted({"torch", "transformers", "matplotlib", "huggingface_hub"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_loading_the_extension_twice_says_so_and_changes_nothing(loaded: Notebook) -> None:
    before = len(loaded.shell.configurables)
    assert "already loaded" in loaded.good("%load_ext airllm_nb")
    assert "loaded already" in loaded.good("import airllm_nb; airllm_nb.load_ipython_extension(get_ipython())")
    assert len(loaded.shell.configurables) == before
    assert "1 model loaded" in loaded.good("%airllm_status")


def test_reloading_closes_models_and_works(loaded: Notebook) -> None:
    loaded.good("%reload_ext airllm_nb")
    assert "no model is loaded" in loaded.good("%airllm_status")
    assert our_threads() == []


def test_unloading_leaves_nothing(loaded: Notebook) -> None:
    shell, magics = loaded.shell, weakref.ref(loaded.shell.magics_manager.registry["AirLLM"])
    model = weakref.ref(magics().models.get().model)
    loaded.good("%unload_ext airllm_nb")
    assert not [name for kind in shell.magics_manager.magics.values() for name in kind if "airllm" in name]
    assert not [one for one in shell.configurables if type(one).__name__ == "AirLLM"]
    assert not [key for key in shell.strdispatchers["complete_command"].strs if "airllm" in key]
    gc.collect()
    assert (magics(), model(), our_threads()) == (None, None, [])
    assert "not found" in loaded("%airllm_status").err
    loaded.good("%unload_ext airllm_nb")
    loaded.good("%load_ext airllm_nb")
    assert "no model is loaded" in loaded.good("%airllm_status")


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_loaded(notebook: Notebook, endless: Callable[..., Path]) -> None:
    out = notebook.good(f"folder = {str(endless())!r}\n%airllm_load {{folder}} -o m --device cpu")
    for fact in ("is loaded as 'model'", "parameters", "not compressed", "cpu, float32", "s a token", "bound)"):
        assert fact in out
    assert notebook["m"].plan.sweep_seconds > 0
    notebook.good("%airllm_unload")
    assert notebook["m"].closed


def test_every_option_reaches_the_engine(notebook: Notebook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def fake(model: str, options: Any, *, progress: Any) -> Any:
        seen.update(model=model, options=options)
        raise SourceError("enough seen")

    monkeypatch.setattr(airllm_nb.engine.facade, "open_model", fake)
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    ran = notebook(
        "%airllm_load org/name --compression 4bit --vram 4GiB --ram '8 GiB' --shards "
        f'"{tmp_path}/a b" --dtype bfloat16 --device cuda:1 --max-seq-len 99 --no-prefetch --profile --delete-original '
        "--direct-io --attn eager "
        "--token-env MY_TOKEN --revision v1 --offline --dashboard full"
    )
    assert ran.err.strip() == "UsageError: enough seen"
    options = seen["options"]
    assert (seen["model"], options.compression, options.vram_budget, options.ram_budget) == (
        "org/name", "4bit", 4 << 30, 8 << 30
    )  # fmt: skip
    assert options.layer_shards_saving_path == tmp_path / "a b"
    assert (options.dtype, options.device, options.max_seq_len, options.prefetching) == (
        "bfloat16", "cuda:1", 99, False
    )  # fmt: skip
    assert (options.profiling_mode, options.delete_original, options.revision, options.local_files_only) == (
        True, True, "v1", True
    )  # fmt: skip
    assert (options.direct_io, options.attn_implementation) == (True, "eager")
    assert options.hf_token == "hf_secret" and "hf_secret" not in ran.out + ran.err


def test_loading_under_a_known_name_frees_the_first(loaded: Notebook, endless: Callable[..., Path]) -> None:
    registry = loaded.shell.magics_manager.registry["AirLLM"].models
    first, threads = weakref.ref(registry.get().model), len(threading.enumerate())
    loaded.good(f'%airllm_load "{endless()}"')
    assert registry.names == ["model"]
    gc.collect()
    assert first() is None
    assert len(threading.enumerate()) <= threads


def test_a_model_that_cannot_be_found_leaves_the_loaded_one(loaded: Notebook, tmp_path: Path) -> None:
    assert "no file or folder" in loaded(f"%airllm_load {tmp_path}/nowhere").err
    assert "too small" in loaded(f'%airllm_load "{_folder(loaded)}" --ram 1KiB').err
    assert "1 token" in loaded.good("%%airllm_generate -n 1\nhello")


def test_when_the_new_one_fails_late_the_line_says_the_old_one_is_closed(
    loaded: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise SourceError("the disk is full")

    monkeypatch.setattr(airllm_nb.engine.facade, "open_model", fails)
    ran = loaded(f'%airllm_load "{_folder(loaded)}"')
    assert ran.err.strip() == "UsageError: the disk is full (the model that was 'model' is closed already)"
    assert "no model is loaded" in loaded("%%airllm_generate\nhello").err


def _folder(notebook: Notebook) -> str:
    return str(notebook.shell.magics_manager.registry["AirLLM"].models.get().model.folder)


def test_twenty_models_leave_no_trace(notebook: Notebook, endless: Callable[..., Path]) -> None:
    registry, seen = notebook.shell.magics_manager.registry["AirLLM"].models, []
    for _ in range(20):
        notebook.good(f'%airllm_load "{endless()}"\nget_ipython().run_cell_magic("airllm_generate", "-n 2", "hi")')
        seen.append(weakref.ref(registry.get().model))
        notebook.good("%airllm_unload")
    gc.collect()
    assert [one() for one in seen if one() is not None] == []
    assert our_threads() == []


def test_an_interrupted_load_leaves_nothing(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def slow(model: str, options: Any, *, progress: Any) -> Any:
        try:
            for done in range(1_000_000):
                progress(Progress("download", done, 1_000_000))
                time.sleep(0.01)
        finally:
            ended.append(model)

    monkeypatch.setattr(airllm_nb.engine.facade, "open_model", slow)
    with interrupted_when(waits_for_work):
        ran = notebook("%airllm_load org/name")
    assert ran.err.startswith("UsageError: interrupted; nothing is loaded")
    assert ended == ["org/name"]


def test_a_load_that_was_left_behind_closes_what_it_opened(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    go, closed, left, leave = threading.Event(), threading.Event(), threading.Event(), Loading._leave

    def deaf(model: str, options: Any, *, progress: Any) -> Any:
        go.wait()
        return SimpleNamespace(close=closed.set)

    def leaving(loading: Loading[Any]) -> None:
        leave(loading)
        left.set()

    monkeypatch.setattr(airllm_nb.engine.facade, "open_model", deaf)
    monkeypatch.setattr(Loading, "_leave", leaving)
    with interrupted_when(waits_for_work, lambda: left.is_set() and waits_for_work()):
        assert "interrupted" in notebook("%airllm_load org/name").err
    go.set()
    assert closed.wait(120)


# ---- generating ------------------------------------------------------------------------------------------------------


def test_text_streams_and_the_result_is_stored(loaded: Notebook) -> None:
    out = loaded.good("%%airllm_generate -n 12 -o answer\nThe capital of France is")
    answer = loaded["answer"]
    assert answer.text.strip() in out
    assert (len(answer.token_ids), answer.stopped_by, answer.prompt) == (12, "length", "The capital of France is")
    last = next(line for line in out.splitlines() if "tok/s" in line)
    for fact in ("12 tokens", "tok/s", "predicted ", "s a token", "achieved ", "%)", "ended by the length"):
        assert fact in last


def test_text_comes_token_by_token_from_the_main_thread(loaded: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[tuple[str, threading.Thread]] = []
    spy = SimpleNamespace(
        write=lambda text: writes.append((text, threading.current_thread())), flush=lambda: None, isatty=lambda: False
    )
    monkeypatch.setattr(sys, "stdout", spy)
    loaded.shell.run_cell("%%airllm_generate -n 12 -o answer\nhello")
    assert len(writes) >= 8
    assert {thread for _, thread in writes} == {threading.main_thread()}
    assert "".join(text for text, _ in writes).startswith(loaded["answer"].text)


def test_variables_of_the_notebook_are_in_the_prompt(loaded: Notebook) -> None:
    loaded.good('import json\ncity = "Paris"\nn = 2\nblank = "a b"')
    body = '{city} {"city": {nothing}} {{city}} {json} {print} {_} {city!r}'
    loaded.good(f"%%airllm_generate -n {{n}} -o answer --system {{blank}}\n{body}")
    answer = loaded["answer"]
    assert len(answer.token_ids) == 2
    assert answer.prompt == f"system: a b\nuser: {body.replace('{city} ', 'Paris ')}\nassistant:"
    loaded.good("%%airllm_generate -n 1 --raw -o answer\n{city}")
    assert loaded["answer"].prompt == "{city}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{x}", "1"),
        ("a{x}b{x}", "a1b1"),
        ("{y}", "{y}"),
        ("{{x}}", "{{x}}"),
        ("{x.real}", "{x.real}"),
        ("{x:>5}", "{x:>5}"),
        ("{ x }", "{ x }"),
        ("{}", "{}"),
        ("{0}", "{0}"),
        ("{brace}", "{x}"),
        ('{"x": {x}}', '{"x": 1}'),
        ("def f() { return {x}; }", "def f() { return 1; }"),
        ("${x}", "$1"),
        ("{größe}", "2"),
        ("\\d{x}\n", "\\d1\n"),
        ("", ""),
    ],
)
def test_expand(text: str, expected: str) -> None:
    assert expand(text, {"x": 1, "brace": "{x}", "größe": 2}) == expected


def test_a_variable_without_text_is_named() -> None:
    class Mute:
        def __str__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(PromptError, match="variable x cannot be written"):
        expand("{x}", {"x": Mute()})


@pytest.mark.parametrize(
    "flags",
    ['--stop "{0}"', "--stop '{0}'", '--stop="{0}"', "--stop {0}", '--stop "never in it" --stop "{0}"', "--stop={0}"],
)
def test_stop_texts_lose_their_quotes(loaded: Notebook, flags: str) -> None:
    text = _fixed_text(loaded)
    stop = text[5:7]
    loaded.good(f"%%airllm_generate -n 20 -o answer {flags.format(stop)}\nhello")
    assert loaded["answer"].text == text[: text.index(stop)]
    assert loaded["answer"].stopped_by == "end"


def _fixed_text(notebook: Notebook) -> str:
    """An answer whose characters can stand unquoted in a line; the model is random, so its tokens are chosen here."""
    model = notebook.shell.magics_manager.registry["AirLLM"].models.get().model
    ids = model.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    head, start = model.native.forward, len(model.tokenizer("hello")["input_ids"])

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = head(*args, **kwargs)
        at = kwargs["past_key_values"].get_seq_length() - start
        out.logits[..., ids[at % 26]] = 1e4
        return out

    model.native.forward = forward
    return "abcdefghijklmnopqrst"


@pytest.mark.parametrize("stop", ["---", "-n", "--chat"])
def test_a_quoted_stop_text_may_look_like_a_flag(loaded: Notebook, stop: str) -> None:
    loaded.good(f'%%airllm_generate -n 3 --stop "{stop}" -o answer\nhello')
    assert len(loaded["answer"].token_ids) == 3


def test_greedy_by_default_and_a_seed_repeats(loaded: Notebook) -> None:
    for name, flags in (("a", ""), ("b", "-t 0"), ("c", "-t 2 --seed 7"), ("d", "-t 2 --top-p 0.99 --seed 8")):
        loaded.good(f"%%airllm_generate -n 6 {flags} -o {name}\nhello")
    loaded.good("%%airllm_generate -n 6 -t 2 --seed 7 -o again\nhello")
    assert loaded["a"].token_ids == loaded["b"].token_ids
    assert loaded["c"].token_ids == loaded["again"].token_ids != loaded["d"].token_ids


def test_chat_and_system(loaded: Notebook) -> None:
    loaded.good("%%airllm_generate -n 1 --chat -o a\nhi\n")
    loaded.good('%%airllm_generate -n 1 --system "Be brief." -o b\nhi\n')
    assert loaded["a"].prompt == "user: hi\nassistant:"
    assert loaded["b"].prompt == "system: Be brief.\nuser: hi\nassistant:"


def test_several_models(loaded: Notebook, endless: Callable[..., Path]) -> None:
    loaded.good(f'%airllm_load "{endless(seed=1)}" --name other')
    loaded.good("%%airllm_generate -n 8 -o last\nhello")
    loaded.good("%%airllm_generate -n 8 --name other -o other\nhello")
    loaded.good("%%airllm_generate -n 8 --name model -o first\nhello")
    assert loaded["last"].token_ids == loaded["other"].token_ids != loaded["first"].token_ids
    assert "2 models loaded" in loaded.good("%airllm_status")
    assert "closed other" in loaded.good("%airllm_unload other")
    assert "1 model loaded" in loaded.good("%airllm_status")
    assert "closed model" in loaded.good("%airllm_unload")
    assert "no model is loaded" in loaded.good("%airllm_unload")


def test_capture_holds_the_answer_and_no_progress(loaded: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airllm_nb.notebook.generating.PATIENCE", 0.0)
    assert loaded.good("%%capture got\n%%airllm_generate -n 5 -o answer\nhello") == ""
    assert loaded["got"].stdout.rstrip("\n") == loaded["answer"].text.rstrip("\n")
    assert len(loaded["got"].outputs) == 1
    assert "5 tokens" in loaded["got"].outputs[0].data["text/plain"]


def test_profile_shows_the_table(notebook: Notebook, endless: Callable[..., Path]) -> None:
    notebook.good(f'%airllm_load "{endless()}" --profile')
    out = notebook.good("%%airllm_generate -n 2\nhello")
    assert "compute ms" in out and "model.layers.3" in out and out.rstrip().splitlines()[-1].startswith("total")


def test_an_interrupt_keeps_what_there_is(loaded: Notebook) -> None:
    model = loaded.shell.magics_manager.registry["AirLLM"].models.get().model
    with interrupted_when(lambda: model.busy and model.trace.sweeps > 20 and runs("poll")):
        ran = loaded(f"%%airllm_generate -n {LONG} -o answer\nhello")
    assert ran.error is None, ran.err
    answer = loaded["answer"]
    assert (answer.stopped_by, our_threads().count("airllm-generate")) == ("user", 0)
    assert answer.token_ids and answer.text.strip() in ran.out
    assert f"stopped by you after {len(answer.token_ids)} token" in ran.out
    assert "3 tokens" in loaded.good("%%airllm_generate -n 3\nhello")


def test_a_second_interrupt_leaves_a_usable_model(loaded: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    held, reached = threading.Event(), threading.Event()
    model = loaded.shell.magics_manager.registry["AirLLM"].models.get().model

    def takes_long(*_: Any) -> None:
        """The worker sees the stop only after it."""
        reached.set()
        held.wait()

    hook = model.native.model.layers[1].register_forward_pre_hook(takes_long)
    with interrupted_when(lambda: reached.is_set() and runs("poll"), lambda: runs("poll", "_end")):
        ran = loaded(f"%%airllm_generate -n {LONG} -o answer\nhello")
    hook.remove()
    assert ran.error is None, ran.err
    assert "interrupted twice" in ran.out
    assert model.busy
    threading.Timer(0.3, held.set).start()
    assert "3 tokens" in loaded.good("%%airllm_generate -n 3 -o answer\nhello")
    assert loaded["answer"].stopped_by == "length"


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_plan_and_trace(loaded: Notebook, tmp_path: Path, endless: Callable[..., Path]) -> None:
    out = loaded.good(f'%airllm_plan "{endless()}" --units -o plan')
    assert "s a token" in out and "model.layers.3" in out and loaded["plan"].sweep_seconds > 0
    assert "nothing was generated" in loaded("%airllm_trace").err
    loaded.good("%%airllm_generate -n 4\nhello")
    assert "4 tokens in 4 sweeps" in loaded.good("%airllm_trace")
    assert "4 tokens, predicted" in loaded.good("%airllm_status")
    assert "ui.perfetto.dev" in loaded.good(f'%airllm_trace "{tmp_path}/a b.json"')
    assert json.loads((tmp_path / "a b.json").read_text("utf-8"))["traceEvents"]


def test_a_mixtures_experts_are_seen(notebook: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path))
    folder = synthetic_model("small-moe", 2)
    plan = notebook.good(f'%airllm_load "{folder}" --device cpu --vram 6MiB --max-seq-len 64')
    assert "of 32 cached" in plan and "VRAM" in plan
    assert "expert hits" in notebook.good("%%airllm_generate -n 4\nhello")
    assert "expert hits" in notebook.good("%airllm_status")
    shown = notebook.good("%airllm_trace")
    assert "2 layers of experts, up to 16 each" in shown and "are cached now" in shown and "expert hits" in shown
    notebook.good(f'%airllm_trace "{tmp_path}/run.json"')
    events = json.loads((tmp_path / "run.json").read_text("utf-8"))["traceEvents"]
    assert any(event["name"] == "experts" and event["args"]["moved"] for event in events)


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where synthetic checkpoints go."""
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path))
    return tmp_path / "synthetic"


def test_a_loaded_model_is_measured_and_stays_usable(loaded: Notebook) -> None:
    out = loaded.good("%airllm_bench --sweeps 3 --batch 2 -o result")
    result = loaded["result"]
    assert (result.sweeps, result.batch, result.open_seconds, result.same_tokens) == (3, 2, None, True)
    for fact in ("predicted", "achieved", "3 sweeps", "batch 2", "a second"):
        assert fact in out
    assert "3 tokens" in loaded.good("%%airllm_generate -n 3\nhello")
    refused = loaded("%airllm_bench --vram 4GiB").err
    assert "--vram needs MODEL or --synthetic" in refused


def test_the_card_of_a_measurement_is_text_and_html(notebook: Notebook, endless: Callable[..., Path]) -> None:
    notebook.good(f'%airllm_bench "{endless()}" --sweeps 2 -o result')
    card = bench_card(notebook["result"])
    assert notebook["result"].open_seconds > 0 and notebook["result"].title in repr(card)
    assert "<table>" in card._repr_html_() and "predicted" in card._repr_html_()
    assert "no model is loaded" in notebook("%airllm_bench").err


def test_a_synthetic_model_is_measured_and_deleted(notebook: Notebook, cache: Path) -> None:
    out = notebook.good("%airllm_bench --synthetic small-qwen --layers 2 --sweeps 2")
    assert "2 of 4 layers" in out and "deleted again" in out
    assert not list(cache.iterdir())


def test_an_interrupted_measurement_ends_at_once_and_leaves_nothing(notebook: Notebook, cache: Path) -> None:
    with interrupted_when(lambda: cache.exists() and any(cache.iterdir()) and waits_for_work()):
        ran = notebook("%airllm_bench --synthetic small-qwen --layers 2 --sweeps 30000")
    assert ran.err.startswith("UsageError: interrupted; nothing was measured"), ran
    assert not list(cache.iterdir())


def test_an_interrupted_measurement_leaves_the_loaded_model(loaded: Notebook) -> None:
    model = loaded.shell.magics_manager.registry["AirLLM"].models.get().model
    with interrupted_when(lambda: model.trace.sweeps > 3 and waits_for_work()):
        ran = loaded(f"%airllm_bench --sweeps {LONG}")
    assert ran.err.startswith("UsageError: interrupted"), ran
    assert "3 tokens" in loaded.good("%%airllm_generate -n 3\nhello")


@pytest.mark.parametrize("name", [*MAGICS, "generate"])
def test_every_magic_explains_itself(notebook: Notebook, name: str) -> None:
    cell = f"%%airllm_{name} {{}}\nbody" if name == "generate" else f"%airllm_{name} {{}}"
    for flag in ("-h", "--help"):
        out = notebook.good(cell.format(flag))
        assert out.startswith(f"%airllm_{name}") and "--help" in out
    assert "--help" in notebook.shell.find_magic(f"airllm_{name}", "cell" if name == "generate" else "line").__doc__


def test_flags_are_completed(notebook: Notebook) -> None:
    complete = notebook.shell.complete
    assert complete("--v", "%airllm_load --v")[1] == ["--vram"]
    assert complete("--s", "%%airllm_generate --s")[1] == ["--seed", "--stop", "--system"]
    assert "%airllm_load" in complete("%airllm")[1]


def test_config_sets_the_defaults(loaded: Notebook) -> None:
    assert "AirLLM.max_new_tokens" in loaded.good("%config AirLLM")
    loaded.good("%config AirLLM.max_new_tokens = 3")
    assert "3 tokens" in loaded.good("%%airllm_generate\nhello")
    loaded.good("%config AirLLM.ram = '1KiB'")
    assert "too small" in loaded(f'%airllm_plan "{_folder(loaded)}"').err
    loaded.good("%config AirLLM.ram = ''\n%config AirLLM.max_new_tokens = 200")


MISTAKES = [
    ("%airllm_load", "MODEL"),
    ("%airllm_load a b", "quotes"),
    ('%airllm_load "a', "no closing quotation"),
    ("%airllm_load x --vrma 4GiB", "did you mean --vram?"),
    ("%airllm_load x --compression 5bit", "4bit"),
    ("%airllm_load x --vram lots", "4GiB"),
    ("%airllm_load x --max-seq-len many", "invalid int value: 'many'"),
    ("%airllm_load x --max-seq-len 0", "1 or more"),
    ("%airllm_load x --device tpu", "'cuda'"),
    ("%airllm_load x --dtype int3", "float16"),
    ("%airllm_load x --delete-original", "compression"),
    ("%airllm_load x --token-env NO_SUCH_TOKEN", "NO_SUCH_TOKEN"),
    ("%airllm_load x -o 1x", "variable name"),
    ("%airllm_load /nowhere/at/all", "check the path"),
    ("%airllm_load org/name", "cache"),
    ("%airllm_plan /nowhere/at/all", "check the path"),
    ("%airllm_bench x --synthetic small", "not both"),
    ("%airllm_bench x --keep", "--synthetic SHAPE"),
    ("%airllm_bench x --name model", "--name is of a loaded model"),
    ("%airllm_bench --keep", "--keep needs MODEL"),
    ("%airllm_bench --name other", "loaded: model"),
    ("%airllm_bench --sweeps 0", "1 or more"),
    ("%airllm_bench --synthetic lama-2-70b", "did you mean llama-2-70b?"),
    ("%airllm_bench x --cap", "add --vram 4GiB"),
    ("%airllm_bench /nowhere/at/all", "check the path"),
    ("%airllm_status x", "'x'"),
    ("%airllm_trace nowhere.txt", ".json"),
    ("%airllm_trace /nowhere/at/all.json", "cannot be written"),
    ("%airllm_unload modle", "did you mean 'model'?"),
    ("%%airllm_generate -n 0\nhi", "1 token or more"),
    ("%%airllm_generate -n x\nhi", "invalid int"),
    ("%%airllm_generate -t -1\nhi", "0 (greedy)"),
    ("%%airllm_generate -t 1 --top-p 2\nhi", "at most 1"),
    ("%%airllm_generate -t 1 --top-k 0\nhi", "1 token"),
    ("%%airllm_generate --top-p 0.9\nhi", "-t 0.7"),
    ('%%airllm_generate --stop ""\nhi', "--stop"),
    ("%%airllm_generate --name other\nhi", "loaded: model"),
    ("%%airllm_generate --temprature 1\nhi", "did you mean --temperature?"),
    ("%%airllm_generate\n  \n", "empty"),
    ("%%airllm_generate --chat\n  \n", "empty"),
]


def test_a_mistake_takes_one_line(loaded: Notebook) -> None:
    loaded.good("%%airllm_generate -n 1\nhello")
    for cell, remedy in MISTAKES:
        ran = loaded(cell)
        assert isinstance(ran.error, UsageError), (cell, ran)
        assert ran.err.startswith("UsageError: ") and ran.err.count("\n") == 1, (cell, ran.err)
        assert remedy in ran.err, (cell, ran.err)
        assert ran.error.__context__ is None or isinstance(ran.error.__context__, (UsageError, ValueError)), cell
    assert "1 token" in loaded.good("%%airllm_generate -n 1\nhello")


def test_a_full_gpu_is_one_line_and_frees_what_it_held(loaded: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Tensor:
        """Stands for what a frame of the failed call holds."""

    held: list[weakref.ref[Any]] = []

    def fails(*_: Any, **__: Any) -> Any:
        big = Tensor()
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(airllm_nb.engine.facade.StreamedModel, "stream", fails)
    ran = loaded("%%airllm_generate\nhello")
    assert ran.err.count("\n") == 1 and "smaller --vram" in ran.err
    assert held[0]() is None


def test_bugs_are_not_hidden() -> None:
    @one_line
    def broken() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        broken()
    assert in_flags("vram_budget='x' and ram_budget=1") == "--vram='x' and --ram=1"


# ---- the pieces ------------------------------------------------------------------------------------------------------


def test_meter() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0])
    assert progress_text(meter, None) == "loading …"
    assert (
        progress_text(meter, Progress("download", 1 << 30, 4 << 30, detail="m"))
        == f"download m · {'█' * 5 + '░' * 15} · 1.0 GiB of 4.0 GiB"
    )
    now[0] = 10.0
    text = progress_text(meter, Progress("download", 2 << 30, 4 << 30, detail="m"))
    assert text == f"download m · {'█' * 10 + '░' * 10} · 2.0 GiB of 4.0 GiB · 102.4 MiB/s · 0:20 left"
    assert progress_text(meter, Progress("build", 0, 1, "models", "m")) == "build m"
    assert (
        progress_text(meter, Progress("convert", 3, 12, "layers")) == f"convert · {'█' * 5 + '░' * 15} · 3 of 12 layers"
    )
    assert progress_text(meter, Progress("download", 5, 0)) == "download · 5 B"
    assert (clock_time(65), clock_time(7265)) == ("1:05", "2:01:05")


def test_the_line_is_drawn_four_times_a_second_and_taken_away() -> None:
    now, drawn = [0.0], []
    sink = SimpleNamespace(draw=drawn.append, erase=lambda: drawn.append("erased"), replace=drawn.append)
    line = ProgressLine(sink, lambda: now[0])
    line.clear()
    for step in range(101):
        now[0] = step / 100
        line.show(str(step))
    line.clear()
    line.clear()
    assert len(drawn) in (5, 6) and drawn[-1] == "erased" and drawn.count("erased") == 1


def test_what_is_said_while_nothing_comes() -> None:
    now = [0.0]
    model = SimpleNamespace(position=(1, 8), plan=SimpleNamespace(sweep_seconds=0.5), trace=Trace())
    waiting = Waiting(model, lambda: now[0])
    assert waiting.text(in_place=True) == ""
    now[0] = 3.0
    assert waiting.text(in_place=True).startswith("reading the prompt · unit 1 of 8 · 3 s of about 0.5 s")
    model.position = (5, 8)
    assert "unit 5 of 8" in waiting.text(in_place=True)
    waiting.got(1, True)
    assert waiting.text(in_place=True) == ""
    now[0] = 6.0
    assert waiting.text(in_place=True).startswith("token 2 · unit 5 of 8 · 3 s")
    assert waiting.text(in_place=False) == ""
    slow = SimpleNamespace(position=(1, 8), plan=SimpleNamespace(sweep_seconds=30.0), trace=Trace())
    assert Waiting(slow, lambda: now[0]).text(in_place=True) != ""


def test_cards_read_as_text_and_escape_html() -> None:
    card = Card("<title>", [("a", "1\n2"), ("long", "<b>")])
    assert repr(card) == "<title>\n  a     1\n        2\n  long  <b>"
    assert "<b>" not in card._repr_html_().replace("<b>&lt;title&gt;</b>", "")
    assert [count(n) for n in (135e6, 70e9, 999, 1.2e12)] == ["135 M", "70 B", "999", "1.2 T"]
