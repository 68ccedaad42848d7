"""Integers of 2, 3, 4 or 8 bits, packed into 32-bit words from the lowest bits on; those of 3 bits into three words."""

from __future__ import annotations

import functools

import torch


def select_rows(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of bytes, eight at a time where that goes."""
    wide = values.view(torch.int64) if values.shape[1] % 8 == 0 else values
    return wide.index_select(0, order).view(values.dtype)


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
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


def word_values(bits: int) -> int:
    """Values that fill whole words."""
    return 32 if bits == 3 else 32 // bits
