"""What a store and its shards are of: the same for what would be written the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from .shard import ShardJob

FORMAT = 1


@dataclass(frozen=True)
class StoreMeta:
    """What a store is of; two stores with equal meta and equal jobs are the same bytes.

    Parameters
    ----------
    codec
        ``"none"``, ``"4bit"`` or ``"8bit"``.
    dtype
        The dtype that the weights were cast to before they were encoded, as in ``"bfloat16"``.
    source
        Fingerprint of the source files.
    """

    codec: str
    dtype: str
    source: str

    @property
    def key(self) -> str:
        return _digest({**asdict(self), "format": FORMAT})


def job_key(job: ShardJob, meta: StoreMeta) -> str:
    """The same for what would be written the same."""
    return _digest({"store": meta.key, "entries": [(e.name, e.dtype, e.shape) for e in job.entries()]})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
