"""Models of the Hub that are on this machine already."""

from __future__ import annotations

from pathlib import Path


def cached_models(folder: Path | None = None) -> list[str]:
    """Hub ids of the cached repositories that have a config, ``"org/name"``, sorted."""
    if folder is None:
        from huggingface_hub import constants

        folder = Path(constants.HF_HUB_CACHE)
    found = {path.parents[2].name for path in folder.glob("models--*/snapshots/*/config.json")}
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in found)
