"""Opens a model under a name, with progress; what had the name before is closed only when the new one can be loaded."""

from __future__ import annotations

from typing import Any

from ..config import LoadOptions
from ..errors import AirLLMError, BudgetError, OptionError
from .loading import Loading
from .progress_line import ProgressLine
from .registry import Entry, Registry


def open_into(models: Registry, name: str, model: str, wanted: LoadOptions, dashboard: str, bar: ProgressLine) -> Entry:
    """Load ``model`` as ``name``, in the place of what has that name.

    The new one is looked at first, so that a wrong path leaves the old one in place; then the old one is closed and its
    memory freed, then the new one is loaded.

    Raises
    ------
    OptionError
        If it was interrupted.
    """
    closed = name in models
    try:
        if closed:
            _check(model, wanted, bar)
            models.remove(name)
        opened = Loading(lambda report: _open(model, wanted, report)).result(bar)
    except KeyboardInterrupt:
        kept = name in models
        raise OptionError("interrupted; " + (f"{name!r} is as it was" if kept else
                          "nothing is loaded, and what was downloaded or converted is kept")) from None  # fmt: skip
    except AirLLMError as error:
        if closed and name not in models:
            error.note = f"the model that was {name!r} is closed already"
        raise
    entry = Entry(name, opened, dashboard)
    models.add(entry)
    return entry


def plan(model: str, wanted: LoadOptions, report: Any) -> Any:
    """What would go where."""
    from ..engine.facade import plan_model

    return plan_model(model, wanted, progress=report)


def _open(model: str, wanted: LoadOptions, report: Any) -> Any:
    from ..engine.facade import open_model

    return open_model(model, wanted, progress=report)


def _check(model: str, wanted: LoadOptions, bar: ProgressLine) -> None:
    """Refuse what cannot be loaded while the old model is still there."""
    try:
        Loading(lambda report: plan(model, wanted, report)).result(bar)
    except BudgetError as error:
        # A budget that was not given is what the old model leaves free: the new one will have more.
        if error.option and getattr(wanted, error.option) is not None:
            raise
