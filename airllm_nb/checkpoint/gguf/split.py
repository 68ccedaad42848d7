"""The names of GGUF files that are one model in several parts, as ``llama-gguf-split`` gives them: pure functions."""

from __future__ import annotations

import re

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def part_names(name: str) -> tuple[str, ...]:
    """All parts of the model that ``name`` is a part of, in order; ``name`` alone where it is a whole one."""
    found = _PART.search(name)
    count = int(found[1]) if found else 1
    if found is None or count < 2:
        return (name,)
    return tuple(f"{name[: found.start()]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def whole_name(name: str) -> str:
    """``"m-Q8_0.gguf"`` of ``"m-Q8_0-00001-of-00003.gguf"``."""
    return _PART.sub(".gguf", name)
