"""A checkpoint on this machine: what is known of it, its config, and where a store of it goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import LoadOptions, cache_dir
from ..disk import read_json
from ..errors import CheckpointError
from ..store.names import StoreName

Format = Literal["safetensors", "bin", "gguf"]


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is on this machine.

    Attributes
    ----------
    name
        Short name for people and for folder names.
    folder
        Where config and tokenizer are (for GGUF: the folder of the file).
    format
        ``"safetensors"``, ``"bin"`` or ``"gguf"``.
    files
        The weight files; empty when the weights were not asked for and are not here.
    nbytes
        Size of the weight files, also of those that are not here yet; 0 when unknown.
    fingerprint
        Changes when the weights change: by what is in the files on the Hub, or names, sizes and times of local files.
    gguf_file, repo_id, revision
        Where they apply; ``revision`` is the commit hash.
    wanted
        Of a Hub id, the names of all weight files in ``folder``, also of those that are not here.
    missing
        How many of ``nbytes`` are not here yet; ``None`` when unknown.
    header
        Of a GGUF file that is not here, a file as long as that one with its header alone: good for its config and its
        table of tensors, and for nothing else.
    why
        Where there were several files to choose from: what was taken and why, one line for people.
    """

    name: str
    folder: Path
    format: Format
    files: tuple[Path, ...]
    nbytes: int
    fingerprint: str
    gguf_file: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    wanted: tuple[str, ...] = ()
    missing: int | None = 0
    header: Path | None = None
    why: str = ""

    @property
    def origin(self) -> str:
        """Hub id or path, for people."""
        return self.repo_id or str(self.gguf_file or self.folder)


def read_config(source: Source) -> dict[str, Any]:
    """The checkpoint's config as a dict; of a GGUF file, the native config that it stands for.

    Raises
    ------
    CheckpointError
        If config.json is missing, no JSON object, or names no architecture.
    """
    if gguf := source.gguf_file or source.header:
        from .gguf.header import read_gguf
        from .gguf.weights import gguf_config

        return dict(gguf_config(read_gguf(gguf)).to_dict())
    return config_of(source.folder)


def config_of(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type", ""), str) or not isinstance(config.get("architectures") or [], list):
        raise CheckpointError(f"{folder / 'config.json'} is damaged: model_type should be text and "
                              "architectures a list; download it again")  # fmt: skip
    if not config.get("model_type") and not config.get("architectures"):
        raise CheckpointError(f"{folder / 'config.json'} names no model_type and no architectures; it is not "
                              "the config of a transformers model")  # fmt: skip
    return config


def store_folder(source: Source, codec_name: str | None, dtype: str, options: LoadOptions) -> Path:
    """Where the store of this source goes: one readable, unique name below the user's folder or the cache."""
    # Absolute: the working directory may be another when the weights are read.
    base = Path(options.layer_shards_saving_path or cache_dir()).absolute()
    return base / str(StoreName(source.name, codec_name or "none", dtype, source.fingerprint[:8]))
