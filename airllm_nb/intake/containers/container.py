"""What weight files of one kind answer on the way from a name to bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...checkpoint.sizes import Holds
from ...checkpoint.source import Source
from ...encoding.base import Encoded
from ...progress import ProgressCallback
from ...tensors.index import TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Weights:
    """Where to read: config and tokenizer from ``folder``, parameters from ``tensors`` (by native name).

    Those that lie packed in the checkpoint are in ``packed`` instead.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    packed: Mapping[str, Encoded] = field(default_factory=dict)

    @property
    def folders(self) -> set[Path]:
        """What is read, and must not be removed meanwhile."""
        parts = (part for weight in self.packed.values() for part in weight.parts.values())
        infos = [*self.tensors.values(), *parts]
        return {self.folder, *(extent.path.parent for info in infos for extent in info.extents)}


class ToWrite(NamedTuple):
    """What must be on the disk beside the weight files before the model can run.

    Attributes
    ----------
    whole
        Whether all weights are written as plain safetensors first, because the files cannot be read in place.
    once
        The names of the weights that are written, beside others that are read in place.
    encoded
        Whether a compressed store is made of all of them.
    """

    whole: bool = False
    once: tuple[str, ...] = ()
    encoded: bool = False


class Container(Protocol):
    """Weight files of one kind; they may be on the Hub still, with headers that say what they hold."""

    source: Source
    # Whether weights that are packed can be unpacked first, to be compressed in another way.
    repacks: bool

    @property
    def packed_as(self) -> str:
        """How the weights are packed, for people; empty where they are plain."""

    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of the first weights of floating point, as transformers chooses; ``None`` if nobody says."""

    def holds(self) -> Holds | None:
        """What the weight files hold; ``None`` where no header says it."""

    def in_place(self, skeleton: Any) -> Weights | None:
        """The parameters that are read where they lie; ``None`` where unknown, or all are written first.

        Raises
        ------
        UnsupportedModelError
            If the layout cannot be streamed.
        """

    def written_once(self, dtype: torch.dtype) -> tuple[str, ...]:
        """The parameters that cannot be among them."""

    def to_write(self, dtype: torch.dtype, encoded: bool) -> ToWrite:
        """What is written before the model computes in ``dtype``, on weights that are ``encoded`` or not."""

    def rewrite(
        self, folder: Path, names: tuple[str, ...], plain: Mapping[str, TensorInfo], dtype: torch.dtype,
        progress: ProgressCallback,
    ) -> None:  # fmt: skip
        """Write a store of plain weights into ``folder``; the files must be here.

        Parameters
        ----------
        names
            Of those that are written once; where there are none, all are written.
        plain
            Parameters by native name that are read in place.
        """

    def native(self, index: Mapping[str, TensorInfo], skeleton: Any) -> Weights | None:
        """The tensors of these files, or of what :meth:`rewrite` made of them, by the names of the model."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
