"""Pictures of a plan, of memory and of a sweep: data in, a figure and its alt text out.

Matplotlib is imported here: import this module only where something is drawn.
"""

from __future__ import annotations

from .canvas import WIDTH, Picture
from .memory_figures import plan_bar, vram_timeline
from .sweep_figures import compare, overlap

__all__ = ["WIDTH", "Picture", "compare", "overlap", "plan_bar", "vram_timeline"]
