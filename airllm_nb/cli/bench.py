"""bench: how fast a model runs here."""

from __future__ import annotations

import argparse

from .arguments import load_options
from .commands import ProgressLine, write, write_json


def bench(given: argparse.Namespace) -> int:
    """Measure a model, or random weights in a known shape."""
    options = load_options(given)
    try:
        with ProgressLine() as line:
            from .. import bench

            result = bench.bench(
                given.model, given.synthetic, options, layers=given.layers, keep=given.keep, sweeps=given.sweeps,
                batch=given.batch, cap=given.cap, progress=line.show,
            )  # fmt: skip
    except KeyboardInterrupt:
        if given.synthetic is None:
            raise
        left = "is kept if it was complete" if given.keep else "that this wrote is deleted"
        raise KeyboardInterrupt(f"interrupted; the synthetic checkpoint {left}") from None
    if given.json:
        write_json(result.as_dict())
    else:
        write(f"{result}\n")
    return 0
