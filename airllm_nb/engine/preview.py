"""Plans of a model that is not loaded: found and measured once, planned under any budgets at once."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from ..config import LoadOptions
from ..intake import planning, prepare
from ..model.slices import slice_limit
from ..trace import ProgressCallback, silent
from .fit import FittedPlan, Space, spaces, with_fit
from .machine import measure


class Preview:
    """Nothing of the weights is downloaded, converted or read.

    Parameters
    ----------
    model, options, progress
        As for :func:`~airllm_nb.engine.facade.open_model`.
    """

    def __init__(self, model: str | Path, options: LoadOptions, *, progress: ProgressCallback = silent):
        self._model, self._options = model, options
        self._prepared = prepare.prepare(model, options, progress=progress, weights=False)
        # Files that are not here cannot be measured.
        here = self._prepared.sizes_from == "files"
        self._machine = measure(self._prepared if here else replace(self._prepared, units=[]))
        self._limit, self._free = self._slice_limit(), self.budgets

    @property
    def has_device(self) -> bool:
        """Whether there is a VRAM budget: a GPU, or a CPU that rehearses one."""
        return self._machine.has_device

    @property
    def budgets(self) -> tuple[int, int]:
        """VRAM and RAM budget in bytes of the last plan."""
        return self._prepared.vram_budget, self._prepared.ram_budget

    def plan(self, vram: int | None = None, ram: int | None = None) -> FittedPlan:
        """What would go where under these budgets in bytes; ``None`` is that of the options, or what is free.

        Raises
        ------
        BudgetError
            If it does not fit.
        """
        prepared = self._prepared
        prepared.vram_budget, prepared.ram_budget = vram or self._free[0], ram or self._free[1]
        if self._slice_limit() != self._limit:
            # Large matrices are cut by the budgets.
            budgets = self.budgets
            options = replace(self._options, vram_budget=budgets[0] or None, ram_budget=budgets[1])
            self._prepared = prepare.prepare(self._model, options, weights=False)
            self._limit = self._slice_limit()
        made = planning.plan(self._prepared, self._machine, self._prepared.planned)[0]
        return with_fit(made, self._prepared, self._spaces)

    @functools.cached_property
    def _spaces(self) -> tuple[Space, ...]:
        return spaces(self._prepared)

    def _slice_limit(self) -> int:
        return slice_limit(*self.budgets, self.has_device)
