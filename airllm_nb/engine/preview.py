"""Plans of a model that is not loaded: found and measured once, planned under any budgets at once."""

from __future__ import annotations

import functools
from pathlib import Path

from ..config import LoadOptions
from ..intake import planning, prepare
from ..model.device import Budgets, budgets_of
from ..progress import ProgressCallback, silent
from .fit import FittedPlan, Space, spaces, with_fit
from .machine import measure


class Preview:
    """Nothing of the weights is downloaded, converted or read.

    Parameters
    ----------
    model, options, progress
        As for :func:`~airllm_nb.engine.facade.open_model`.

    Attributes
    ----------
    budgets
        VRAM and RAM in bytes of the last plan.
    """

    def __init__(self, model: str | Path, options: LoadOptions, *, progress: ProgressCallback = silent):
        self.budgets = self._free = budgets_of(options)
        self._prepared = prepare.prepare(model, options, self._free, progress=progress, weights=False)
        self._machine = measure(self._prepared)

    @property
    def has_device(self) -> bool:
        """Whether there is a VRAM budget: a GPU, or a CPU that rehearses one."""
        return self._machine.has_device

    def plan(self, vram: int | None = None, ram: int | None = None) -> FittedPlan:
        """What would go where under these budgets in bytes; ``None`` is that of the options, or what is free.

        Raises
        ------
        BudgetError
            If it does not fit.
        """
        self.budgets = Budgets(vram or self._free.vram, ram or self._free.ram)
        planning.cut(self._prepared, self.budgets)  # large matrices are sliced by the budgets
        made = planning.plan(self._prepared, self._machine, self.budgets, self._prepared.planned)[0]
        return with_fit(made, self._prepared, self._spaces)

    @functools.cached_property
    def _spaces(self) -> tuple[Space, ...]:
        return spaces(self._prepared)
