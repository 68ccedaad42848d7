"""GPTQ: 2, 3, 4 or 8 bits a value, packed along the input into 32-bit words, a scale and a zero point for each group.

``qweight`` is ``[in · bits / 32, out]``, ``qzeros`` ``[groups, out · bits / 32]``, ``scales`` ``[groups, out]`` and
``g_idx``, where the input was put in order of activation, ``[in]``: the group of each input
(https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/ModelCloud/GPTQModel).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...errors import CheckpointError, UnsupportedModelError
from ..index import TensorInfo
from .packing import Packed, Packing, affine, row_chunks

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # → what is added to zero points as they are stored
_FLOATS = {"F16", "BF16", "F32"}


@dataclass(frozen=True)
class GPTQ(Packing):
    """``(value - zero) · scale``.

    Attributes
    ----------
    bits
        Of a value.
    group
        Inputs that follow one another and share a scale, if there is no part ``group_index``.
    offset
        What is added to zero points as they are stored.
    """

    transposed: ClassVar[bool] = True

    bits: int
    group: int
    offset: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.bits}-bit"

    def unpack(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        words, scale = parts["weight"], parts["scale"].float()
        minimum = self._zeros(parts["zeros"])[:, : scale.shape[1]].float().mul_(scale).neg_()
        groups, unit = parts.get("group_index"), _unit(self.bits)
        if groups is None and self.group % unit:
            groups = torch.arange(out.shape[0], device=out.device) // self.group
        if groups is None:
            for rows in group_chunks(out, self.group, unit):
                group_affine(self._values(words, rows), scale, minimum, out, rows, self.group)
            return
        for rows in row_chunks(out.shape[0], 4 * out.shape[1], out.device, unit):  # each value takes two floats more
            group = groups[rows]
            affine(self._values(words, rows), scale.index_select(0, group), minimum.index_select(0, group), out[rows])

    def _values(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        """``[rows, out]`` of uint8."""
        return _unpack_words(words[rows.start * self.bits // 32 : rows.stop * self.bits // 32], self.bits, 1)

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """``[groups, out]`` of uint8."""
        if self.offset == 0:
            return _unpack_words(words, self.bits, 2)
        if self.bits == 3:
            return (_unpack_words(words, 3, 2) + 1).bitwise_and_(7)
        # Whole words, as GPTQModel took it away: where a zero point is 0, it has borrowed from the next one.
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        return _unpack_words(words + ones, self.bits, 2)


def _unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The values in 32-bit words ``[n, m]``, as uint8: one below the other (``dim=1``) or beside it (``dim=2``)."""
    values = _unpack_three_bits(words, dim) if bits == 3 else _unpack_bytes(words, bits, dim)
    return values.flatten(0, -2) if dim == 1 else values.flatten(1)


def _unpack_bytes(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """``[n, 4, values of a byte, m]`` or ``[n, m, 4, values of a byte]``.

    In bytes throughout: no wider integers are made, and a GPU shifts in the dtype of ``out``, whatever the input's is.
    """
    data = words.view(torch.uint8).unflatten(1, (-1, 4))
    if dim == 1:
        data = data.transpose(1, 2)
        if data.device.type == "cpu":
            data = data.contiguous()  # twice as fast there as to read it so each time
    values = _empty_like(data, dim + 1, 8 // bits)
    for i in range(8 // bits):
        field = values.select(dim + 1, i)
        if i == 0:
            torch.bitwise_and(data, (1 << bits) - 1, out=field)
        else:
            torch.bitwise_right_shift(data, i * bits, out=field)
            if (i + 1) * bits < 8:
                field.bitwise_and_((1 << bits) - 1)
    return values


def _unpack_three_bits(words: torch.Tensor, dim: int) -> torch.Tensor:
    """``[n, 32, m]`` or ``[n, m, 32]``: three words hold 32 values, of which 10 and 21 lie across two words."""
    words = words.unflatten(dim - 1, (-1, 3))
    first, second, third = words.unbind(dim)
    values = _empty_like(first, dim, 32)
    for word, start, begin, count in ((first, 0, 0, 11), (second, 11, 1, 11), (third, 22, 2, 10)):
        at = _shifts(range(begin, begin + 3 * count, 3), words.device)
        fields = word.unsqueeze(dim) >> (at.view(-1, 1) if dim == 1 else at)
        values.narrow(dim, start, count).copy_(fields)
    values.bitwise_and_(7)
    values.select(dim, 10).bitwise_and_(3).bitwise_or_(((second & 1) << 2).to(torch.uint8))
    values.select(dim, 21).bitwise_and_(1).bitwise_or_(((third & 3) << 1).to(torch.uint8))
    return values


def _empty_like(tensor: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    shape = (*tensor.shape[:dim], count, *tensor.shape[dim:])
    return torch.empty(shape, dtype=torch.uint8, device=tensor.device)


@functools.cache
def _shifts(values: range, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _unit(bits: int) -> int:
    """Values that fill whole words."""
    return 32 if bits == 3 else 32 // bits


def group_chunks(out: torch.Tensor, group: int, unit: int) -> Iterator[slice]:
    """Rows of ``out`` to unpack at once: whole groups, or a part of one. ``group`` is a multiple of ``unit``."""
    (rows, columns), device = out.shape, out.device
    if group <= next(row_chunks(rows, columns, device, unit)).stop:
        yield from row_chunks(rows, columns, device, group)
        return
    for first in range(0, rows, group):
        for part in row_chunks(min(group, rows - first), columns, device, unit):
            yield slice(first + part.start, first + part.stop)


def group_affine(
    values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, out: torch.Tensor, rows: slice, group: int
) -> None:
    """Dequantise the ``rows`` that :func:`group_chunks` gave; ``scale`` and ``minimum`` are ``[groups, columns]``."""
    first, whole, out = rows.start // group, len(values) // group, out[rows]
    last, tail = first + whole, whole * group
    if whole:
        affine(
            values[:tail].unflatten(0, (whole, group)),
            scale[first:last, None],
            minimum[first:last, None],
            out[:tail].unflatten(0, (whole, group)),
        )
    if tail < len(values):
        affine(values[tail:], scale[last], minimum[last], out[tail:])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def check(settings: Mapping[str, Any]) -> None:
    """Refuse what is not unpacked here.

    Raises
    ------
    UnsupportedModelError
        If the words are of another layout.
    """
    layout = _layout(settings)
    if settings.get("is_marlin_format") or layout not in _FORMATS:
        layout = "marlin" if settings.get("is_marlin_format") else layout
        raise UnsupportedModelError(
            f"GPTQ checkpoints of format {layout!r} are laid out for one kernel and cannot be unpacked here; use the "
            "same model in format 'gptq' or 'gptq_v2'"
        )
    for rule in (settings, *_rules(settings)):
        if type(bits := rule.get("bits", 4)) is not int or bits not in _BITS:
            raise UnsupportedModelError(f"GPTQ with {bits} bits cannot be unpacked here; 2, 3, 4 and 8 bits can")
    if (word := str(settings.get("pack_dtype") or "int32").removeprefix("torch.")) != "int32":
        raise UnsupportedModelError(f"GPTQ packed into words of {word} cannot be unpacked here; int32 can")


def find(
    settings: Mapping[str, Any], index: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Packed]:
    """Every packed weight of a checkpoint by the name of its matrix, ``"….weight"``.

    Raises
    ------
    CheckpointError
        If the tensors of a matrix do not fit one another.
    UnsupportedModelError
        If a matrix lies otherwise than the model wants it.
    """
    stems = [name.removesuffix(".qweight") for name in index if name.endswith(".qweight")]
    return {f"{stem}.weight": _packed(stem, settings, index, shapes.get(f"{stem}.weight")) for stem in stems}


def _packed(
    stem: str, settings: Mapping[str, Any], index: Mapping[str, TensorInfo], native: tuple[int, ...] | None
) -> Packed:
    parts = {"weight": index[f"{stem}.qweight"], **related(stem, index)}
    weight, zeros, scale = parts["weight"], parts["zeros"], parts["scale"]
    (groups, rows), words = scale.shape, weight.shape[0]
    # Single matrices may have other bits and groups than the settings say; what lies there tells.
    likely = dict.fromkeys((settings.get("bits", 4), *_BITS))
    bits = next((bits for bits in likely if zeros.shape[1] == -(-rows // _unit(bits)) * _unit(bits) * bits // 32), 0)
    columns = words * 32 // bits if bits else 0
    fits = bits and groups and words * 32 % (bits * _unit(bits)) == 0
    if not fits or weight.shape[1] != rows or zeros.shape[0] != groups:
        raise misfit(stem, parts)
    if native is not None and native != (rows, columns):
        raise UnsupportedModelError(
            f"{stem}: packed as {[rows, columns]} where the model has {list(native)}; padded matrices and those of "
            "Conv1D layers are not unpacked here"
        )
    group = _group(settings, columns, groups)
    if (order := index.get(f"{stem}.g_idx")) and _may_be_ordered(settings):
        if order.shape != (columns,) or order.dtype != "I32":
            raise misfit(stem, parts | {"group_index": order})
        parts["group_index"] = order
    elif order is None and groups > 1 and settings.get("desc_act") is True:
        raise _missing(stem, "g_idx")
    elif -(-columns // group) != groups:
        raise misfit(stem, parts)
    return Packed((rows, columns), (GPTQ(bits, group, _FORMATS[_layout(settings)]),), parts)


def related(stem: str, index: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """``zeros`` and ``scale`` of a packed matrix, of two dimensions each, as its ``qweight`` is."""
    parts = {}
    for attribute, suffix in (("zeros", "qzeros"), ("scale", "scales")):
        if (info := index.get(f"{stem}.{suffix}")) is None:
            raise _missing(stem, suffix)
        parts[attribute] = info
    wanted = {f"{stem}.qweight": {"I32"}, f"{stem}.qzeros": {"I32"}, f"{stem}.scales": _FLOATS}
    if any(len(index[name].shape) != 2 or index[name].dtype not in dtypes for name, dtypes in wanted.items()):
        raise misfit(stem, {"weight": index[f"{stem}.qweight"], **parts})
    return parts


def _missing(stem: str, suffix: str) -> CheckpointError:
    return CheckpointError(f"{stem}.{suffix} is missing beside {stem}.qweight; download the checkpoint again")


def misfit(stem: str, parts: Mapping[str, TensorInfo]) -> CheckpointError:
    found = ", ".join(f"{info.name.rpartition('.')[2]} {info.dtype} {list(info.shape)}" for info in parts.values())
    return CheckpointError(f"{stem}: its packed tensors do not fit one another ({found}); download the files again")


def _layout(settings: Mapping[str, Any]) -> str:
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()


def _group(settings: Mapping[str, Any], columns: int, groups: int) -> int:
    size = settings.get("group_size")
    if isinstance(size, int) and size > 0 and -(-columns // size) == groups:
        return size  # the last group may be shorter
    return max(columns // max(groups, 1), 1)


def _may_be_ordered(settings: Mapping[str, Any]) -> bool:
    """Whether ``g_idx`` may say more than that groups follow one another."""
    return settings.get("desc_act") is not False or any(rule.get("desc_act") for rule in _rules(settings))


def _rules(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What GPTQModel says of single matrices."""
    rules = settings.get("dynamic")
    return [rule for rule in rules.values() if isinstance(rule, Mapping)] if isinstance(rules, Mapping) else []
