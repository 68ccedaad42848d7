"""The whole session runs offline, on two threads, with every cache in a folder of its own; models come as fixtures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before anything imports torch or huggingface_hub, which read them once; subprocesses and kernels inherit them.
_HOME = Path(tempfile.mkdtemp(prefix="airllm-nb-tests-"))
_THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else str(min(2, os.cpu_count() or 1))
os.environ.update(
    OMP_NUM_THREADS=_THREADS,
    MKL_NUM_THREADS=_THREADS,
    # Threads that wait by spinning are many times slower where anything else uses the cores.
    OMP_WAIT_POLICY="PASSIVE",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=str(_HOME / "huggingface"),
    AIRLLM_NB_CACHE=str(_HOME / "airllm_nb"),
    IPYTHONDIR=str(_HOME / "ipython"),
    JUPYTER_CONFIG_DIR=str(_HOME / "jupyter" / "config"),
    JUPYTER_DATA_DIR=str(_HOME / "jupyter" / "data"),
    JUPYTER_RUNTIME_DIR=str(_HOME / "jupyter" / "runtime"),
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(_name, None)

# As a terminal gives them: what a shell runs in the background has Ctrl-C ignored, and so have all that it starts. A
# handler of ours is the default again in a program that is started.
if threading.current_thread() is threading.main_thread():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_sessionstart() -> None:
    """Under the floor's overlay (``make test-floor``), refuse to test another version than the one that is meant."""
    if expected := os.environ.get("AIRLLM_NB_EXPECT_TRANSFORMERS"):
        from importlib.metadata import version

        if (found := version("transformers")) != expected:
            pytest.exit(f"these tests are for transformers {expected}, but {found} is what Python finds", returncode=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that take minutes begin first, so that no process is left with one at the end.
    items.sort(key=lambda item: item.path.parent.name not in ("notebook", "whole"))
    missing: dict[str, str | None] = {}
    for item in items:
        for marker, reason in (("gpu", _no_gpu), ("browser", _no_browser)):
            if item.get_closest_marker(marker):
                if marker not in missing:
                    missing[marker] = reason()
                if text := missing[marker]:
                    item.add_marker(pytest.mark.skip(reason=text))


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _no_browser() -> str | None:
    import lab

    # In CI the tests run, and fail with the reason.
    return None if os.environ.get("CI") == "true" else lab.missing()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes on one thread: tiny matrices gain nothing from a second, and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub_env(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """``hub_env("http://127.0.0.1:1234")``: the environment of a subprocess that may ask this one hub, and no other."""

    def environment(endpoint: str) -> dict[str, str]:
        assert endpoint.startswith(("http://127.0.0.1:", "http://localhost:")), "tests stay on this machine"
        return os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub-home")}

    return environment


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file (real weights, Q4_1). Shared: do not write beside it."""
    import smollm2

    return Path(smollm2.smollm2_gguf())


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The same model as a Hugging Face folder in bfloat16. Shared: copy it before you change it."""
    import smollm2

    return Path(smollm2.smollm2_folder())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of a type, saved once for a test file."""
    import tiny_models

    made: dict[str, Path] = {}

    def factory(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_models.save_tiny(kind, made[kind])
        return made[kind]

    return factory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """``tiny_llama(tied=…, dtype=…, shards=…, seed=…, **config)``: a folder with a random Llama and its tokenizer.

    Equal options give the same folder, made once a session: copy it before you change it.
    """
    made: dict[str, Path] = {}

    def factory(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in made:
            made[key] = _save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), **options)
        return made[key]

    yield factory
    for folder in made.values():
        shutil.rmtree(folder, ignore_errors=True)


def _save_tiny_llama(
    folder: Path, *, tied: bool = False, dtype: str = "float32", shards: int = 1, seed: int = 0, **config: Any
) -> Path:
    """Four layers of 64, four heads over two key/value heads, byte vocabulary; ``config`` overrides any of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer()
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tied,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings | config)).to(getattr(torch, dtype))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_shards(model, folder, shards)
    return folder


def _save_shards(model: Any, folder: Path, shards: int) -> None:
    """Exactly ``shards`` safetensors files (save_pretrained only takes an upper size), with the index if several."""
    from safetensors.torch import save_file

    shared = set(getattr(model, "all_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in shared}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    files = {
        name: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _byte_tokenizer() -> Any:
    """One token a byte and four special ones, so that every text has ids below 260 and comes back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
