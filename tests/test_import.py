"""``import airllm_nb`` is light: no torch, no transformers, nothing that a notebook waits for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import airllm_nb

HEAVY = {"torch", "transformers", "matplotlib", "IPython", "ipywidgets", "numpy", "bitsandbytes", "huggingface_hub"}


def loaded_after(source: str) -> set[str]:
    """Top-level modules in a fresh interpreter after it ran ``source``."""
    report = "; import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    result = subprocess.run([sys.executable, "-c", source + report], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def seconds_to_run(source: str) -> float:
    """Of a processor, at its best: others use it too."""
    report = "import time; print(time.process_time())"
    runs = [subprocess.run([sys.executable, "-c", source + report], capture_output=True, text=True, check=True).stdout
            for _ in range(5)]  # fmt: skip
    return min(map(float, runs))


@pytest.mark.parametrize("source", ["import airllm_nb", "import airllm_nb; airllm_nb.LoadOptions, dir(airllm_nb)"])
def test_import_loads_nothing_heavy(source: str) -> None:
    assert loaded_after(source) & HEAVY == loaded_after("pass") & HEAVY == set()


def test_import_is_quick() -> None:
    """Compared with a module of the standard library, whatever the processor."""
    assert seconds_to_run("import airllm_nb; ") < seconds_to_run("import asyncio; ")


def test_public_names_are_listed_and_unknown_ones_are_errors() -> None:
    assert {"AutoModel", "__version__", *airllm_nb.__all__} <= set(dir(airllm_nb))
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = airllm_nb.NoSuchThing


def test_every_public_name_resolves() -> None:
    for name in airllm_nb.__all__:
        assert getattr(airllm_nb, name) is not None
