"""GPTQ: 2, 3, 4 or 8 bits a value, packed along the input into 32-bit words, a scale and a zero point for each group.

``qweight`` is ``[in · bits / 32, out]``, ``qzeros`` ``[groups, out · bits / 32]``, ``scales`` ``[groups, out]`` and
``g_idx``, where the input was put in order of activation, ``[in]``: the group of each input
(https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/ModelCloud/GPTQModel).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..tensors.index import TensorInfo
from .base import Encoded, Encoding, Parts, affine, row_chunks, stored
from .kernels import launch
from .words import select_rows, unpack_words, word_values

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # → what is added to zero points as they are stored
_FLOATS = {"F16", "BF16", "F32"}


@dataclass(frozen=True)
class GPTQ(Encoding):
    """``(value - zero) · scale``.

    Attributes
    ----------
    bits
        Of a value.
    group
        Inputs that follow one another and share a scale, if there is no part ``group_index``.
    offset
        What is added to zero points as they are stored.
    is_interleaved
        Whether the outputs in a word are in AWQ's order.
    even
        Where there is a part ``group_index``, whether it gives every group just ``group`` inputs.
    """

    transposed: bool = field(default=True, kw_only=True)
    kernel: ClassVar[str] = "words"
    is_interleaved: ClassVar[bool] = False

    bits: int
    group: int
    offset: int
    even: bool | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.bits}-bit"

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        if launch.unpack(self, parts, out):
            return
        words, scale = parts["weight"], parts["scale"].float()
        minimum = self._zeros(parts["zeros"])[:, : scale.shape[1]].float().mul_(scale).neg_()
        groups, unit = parts.get("group_index"), word_values(self.bits)
        if groups is None and self.group % unit == 0:
            for rows in group_chunks(out, self.group, unit, self.spare):
                group_affine(self._values(words, rows), scale, minimum, out, rows, self.group)
        elif groups is not None and self.even and out.device.type != "cpu":
            self._unpack_even(words, scale, minimum, groups, out)
        else:
            groups = torch.arange(out.shape[0], device=out.device) // self.group if groups is None else groups
            for rows in row_chunks(out.shape[0], 4 * out.shape[1], out.device, unit):
                group = groups[rows]
                of_rows = scale.index_select(0, group), minimum.index_select(0, group)
                affine(self._values(words, rows), *of_rows, out[rows])
                del of_rows  # before the next are made

    def _unpack_even(
        self, words: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, groups: torch.Tensor, out: torch.Tensor
    ) -> None:
        """In order of the groups, and back: half the bytes of gathering scales, though slower on a processor."""
        order = torch.argsort(groups, stable=True)
        for columns in row_chunks(out.shape[1], out.shape[0], out.device, 8, self.spare):
            into = out[:, columns]
            values = select_rows(self._values(words[:, columns], slice(0, len(out))), order)
            ordered = torch.empty_like(into, memory_format=torch.contiguous_format)
            group_affine(values, scale[:, columns], minimum[:, columns], ordered, slice(0, len(out)), self.group)
            into.index_copy_(0, order, ordered)
            del values, ordered  # before the next are made

    @property
    def spare(self) -> float:  # type: ignore[override]
        if self.even is False or self.group % word_values(self.bits):
            return 4 * Encoding.spare
        return 6.5 if self.even else 5.5 if self.bits == 3 else 1.5

    def whole_bytes(self, values: int) -> int:
        return 11 * -(-values // self.group)  # scales and minimums in float32, while zero points are unpacked

    def _values(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        """``[rows, out]`` of uint8."""
        return unpack_words(words[rows.start * self.bits // 32 : rows.stop * self.bits // 32], self.bits, 1)

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """``[groups, out]`` of uint8."""
        if self.offset == 0:
            return unpack_words(words, self.bits, 2)
        if self.bits == 3:
            return (unpack_words(words, 3, 2) + 1).bitwise_and_(7)
        # Whole words, as GPTQModel took it away: where a zero point is 0, it has borrowed from the next one.
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        return unpack_words(words + ones, self.bits, 2)


def group_chunks(out: torch.Tensor, group: int, unit: int, spare: float = Encoding.spare) -> Iterator[slice]:
    """Rows of ``out`` to unpack at once: whole groups, or a part of one. ``group`` is a multiple of ``unit``."""
    (rows, columns), device = out.shape, out.device
    if group <= next(row_chunks(rows, columns, device, unit, spare)).stop:
        yield from row_chunks(rows, columns, device, group, spare)
        return
    for first in range(0, rows, group):
        for part in row_chunks(min(group, rows - first), columns, device, unit, spare):
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
) -> dict[str, Encoded]:
    """Every packed weight of a checkpoint by the name of its matrix, ``"….weight"``.

    Raises
    ------
    CheckpointError
        If the tensors of a matrix do not fit one another.
    UnsupportedModelError
        If a matrix lies otherwise than the model wants it.
    """
    stems = [name.removesuffix(".qweight") for name in index if name.endswith(".qweight")]
    made = {f"{stem}.weight": _packed(stem, settings, index, shapes.get(f"{stem}.weight")) for stem in stems}
    # All or none, so that matrices of both kinds can be stacked.
    is_ordered = any(says_more for _, says_more in made.values())
    return {name: packed if is_ordered else _without_order(packed) for name, (packed, _) in made.items()}


def _packed(
    stem: str, settings: Mapping[str, Any], index: Mapping[str, TensorInfo], native: tuple[int, ...] | None
) -> tuple[Encoded, bool]:
    """A matrix with its ``g_idx``, and whether that says more than that groups follow one another."""
    parts = {"weight": index[f"{stem}.qweight"], **related(stem, index)}
    weight, zeros, scale = parts["weight"], parts["zeros"], parts["scale"]
    (groups, rows), words = scale.shape, weight.shape[0]
    # Single matrices may have other bits and groups than the settings say; what lies there tells.
    likely = dict.fromkeys((settings.get("bits", 4), *_BITS))
    whole = {bits: -(-rows // word_values(bits)) * word_values(bits) for bits in likely}
    bits = next((bits for bits in likely if zeros.shape[1] == whole[bits] * bits // 32), 0)
    columns = words * 32 // bits if bits else 0
    fits = bits and groups and words * 32 % (bits * word_values(bits)) == 0
    if not fits or weight.shape[1] != rows or zeros.shape[0] != groups:
        raise misfit(stem, parts)
    if native is not None and native != (rows, columns):
        raise UnsupportedModelError(
            f"{stem}: packed as {[rows, columns]} where the model has {list(native)}; padded matrices and those of "
            "Conv1D layers are not unpacked here"
        )
    group = _group(settings, columns, groups)
    even, says_more = None, False
    if (order := index.get(f"{stem}.g_idx")) is not None:
        if order.shape != (columns,) or order.dtype != "I32":
            raise misfit(stem, parts | {"group_index": order})
        even, says_more = _order(order, group, groups, settings)
        parts["group_index"] = order
    elif groups > 1 and settings.get("desc_act") is True:
        raise _missing(stem, "g_idx")
    if not says_more and -(-columns // group) != groups:
        raise misfit(stem, parts)
    encoding = GPTQ(bits, columns // groups if even else group, _FORMATS[_layout(settings)], even)
    return Encoded((rows, columns), (encoding,), parts), says_more


def _order(info: TensorInfo, group: int, groups: int, settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether ``g_idx`` gives all groups as many inputs, and whether it says more than that they follow one another.

    What it says counts, as it does for the format's libraries. The config is asked where the file is not here.
    """
    if (data := stored(info)) is None:
        return False, settings.get("desc_act") is not False or any(rule.get("desc_act") for rule in _rules(settings))
    order = torch.frombuffer(bytearray(data), dtype=torch.int32)
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise CheckpointError(f"{info.extents[0].path}: {info.name} names groups from {int(order.min())} to "
                              f"{int(order.max())}, of {groups}; download the file again")  # fmt: skip
    even = bool((torch.bincount(order, minlength=groups) * groups == len(order)).all())
    return even, not torch.equal(order, torch.arange(len(order), dtype=torch.int32) // group)


def _without_order(packed: Encoded) -> Encoded:
    parts = {attribute: info for attribute, info in packed.parts.items() if attribute != "group_index"}
    encoding: Any = packed.encodings[0]
    return replace(packed, encodings=(replace(encoding, even=None),), parts=parts)


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


def _rules(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What GPTQModel says of single matrices."""
    rules = settings.get("dynamic")
    return [rule for rule in rules.values() if isinstance(rule, Mapping)] if isinstance(rules, Mapping) else []
