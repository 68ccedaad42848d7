"""The notebooks, executed as they are, each in a fresh kernel; those for Colab and Kaggle as far as can be as there.

What can be enforced is: two cores, 12.7 GiB of address space, 64 KiB of locked memory, the kernel and widgets of the
place (``make kernels``), its environment variables and its module for secrets. What cannot is simulated: float16 is
what the notebooks ask for, on a CPU too; the RAM budget is set by configuration to what such a machine would have left;
GPUs are functions of torch that say what it would say of them.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import kernel_stacks as kernels
import nbformat
import numpy as np
import pytest
from gguf_files import blocks
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ("quickstart", "from_airllm", "under_the_hood", "colab_t4", "kaggle_t4")
SECONDS = 240
WIDGET = "application/vnd.jupyter.widget-view+json"
SECRET = "hf_not_to_be_shown_anywhere"

# Before the kernel starts, in its own process: the machine of a free notebook.
LIMITS = """
import os, resource, runpy
resource.setrlimit(resource.RLIMIT_AS, (int(12.7 * 2**30),) * 2)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16,) * 2)
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
for name in ("AIRLLM_NB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
runpy.run_module("ipykernel_launcher", run_name="__main__")
"""
LIMITED = """
import os, resource
limits = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_MEMLOCK)]
print((*limits, len(os.sched_getaffinity(0)) <= 2))
"""
# Of 12.7 GiB about 11.5 are free in a new session, and the engine takes 70% of what is free.
RAM = "8GiB"

# What torch says of a GPU; nothing computes on it here.
GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda index=0: {name!r}
torch.cuda.get_device_capability = lambda index=0: {capability}
torch.cuda.get_arch_list = lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
torch.cuda.mem_get_info = lambda index=0: (int(14.9 * 2**30), int(15.0 * 2**30))
"""
T4 = GPU.format(name="Tesla T4", capability=(7, 5))
P100 = GPU.format(name="Tesla P100-PCIE-16GB", capability=(6, 0))


class Place(KernelSpecManager):
    """Kernels of this interpreter on a stack of kernel_stacks.py, with an environment and, if asked for, limits."""

    def __init__(self, stack: str = "newest", limits: bool = False, **environ: str):
        super().__init__()
        self._env, self._limits = kernels.environment(stack), limits
        path = [environ.pop("PYTHONPATH", ""), self._env["PYTHONPATH"]]
        self._env |= environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        start = ["-c", LIMITS] if self._limits else ["-m", "ipykernel_launcher"]
        argv = [sys.executable, *start, "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python", env=self._env)


def load(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def client_of(notebook: Any, place: Place, folder: Path) -> NotebookClient:
    return NotebookClient(
        notebook,
        km=KernelManager(kernel_spec_manager=place),
        timeout=SECONDS,
        coalesce_streams=True,
        store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
    )


def execute(name: str, place: Place, folder: Path, after: str = "") -> dict[str, str]:
    """Run a notebook from top to bottom, then ``after``; leaves it in ``folder``, returns each cell's text."""
    notebook = load(name)
    if after:
        notebook.cells.append(nbformat.v4.new_code_cell(after, id="after"))
    client_of(notebook, place, folder).execute(cleanup_kc=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr", (cell.id, output)
            assert WIDGET not in output.get("data", {}), f"{cell.id}: a live widget is left in the saved notebook"
    texts = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert not [name for name, text in texts.items() if "Warning" in text], texts
    assert SECRET not in json.dumps(notebook)
    return texts


def text_of(cell: Any) -> str:
    """What a cell shows where there is only text."""
    return "".join(
        output["text"] if output["output_type"] == "stream" else output["data"].get("text/plain", "") + "\n"
        for output in cell["outputs"]
    )


def sources(name: str) -> dict[str, str]:
    return {cell.id: cell.source for cell in load(name).cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def model(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model; its tokenizer's config is without what one transformers writes and the next remarks on."""
    folder = tmp_path_factory.mktemp("model") / "SmolLM2-135M-Instruct"
    folder.mkdir()
    for file in smollm2_folder.iterdir():
        # The rest is copied into stores, and links are not followed there.
        (folder / file.name).symlink_to(file) if file.suffix == ".safetensors" else shutil.copy(file, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").unlink()
    config["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hood(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """``under_the_hood`` executed: the folder that it ran in, and its text."""
    folder = tmp_path_factory.mktemp("hood")
    return folder, execute("under_the_hood", Place(AIRLLM_NB_DEMO_MODEL=str(model)), folder)


def profile(folder: Path, startup: str = "") -> str:
    """An IPYTHONDIR with the configuration of a free notebook, and code that runs before the first cell."""
    (folder / "ipython" / "profile_default" / "startup").mkdir(parents=True)
    config = folder / "ipython" / "profile_default" / "ipython_kernel_config.py"
    config.write_text(f'get_config().AirLLM.ram = "{RAM}"\n', encoding="utf-8")
    (config.parent / "startup" / "00.py").write_text(startup, encoding="utf-8")
    return str(folder / "ipython")


def modules(folder: Path, files: dict[str, str]) -> str:
    """A folder for PYTHONPATH with these modules."""
    for name, source in files.items():
        path = folder / "modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    return str(folder / "modules")


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_every_notebook_is_tested_here() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_clean_and_explained(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not [c for c in notebook.cells if c.get("outputs") or c.get("execution_count") or c.metadata]
    # papermill and others start the kernel that the file names.
    assert notebook.metadata == nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4).metadata
    assert notebook.cells[0].source.startswith("# ")
    prose = [len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown"]
    assert max(prose) < 110, "short"
    assert max(len(c.source.splitlines()) for c in notebook.cells if c.cell_type == "code") <= 32


# ---- from_airllm -----------------------------------------------------------------------------------------------------

GUIDE = """
from airllm import AutoModel

MAX_LENGTH = 128
model = AutoModel.from_pretrained(MODEL)

input_text = [
        'What is the capital of United States?',
        #'I like',
    ]

input_tokens = model.tokenizer(input_text,
    return_tensors="pt",
    return_attention_mask=False,
    truncation=True,
    max_length=MAX_LENGTH,
    padding=False)

generation_output = model.generate(
    input_tokens['input_ids'].cuda(),
    max_new_tokens=20,
    use_cache=True,
    return_dict_in_generate=True)

output = model.tokenizer.decode(generation_output.sequences[0])

print(output)
"""
OPTIONS = ("compression", "profiling_mode", "layer_shards_saving_path", "hf_token", "prefetching", "delete_original",
           "device", "dtype", "max_seq_len")  # fmt: skip


def test_only_the_import_of_the_guides_example_is_changed() -> None:
    ours = sources("from_airllm")["guide"].removeprefix("import torch\n")
    ours = ours.replace('.cuda() if torch.cuda.is_available() else input_tokens["input_ids"]', ".cuda()")
    assert ast.dump(ast.parse(ours.replace("airllm_nb", "airllm"))) == ast.dump(ast.parse(GUIDE))


def check_from_airllm(model: Path, tmp_path: Path) -> dict[str, str]:
    environ = {"AIRLLM_NB_DEMO_MODEL": str(model), "HF_TOKEN": SECRET, "TMPDIR": str(tmp_path)}
    texts = execute("from_airllm", Place(**environ), tmp_path)
    assert "What is the capital of United States?" in texts["guide"]
    assert texts["compression"].count("weights in") == 2
    assert "--4bit--" in texts["compression"] and "--8bit--" in texts["compression"]
    assert f"weights in {tmp_path}" in texts["shards"] and "manifest.json" in texts["shards"]
    assert "compute ms" in texts["profiling"] and "lm_head" in texts["profiling"]
    assert "torch.float32" in texts["place"]
    assert texts["delete"].count("--8bit--") == 2
    assert texts["transformers"].count("the same") == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")], "what it wrote is gone"
    return texts


def test_from_airllm(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_llama(shards=2)
    files = sorted(path.name for path in model.iterdir())
    code = "".join(sources("from_airllm").values())
    assert not [name for name in OPTIONS if f"{name}=" not in code and f'"{name}":' not in code]
    check_from_airllm(model, tmp_path)
    assert sorted(path.name for path in model.iterdir()) == files, "the user's own folder is as it was"


@pytest.fixture
def small_gguf(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model's own header, with two layers of 64, random blocks of its types and its first 1,024 tokens."""
    words, lengths = 1024, {576: 64, 192: 32, 1536: 128, 49152: 1024}
    sizes: dict[str, Any] = {"llama.block_count": 2, "llama.embedding_length": 64, "llama.feed_forward_length": 128,
             "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
             "llama.vocab_size": words}  # fmt: skip
    whole = gguf.GGUFReader(smollm2_gguf)
    tokens = whole.fields["tokenizer.ggml.tokens"].contents()[:words]
    merges = whole.fields["tokenizer.ggml.merges"].contents()
    sizes |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": whole.fields["tokenizer.ggml.token_type"].contents()[:words],
        "tokenizer.ggml.merges": [merge for merge in merges if merge.replace(" ", "") in tokens],
    }
    writer = gguf.GGUFWriter(path := tmp_path_factory.mktemp("sample") / smollm2_gguf.name, "llama")
    for name, field in whole.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = sizes.get(name) or field.contents()
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in whole.tensors:
        if not tensor.name.startswith("blk.") or tensor.name.split(".")[1] in ("0", "1"):
            shape = tuple(lengths.get(int(length), int(length)) for length in reversed(tensor.shape))
            writer.add_tensor(tensor.name, blocks(np.random.default_rng(0), shape, tensor.tensor_type),
                              raw_dtype=tensor.tensor_type)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_from_airllm_with_a_file(small_gguf: Path, tmp_path: Path) -> None:
    """As the sample model comes where the Hub is out of reach."""
    texts = check_from_airllm(small_gguf, tmp_path)
    assert "bfloat16: the same" in texts["transformers"]
    assert [path.name for path in small_gguf.parent.iterdir()] == [small_gguf.name]


# ---- under_the_hood --------------------------------------------------------------------------------------------------


def test_under_the_hood(hood: tuple[Path, dict[str, str]]) -> None:
    folder, texts = hood
    assert "predicted" in texts["plan"] and texts["budgets"].count("-bound") == 4
    tiers = texts["load"].splitlines()[-1]
    assert set(tiers) == set("grd") and "VRAM" in texts["load"]
    assert "Paris" in texts["ask"] and "24 tokens" in texts["ask"]
    assert "stage by stage" in texts["trace"] and "read" in texts["trace"] and "copy" in texts["trace"]
    assert "'sweeps': 24" in texts["export"]
    assert (folder / "trace.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    events = json.loads((folder / "trace.json").read_text("utf-8"))["traceEvents"]
    assert {event["cat"] for event in events if event["ph"] == "X"} >= {"read", "copy", "compute"}
    for cell, other in (("compare-prefetching", "behind"), ("compare-compression", "packed")):
        assert "ahead" in texts[cell] and other in texts[cell]
    assert "no prefetching" in texts["compare-prefetching"] and "4bit" in texts["compare-compression"]
    assert texts["check"].startswith("24 equal tokens") and "closed" in texts["check"]


# JupyterLab reads a picture's description, and so does nbconvert's classic template; its default one leaves it out.
@pytest.mark.parametrize("template", ["lab", "classic"])
def test_html_has_the_same_facts(template: str, hood: tuple[Path, dict[str, str]]) -> None:
    from nbconvert import HTMLExporter

    notebook = nbformat.read(hood[0] / "under_the_hood.ipynb", as_version=4)
    page, _ = HTMLExporter(embed_images=True, template_name=template).from_notebook_node(notebook)
    shown = html.unescape(page)
    pictures = 0
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if output["output_type"] == "stream":
            assert output["text"].strip() in shown
        elif picture := output["data"].get("image/png"):
            assert base64.b64decode(picture).startswith(b"\x89PNG")
            assert picture.replace("\n", "") in page.replace("\n", "")
            assert template == "lab" or f'alt="{output["data"]["text/plain"]}"' in shown
            pictures += 1
        elif table := output["data"].get("text/html"):
            assert html.unescape(table).strip() in shown
    assert pictures >= 6


# ---- Colab and Kaggle ------------------------------------------------------------------------------------------------


def test_colab_t4(model: Path, tmp_path: Path) -> None:
    secrets = f"""
        def get(name):
            assert name == "HF_TOKEN"
            return {SECRET!r}
        """
    place = Place("colab", limits=True, AIRLLM_NB_DEMO_MODEL=str(model), COLAB_RELEASE_TAG="release-colab",
                  IPYTHONDIR=profile(tmp_path), HOME=str(tmp_path),
                  PYTHONPATH=modules(tmp_path, {"google/colab/userdata.py": secrets}))  # fmt: skip
    texts = execute("colab_t4", place, tmp_path, after=LIMITED)
    assert ast.literal_eval(texts["after"].strip()) == (int(12.7 * 2**30), 1 << 16, True), "the limits were in force"
    assert texts["place"] == "Google Colab\n"
    assert "none: the CPU computes" in texts["machine"]
    check_a_free_notebook(texts, model, tmp_path / ".cache" / "airllm_nb")
    assert list((tmp_path / ".cache" / "airllm_nb").rglob("manifest.json"))


def test_kaggle_t4(model: Path, tmp_path: Path) -> None:
    secrets = f"""
        class UserSecretsClient:
            def get_secret(self, name):
                assert name == "HF_TOKEN"
                return {SECRET!r}
        """
    place = Place("kaggle", limits=True, AIRLLM_NB_DEMO_MODEL=str(model), KAGGLE_KERNEL_RUN_TYPE="Interactive",
                  IPYTHONDIR=profile(tmp_path), TMPDIR=str(tmp_path / "scratch"),
                  PYTHONPATH=modules(tmp_path, {"kaggle_secrets.py": secrets}))  # fmt: skip
    (tmp_path / "scratch").mkdir()
    delete = sources("kaggle_t4")["files"].replace("DELETE = False", "DELETE = True")
    texts = execute("kaggle_t4", place, tmp_path, after=delete)
    assert texts["place"] == "Kaggle\n"
    assert f"GB for models in {tmp_path / 'scratch'}" in texts["machine"]
    check_a_free_notebook(texts, model, tmp_path / "scratch" / "airllm_nb")
    assert "4-bit copy: 0.1 GB" in texts["after"]
    assert not list((tmp_path / "scratch").rglob("manifest.json")) and (model / "config.json").exists()


def check_a_free_notebook(texts: dict[str, str], model: Path, stores: Path) -> None:
    assert texts["token"] == ""
    assert texts["choose"].endswith(f"-> {model}\n")
    assert "the plan" in texts["plan"] and f"of {RAM[0]}.0 GiB" in texts["plan"]
    assert "an answer of 100 words will take about" in texts["plan"]
    assert "float16" in texts["load"] and "4bit" in texts["load"]
    assert "32 tokens" in texts["ask"] and "predicted" in texts["ask"] and "blue" in texts["ask"]
    assert "compute" in texts["trace"]
    assert "closed" in texts["files"] and f"4-bit copy: 0.1 GB in {stores}" in texts["files"]


@pytest.mark.parametrize("name", ["colab_t4", "kaggle_t4"])
def test_a_new_machine_gets_the_package_and_keeps_the_rest(name: str, tmp_path: Path) -> None:
    """With a pip that only writes down what it was asked for."""
    hidden = """
        import pathlib, sys

        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name == "airllm_nb" and not pathlib.Path("installed").exists():
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Hidden())
        """
    pip = "import pathlib, sys\npathlib.Path('installed').write_text(repr(sys.argv[1:]))"
    place = Place(name.removesuffix("_t4"), IPYTHONDIR=profile(tmp_path, textwrap.dedent(hidden)),
                  PYTHONPATH=modules(tmp_path, {"pip/__init__.py": "", "pip/__main__.py": pip}))  # fmt: skip
    cell = nbformat.v4.new_code_cell(sources(name)["place"])
    client = client_of(nbformat.v4.new_notebook(cells=[cell]), place, tmp_path)
    with client.setup_kernel(cleanup_kc=True):
        # Expected to fail: else a kernel drops what is asked of it just after an error, and the next cell with it.
        cell.metadata.tags = ["raises-exception"]
        client.execute_cell(cell, 0)
        assert "write the repository's owner" in cell.outputs[-1].evalue
        del cell.metadata["tags"]
        cell.source = cell.source.replace("/<owner>/", "/someone/", 1)
        client.execute_cell(cell, 0)
        asked = ast.literal_eval((tmp_path / "installed").read_text("utf-8"))
        (tmp_path / "installed").unlink()
        client.execute_cell(cell, 0)
    assert not (tmp_path / "installed").exists(), "it is there now: nothing is installed"
    assert asked[0] == "install" and asked[2].endswith("/someone/airllm_nb")
    assert [word.partition("==")[0] for word in asked[3:]] == ["torch", "ipython", "ipykernel", "ipywidgets"]
    assert "ipykernel==6.17.1" in asked and "ipython==7.34.0" in asked
    assert not {"-U", "--upgrade"} & set(asked)


CHOICES = {  # GB free: what is chosen
    30: "-> Qwen/Qwen2.5-7B-Instruct",
    60: "-> Qwen/Qwen2.5-14B-Instruct",
    78: "-> Qwen/Qwen2.5-14B-Instruct",
    108: "-> Qwen/Qwen2.5-32B-Instruct",
    250: "-> Qwen/Qwen2.5-72B-Instruct",
    20: "-> the sample",
}


def test_the_model_is_chosen_by_the_disk(tmp_path: Path) -> None:
    """On a T4, without a model of ours; Kaggle's disk is what Kaggle gives, whatever the host's is."""
    cells = sources("colab_t4")
    texts = cells_alone("colab", tmp_path, T4, "colab_t4", *(
        source for free in CHOICES for source in (
            f"import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free={free}e9)",
            "import airllm_nb; airllm_nb.sample_model = lambda: 'the sample'",
            cells["machine"], cells["choose"],
        )
    ))  # fmt: skip
    assert "Tesla T4, 15.0 GiB" in texts[2]
    assert [text.splitlines()[-1] for text in texts[3::4]] == list(CHOICES.values())
    assert "72B-Instruct: 145.4 GB and 44.5 GB do not fit" in texts[3]


def test_a_gpu_that_torch_cannot_use_and_a_disk_that_is_not_ours(tmp_path: Path) -> None:
    cells = sources("kaggle_t4")
    lie = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=8e12)"
    texts = cells_alone("kaggle", tmp_path, P100, "kaggle_t4", lie, cells["machine"], cells["choose"], "print(device)")
    assert "P100-PCIE-16GB (sm_60), too old for this torch (sm_75 and newer)" in texts[1]
    assert "disk  62 GB" in texts[1] and texts[2].endswith("-> Qwen/Qwen2.5-14B-Instruct\n")
    assert texts[3] == "cpu\n"


def cells_alone(place: str, folder: Path, startup: str, name: str, *code: str) -> list[str]:
    """The first cell of a notebook, then these, in one kernel; returns what each of these printed."""
    environ = {"COLAB_RELEASE_TAG" if place == "colab" else "KAGGLE_KERNEL_RUN_TYPE": "x", "TMPDIR": str(folder)}
    cells = [nbformat.v4.new_code_cell(source) for source in (sources(name)["place"], *code)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client_of(notebook, Place(place, IPYTHONDIR=profile(folder, startup), **environ), folder).execute(cleanup_kc=True)
    return [text_of(cell) for cell in notebook.cells[1:]]


QWEN = {  # hidden, MLP, layers, heads, key/value heads of Qwen2.5
    "7B": (3584, 18944, 28, 28, 4),
    "14B": (5120, 13824, 48, 40, 8),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}


@pytest.mark.parametrize("name", ["colab_t4", "kaggle_t4"])
def test_the_sizes_are_those_of_the_models(name: str) -> None:
    source = sources(name)["choose"]
    table = ast.literal_eval(source[source.index("{") : source.index("}") + 1])
    assert list(table) == [f"Qwen/Qwen2.5-{size}-Instruct" for size in reversed(QWEN)]
    for size, (hidden, mlp, layers, heads, kv_heads) in QWEN.items():
        linear = layers * hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * mlp)
        tables = 2 * 152_064 * hidden
        wanted = 2 * (linear + tables) / 1e9, (linear * (1 / 2 + 4 / 64) + 2 * tables) / 1e9
        assert table[f"Qwen/Qwen2.5-{size}-Instruct"] == pytest.approx(wanted, rel=0.01)
