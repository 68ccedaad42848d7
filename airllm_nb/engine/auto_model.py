"""``AutoModel.from_pretrained`` with AirLLM's parameters: its notebooks run with only the import changed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..config import LoadOptions
from ..progress import ProgressCallback, silent
from .facade import StreamedModel, open_model


class AutoModel:
    """Opens models; see :meth:`from_pretrained`."""

    def __init__(self) -> None:
        raise TypeError("AutoModel is not made directly; use AutoModel.from_pretrained(model, …)")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, progress: ProgressCallback = silent, **options: Any
    ) -> StreamedModel:
        """Open a model by Hub id (or ``ORG/REPO:FILE.gguf``), local folder or ``.gguf`` file.

        Parameters
        ----------
        pretrained_model_name_or_path
            What to open.
        progress
            Called with :class:`~airllm_nb.progress.Progress` during downloads, conversion and set-up.
        **options
            The fields of :class:`~airllm_nb.config.LoadOptions`; an unknown one is refused by name.
        """
        chosen = LoadOptions.create(**options)
        if chosen.profiling_mode:
            _show_profile()
        return open_model(pretrained_model_name_or_path, chosen, progress=progress)


def _show_profile() -> None:
    """Let the table of each generation reach a script's screen, unless the script has its own logging."""
    log = logging.getLogger("airllm_nb.engine.facade")
    log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
