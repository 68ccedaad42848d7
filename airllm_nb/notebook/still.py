"""Pictures that stay in the notebook: PNG and text, which every viewer shows and a screen reader reads."""

from __future__ import annotations

import base64
from typing import Any

from ..timeline import last_sweep
from ..trace import Trace
from . import figures


class Still:
    """A picture as a display: ``image/png``, with its description as ``text/plain``."""

    def __init__(self, picture: Any):
        self.picture = picture

    @classmethod
    def of(cls, trace: Trace, title: str = "") -> Still | None:
        """The last sweep of a generation; ``None`` if there was none."""
        view = last_sweep(trace)
        return None if view is None else cls(figures.overlap(view, title, trace.plan))

    @classmethod
    def of_memory(cls, trace: Trace) -> Still | None:
        """The memory of the GPU during a generation; ``None`` without a GPU."""
        return cls(figures.vram_timeline(trace)) if trace.of_device else None

    def bundle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Data and metadata of the display."""
        png = base64.b64encode(self.picture.png()).decode()
        shown = {"width": figures.WIDTH, "alt": self.picture.alt}
        return {"text/plain": self.picture.alt, "image/png": png}, {"image/png": shown}

    def __repr__(self) -> str:
        return str(self.picture.alt)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        return self.bundle()


def plan_picture(plan: Any) -> Any:
    """What goes where."""
    return figures.plan_bar(plan)


def words(trace: Trace, title: str = "") -> str:
    """What the pictures of a generation show, for whoever cannot see them."""
    view = last_sweep(trace)
    texts = [figures.overlap_text(view, title, trace.plan)] if view else []
    if trace.of_device:
        texts.append(figures.memory_text(list(trace.memory), trace.plan))
    return "\n".join(texts)
