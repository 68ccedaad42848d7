"""The containers by the format of the weight files: a new one is a module here, and a row."""

from __future__ import annotations

from ...checkpoint.hub.headers import Headers
from ...checkpoint.source import Format, Source
from .bin import Bin
from .container import Container
from .gguf import GGUF
from .safetensors import Safetensors

CONTAINERS: dict[Format, type[Bin | GGUF | Safetensors]] = {"safetensors": Safetensors, "bin": Bin, "gguf": GGUF}


def container_of(source: Source, headers: Headers) -> Container:
    """What reads the weight files of a source."""
    return CONTAINERS[source.format](source, headers)
