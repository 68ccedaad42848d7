"""AWQ: 4 bits a value, eight outputs in a 32-bit word in an order of their own, a scale and a zero point a group.

``qweight`` is ``[in, out / 8]``, ``qzeros`` ``[groups, out / 8]`` and ``scales`` ``[groups, out]``: the "gemm" version
of https://github.com/casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..errors import UnsupportedModelError
from ..tensors.index import TensorInfo
from .base import Encoded, Encoding, Parts
from .gptq import group_affine, group_chunks, misfit, related
from .kernels import launch


@dataclass(frozen=True)
class AWQ(Encoding):
    """``(value - zero) · scale`` for each ``group`` of inputs."""

    name: ClassVar[str] = "4-bit"
    transposed: bool = field(default=True, kw_only=True)
    spare = 1.5
    kernel: ClassVar[str] = "words"
    bits: ClassVar[int] = 4
    offset: ClassVar[int] = 0
    is_interleaved: ClassVar[bool] = True

    group: int

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        if launch.unpack(self, parts, out):
            return
        words, scale = parts["weight"], parts["scale"].float()
        minimum = _values(parts["zeros"]).float().mul_(scale).neg_()
        for rows in group_chunks(out, self.group, 1, self.spare):
            group_affine(_values(words[rows]), scale, minimum, out, rows, self.group)

    def whole_bytes(self, values: int) -> int:
        return 11 * -(-values // self.group)  # scales and minimums in float32, while zero points are unpacked


def _values(words: torch.Tensor) -> torch.Tensor:
    """``[n, 8 m]`` of uint8 from ``[n, m]`` of int32, whose nibbles are the outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    values = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    (_fill_on_host if words.device.type == "cpu" else _fill_on_device)(words, values)
    return values.flatten(1)


def _fill_on_device(words: torch.Tensor, values: torch.Tensor) -> None:
    """Two kernels: output ``4 a + 2 b + c`` is half ``b`` of byte ``a + 2 c``."""
    data = words.view(torch.uint8).unflatten(1, (-1, 2, 2)).transpose(2, 3)  # [n, m, a, c]
    halves = values.unflatten(2, (2, 2, 2))
    torch.bitwise_and(data, 15, out=halves[:, :, :, 0])
    torch.bitwise_right_shift(data, 4, out=halves[:, :, :, 1])


def _fill_on_host(words: torch.Tensor, values: torch.Tensor) -> None:
    """Whole words, which a processor takes many of at once: two neighbours lie 16 bits apart."""
    pairs = values.view(torch.int16)
    for i in range(4):
        pair = (words >> 4 * i).bitwise_and_(0x000F000F)
        pairs[:, :, i].copy_(pair | pair >> 8)


def check(settings: Mapping[str, Any]) -> None:
    """Refuse what is not unpacked here.

    Raises
    ------
    UnsupportedModelError
        If the version or the number of bits is another one.
    """
    fields = (settings.get(name) for name in ("version", "checkpoint_format", "format"))
    version = next((str(value).lower() for value in fields if value), "gemm")
    if settings.get("backend") == "llm-awq":
        version = "llm-awq"
    if version != "gemm":
        raise UnsupportedModelError(
            f"AWQ checkpoints of version {version!r} are laid out for one kernel and cannot be unpacked here; use the "
            "same model in version 'gemm'"
        )
    if (bits := settings.get("bits", settings.get("w_bit", 4))) != 4:
        raise UnsupportedModelError(f"AWQ with {bits} bits cannot be unpacked here; 4 bits can")


def find(
    settings: Mapping[str, Any], index: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Encoded]:
    """Every packed weight of a checkpoint by the name of its matrix, ``"….weight"``.

    Raises
    ------
    CheckpointError
        If the tensors of a matrix do not fit one another, or are not what the model wants.
    """
    found = {}
    for name in index:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        parts = {"weight": index[name], **related(stem, index)}
        (columns, words), (groups, rows) = parts["weight"].shape, parts["scale"].shape
        fits = words * 8 == rows and parts["zeros"].shape == (groups, words) and groups and columns % groups == 0
        if not fits or shapes.get(f"{stem}.weight", (rows, columns)) != (rows, columns):
            raise misfit(stem, parts)
        found[f"{stem}.weight"] = Encoded((rows, columns), (AWQ(columns // groups),), parts)
    return found
