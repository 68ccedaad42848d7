"""Files that shrink while they are mapped: an error at the next boundary, and the process goes on with all it holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from gguf_files import tiny_llama_gguf
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_notebook import ThisPython, text_of

from airllm_nb.tensors import libc

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not libc.is_supported(), reason="faults of mapped pages are handled on Linux only")

START = """
import ctypes, faulthandler, mmap, os, signal, sys, threading
from pathlib import Path
from airllm_nb.tensors import pages
from airllm_nb.tensors.files import Unchanged
from airllm_nb.errors import CheckpointError
path, PAGE = Path(sys.argv[1]), mmap.PAGESIZE
path.write_bytes(b"x" * 8 * PAGE)
def mapped(private=False):
    return pages.map_pages(path, 0, 8 * PAGE, 8 * PAGE, private=private)
def foreign():
    with open(path, "r+b") as file:
        found = mmap.mmap(file.fileno(), 0)
    os.truncate(path, 0)
    return found[0]
"""


def python(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own, where a signal does no harm."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", START + code, str(tmp_path / "file")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("thread", [False, True])
def test_what_is_lost_is_zeros_and_counted(tmp_path: Path, private: bool, thread: bool) -> None:
    code = f"""
memory, other = mapped({private}), mapped({private})
if {private}:
    memory[3 * PAGE] = 7  # a page of its own goes with its file, too
sources = Unchanged([path])
sources.check_pages()
os.truncate(path, 2 * PAGE)
seen = []
def look():
    seen.append((bytes(memory[3 * PAGE : 4 * PAGE]), memory[2 * PAGE], memory[0], memory[8 * PAGE - 1]))
worker = threading.Thread(target=look)
(worker.start(), worker.join()) if {thread} else look()
assert seen == [(bytes(PAGE), 0, ord("x"), 0)], seen
assert pages.losses(path) == 2, "one for each run of pages that was touched"
assert other[0] == ord("x") and other[7 * PAGE] == 0 and pages.losses(path) == 3
try:
    sources.check_pages()
except CheckpointError as error:
    print(error)
Unchanged([path]).check()  # whoever opens it now sees it as it is
"""
    done = python(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "became shorter" in done.stdout and str(tmp_path / "file") in done.stdout
    assert "load the model again" in done.stdout


def test_mappings_are_watched_as_long_as_they_live(tmp_path: Path) -> None:
    code = """
memory = mapped()
assert len(pages._watched) == 1
del memory
assert not pages._watched
with pages.watched(path):
    pass
found = mapped(); address = ctypes.addressof(found)
pages._watched.clear()
try:
    with pages.watched(path, (address, 8 * PAGE)):
        os.truncate(path, 0)
        assert found[0] == 0
except CheckpointError:
    print("said", len(pages._watched))
"""
    assert python(tmp_path, code).stdout == "said 0\n"


@pytest.mark.parametrize(
    "ranges", [[(0, 100), (100, 8 * 4096)], [(100, 8 * 4096), (0, 100)]], ids=["small first", "last"]
)
@pytest.mark.parametrize("release", ["neither", "small", "large", "nested"])
def test_ranges_that_begin_on_one_page_are_all_watched(
    tmp_path: Path, ranges: list[tuple[int, int]], release: str
) -> None:
    """As small tensors in a file lie beside the next large one; and while one goes, what others watch stays."""
    code = f"""
memory = mapped(); address = ctypes.addressof(memory)
pages._watched.clear()
whole = pages.watch(path, [(address + at, end - at) for at, end in {ranges}])
more = {{"small": (0, 100), "large": (0, 8 * PAGE), "nested": (PAGE, 10)}}.get({release!r})
if more:
    pages.watch(path, [(address + more[0], more[1])])()
os.truncate(path, 0)
assert (memory[0], memory[PAGE], memory[8 * PAGE - 1]) == (0, 0, 0)
whole()
assert not pages._watched and pages.losses(path)
"""
    done = python(tmp_path, code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("sizes", [(3, 200_000), (200_000, 3), (3, 5, 200_000, 7, 300_000, 3)], ids=str)
def test_pickles_of_small_and_large_tensors(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    code = f"""
import torch
from airllm_nb.checkpoint.bin.pickles import PickledWeights
path = path.with_name("pytorch_model.bin")
torch.save({{f"t{{n:02}}": torch.ones(size) for n, size in enumerate({sizes})}}, path)
weights = PickledWeights((path,))
os.truncate(path, 0)
assert not any(weights[name].sum() for name in weights)
assert pages.losses(path)
"""
    done = python(tmp_path, code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("handler", ["none", "before", "after", "after, and again"])
@pytest.mark.parametrize("how", ["fault", "sent"])
def test_all_other_faults_end_as_before(tmp_path: Path, handler: str, how: str) -> None:
    code = f"""
faulthandler.enable() if {handler!r} == "before" else faulthandler.disable()
memory = mapped()
if "after" in {handler!r}:
    faulthandler.enable()
if "again" in {handler!r}:
    pages.guard()
foreign() if {how!r} == "fault" else os.kill(os.getpid(), signal.SIGBUS)
"""
    done = python(tmp_path, code)
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) is (handler != "none"), done.stderr


@pytest.mark.parametrize("handler", ["before", "after"])
def test_ours_are_kept_also_where_another_handler_came_first_or_last(tmp_path: Path, handler: str) -> None:
    code = f"""
faulthandler.enable() if {handler!r} == "before" else None
memory = mapped()
faulthandler.enable() if {handler!r} == "after" else None
sources = Unchanged([path])
sources.check()  # as each run begins
os.truncate(path, 0)
assert memory[0] == 0
"""
    done = python(tmp_path, code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_process_is_guarded_too(tmp_path: Path) -> None:
    code = """
memory = mapped()
os.truncate(path, 0)
if (child := os.fork()) == 0:
    os._exit(memory[0] + pages.losses(path))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
assert pages.losses(path) == 0 and memory[0] == 0
"""
    done = python(tmp_path, code)
    assert done.returncode == 0, done.stderr


# ---- in a kernel, with models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """``run(source)`` executes a cell in one kernel, which holds variables; returns what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "2")  # so that threads fault which Python knows nothing of
        made = NotebookClient(nbformat.v4.new_notebook(), km=KernelManager(kernel_spec_manager=ThisPython()),
                              timeout=120)  # fmt: skip
        with made.setup_kernel(cleanup_kc=True):

            def execute(source: str) -> str:
                made.nb.cells.append(nbformat.v4.new_code_cell(source))
                return text_of(made.execute_cell(made.nb.cells[-1], len(made.nb.cells) - 1)["outputs"])

            execute("import shrinking\nfrom pathlib import Path\nprecious = [1, 2, 3]\n%load_ext airllm_nb")
            yield execute


# More of them find what is rare: AIRLLM_NB_ROUNDS=100.
ROUNDS = int(os.environ.get("AIRLLM_NB_ROUNDS", "3"))
# Wide enough that torch's matrix products are shared out among threads.
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
MODES = {
    "mapped": "",
    "read": "ram_budget='6MiB'",
    "page cache": "vram_budget='12MiB', ram_budget='1GiB'",
    "a rehearsal of little RAM": "vram_budget='12MiB', ram_budget='10MiB'",
    "4bit": "compression='4bit', vram_budget='8MiB'",
    "8bit, in place": "compression='8bit'",
    "gguf": "",
    "gguf, rehearsed": "vram_budget='12MiB'",
}


@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_survives(
    run: Callable[[str], str], tiny_llama: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    if "gguf" in mode:
        model = tiny_llama_gguf(tmp_path / "model.gguf", hidden=256, inner=1024, words=1024)
    else:
        model = f"shrinking.copy(Path({str(tiny_llama(**SHAPE))!r}), Path({str(tmp_path / 'model')!r}))"
        model = run(f"print({model})").strip()
    options = f"{MODES[mode]}, layer_shards_saving_path={str(tmp_path / 'stores')!r}".lstrip(", ")
    said = run(
        f"print(*shrinking.rounds(Path({str(model)!r}), {ROUNDS}, {len(mode)}, {options}), sep='\\n')"
    ).splitlines()
    assert len(said) == ROUNDS
    assert run("print(precious)") == "[1, 2, 3]\n"


def test_a_cell_says_it_in_a_line_and_another_model_goes_on(
    run: Callable[[str], str], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    endless = {"eos_token_id": None, "max_position_embeddings": 120_000}
    one, other = tiny_llama(**SHAPE, **endless), tiny_llama(**endless)
    run(f"one = shrinking.copy(Path({str(one)!r}), Path({str(tmp_path / 'one')!r}))")
    run(f"import os, threading\n%airllm_load {{one}} --name one\n%airllm_load {other} --name other")
    cut = "threading.Timer(0.3, lambda: os.truncate(one / 'model.safetensors', 1000)).start()"
    run(cut)
    with pytest.raises(CellExecutionError) as caught:
        run("%%airllm_generate -n 100000 --name one -o partial\nhello")
    assert "model.safetensors" in str(caught.value) and "load the model again" in str(caught.value)
    assert 'File "' not in str(caught.value), "a line, not a traceback"
    run("%%airllm_generate -n 5 --name other -o answer\nhello")
    assert run("print(len(answer.token_ids), precious)") == "5 [1, 2, 3]\n"
