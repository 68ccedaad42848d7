"""SmolLM2-135M-Instruct for tests: the real weights, fetched once and shared by every run on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from airllm_nb.checkpoint.gguf.weights import convert_gguf
from airllm_nb.checkpoint.hub.sample import sample_gguf
from airllm_nb.config import LoadOptions
from airllm_nb.intake.find.resolve import resolve


def smollm2_gguf() -> Path:
    """``SmolLM2-135M-Instruct.Q4_1.gguf``."""
    return sample_gguf(cache())


def smollm2_folder(dtype: str = "bfloat16") -> Path:
    """The same as a Hugging Face folder of ``"bfloat16"`` or ``"float32"``. Shared: copy it before you change it."""
    source = resolve(smollm2_gguf(), LoadOptions())
    return convert_gguf(source, cache() / f"{source.name}-{dtype}-{source.fingerprint[:8]}", dtype)


def cache() -> Path:
    """Where tests keep what they fetched."""
    # Not config.cache_dir(): a test session has that in a folder of its own, and this should outlive the session.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "airllm_nb" / "tests"


gguf, folder = smollm2_gguf, smollm2_folder
