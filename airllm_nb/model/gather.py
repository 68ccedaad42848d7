"""An embedding table that stays on the host: only the rows of the tokens at hand move to the device."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..tensors.files import Unchanged


def is_gatherable(module: nn.Embedding) -> bool:
    """Whether its forward takes ids and nothing else; learned positions take masks and offsets instead."""
    if type(module).forward is nn.Embedding.forward:
        return True
    return [*inspect.signature(module.forward).parameters] in (["input"], ["input_ids"])


class RowGather:
    """Hooks on an embedding module that give it a small table of just the rows it is asked for.

    The module's own forward runs (some scale their rows), on that table and on the positions of the rows in it.

    Parameters
    ----------
    module
        The embedding; its ``weight`` is on ``meta`` between calls.
    table
        The whole table, ``[num_embeddings, dim]``, in host memory; or, where the module has a ``packing``, packed by
        rows and perhaps on the device.
    dtype, device
        Of the rows that compute sees.
    sources
        The files that the table may lie in: asked, once rows were read, whether these are what the file had.
    """

    def __init__(
        self, module: nn.Embedding, table: torch.Tensor, dtype: torch.dtype, device: torch.device,
        sources: Unchanged | None = None,
    ):  # fmt: skip
        self._table, self._dtype, self._device = table, dtype, device
        self._meta, self._packing, self._sources = module.weight, getattr(module, "packing", None), sources
        # A padding row matters for gradients only, and its index means nothing in the small table.
        module.padding_idx = None
        self.hooks = [
            module.register_forward_pre_hook(self._bind, with_kwargs=True),
            module.register_forward_hook(self._unbind),
        ]

    def _bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        (ids,) = (*args, *kwargs.values())
        rows = self._table.index_select(0, ids.reshape(-1).to(self._table.device))
        if self._sources is not None:
            self._sources.check_pages()
        if self._packing is None:
            rows = rows.to(self._device, self._dtype)
        else:
            packed, rows = rows, torch.empty(len(rows), module.embedding_dim, dtype=self._dtype, device=self._device)
            self._packing.unpack({"weight": packed.to(self._device)}, rows)
        module._parameters["weight"] = rows  # type: ignore[assignment]
        return (torch.arange(ids.numel(), device=self._device).view(ids.shape),), {}

    def _unbind(self, module: nn.Module, *_: Any) -> None:
        module._parameters["weight"] = self._meta
