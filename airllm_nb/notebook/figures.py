"""Pictures of a plan, of memory and of a sweep: data in, a figure and its alt text out.

Matplotlib is imported here: import this module only where something is drawn.
"""

from __future__ import annotations

from .canvas import WIDTH, Picture
from .memory_figures import memory_text, plan_bar, vram_timeline
from .sweep_figures import compare, overlap, overlap_text

__all__ = [
    "WIDTH", "Picture", "compare", "memory_text", "overlap", "overlap_text", "plan_bar", "vram_timeline",
]  # fmt: skip
