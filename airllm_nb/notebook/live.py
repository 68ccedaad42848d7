"""What there is to say of a generation while it runs: numbers from the model, the trace and the clock, then words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import format_seconds
from ..routed import experts_line
from ..trace import Trace

if TYPE_CHECKING:
    from ..engine.facade import StreamedModel

# Seconds a sweep above which one is watched.
SLOW = 1.0
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Facts:
    """One moment of a generation.

    Attributes
    ----------
    unit, units
        What computes, counted from 1; 0 before the first and where units are not followed (all resident on a GPU).
    layer, layers
        The decoder block that it belongs to, counted from 1; 0 where it belongs to none.
    sweep, expected
        Seconds since this sweep began, and what one takes: measured, or predicted before the first has ended.
    left
        Seconds until the last token that was asked for; it may end before.
    """

    title: str
    unit: int
    units: int
    layer: int
    layers: int
    tokens: int
    limit: int
    sweep: float
    expected: float
    left: float
    tokens_per_second: float
    rates: dict[str, float]
    achieved: float | None
    experts: str = ""

    @property
    def is_slow(self) -> bool:
        """Whether a sweep takes long enough to be watched; else the tokens are."""
        return self.expected > SLOW

    @property
    def share(self) -> float:
        """How much is over, 0 to 1: of the sweep if that is slow, else of the tokens."""
        if not self.is_slow:
            return min(self.tokens / self.limit, 1.0) if self.limit else 0.0
        if self.units and self.unit:
            return min(self.unit / self.units, 1.0)
        return min(self.sweep / self.expected, 1.0)

    @property
    def where(self) -> str:
        """``"layer 37 of 80 · token 12 of 128 · up to 6 min left"``"""
        parts = [f"layer {self.layer} of {self.layers}"] if self.layer and self.is_slow else []
        if self.units and not self.layer and self.is_slow:
            parts.append(f"unit {self.unit} of {self.units}")
        parts.append(
            f"token {min(self.tokens + 1, self.limit)} of {self.limit}" if self.tokens else "reading the prompt"
        )
        if self.left > 2:
            parts.append(f"up to {format_seconds(self.left)} left")
        return " · ".join(parts)

    @property
    def this_sweep(self) -> str:
        """``"this sweep: 12 s, about 29 s left"``, or only what one takes where that is quick."""
        if not self.is_slow:
            return f"{format_seconds(self.expected)} a sweep"
        if self.sweep >= self.expected:
            return f"this sweep: {format_seconds(self.sweep)}, longer than the {format_seconds(self.expected)} expected"
        return f"this sweep: {format_seconds(self.sweep)}, about {format_seconds(self.expected - self.sweep)} left"

    @property
    def numbers(self) -> str:
        """``"0.31 tok/s · disk 1.90 GB/s · link 9.80 GB/s · 94% of the predicted speed"``"""
        parts = [self.this_sweep] + ([f"{self.tokens_per_second:.3g} tok/s"] if self.tokens else [])
        parts += [f"{name} {rate:.2f} GB/s" for name, rate in self.rates.items()]
        parts += [self.experts] if self.experts else []
        if self.achieved:
            parts.append(f"{self.achieved:.0%} of the predicted speed")
        return " · ".join(parts)


def facts(model: StreamedModel, trace: Trace, tokens: int, limit: int, seconds: float) -> Facts:
    """Look at a model that generates; safe from another thread.

    Parameters
    ----------
    trace
        Of this generation; an empty one until it has begun.
    tokens, limit
        That came, and that were asked for.
    seconds
        Since the generation began.
    """
    unit, units = model.position if trace.plan else (0, 0)
    names = list(trace.tiers)
    layers = [layer_of(name) for name in names]
    # The first sweep is the prompt's, and says little of the others.
    expected = (trace.median_sweep() if trace.sweeps > 1 else None) or model.plan.sweep_seconds
    summary = trace.summary()
    status = [model.name, f"{model.options.compression or 'not compressed'}", str(model.device)]
    return Facts(
        title=" · ".join(status), unit=min(unit, units), units=units,
        layer=layers[unit - 1] if 0 < unit <= len(layers) else 0, layers=max(layers, default=0),
        tokens=tokens, limit=limit, sweep=max(trace.now() - trace.began, 0.0) if trace.plan else 0.0, expected=expected,
        left=max(limit - tokens, 0) * expected, tokens_per_second=tokens / seconds if seconds else 0.0,
        rates=rates(trace), achieved=summary["achieved_of_predicted"], experts=experts_line(summary),
    )  # fmt: skip


def rates(trace: Trace) -> dict[str, float]:
    """GB/s of the disk and of the link since the trace began, those that carried anything."""
    seconds = trace.now()
    moved = {"disk": trace.totals["read"].nbytes, "link": trace.totals["copy"].nbytes}
    return {name: nbytes / seconds / 1e9 for name, nbytes in moved.items() if nbytes and seconds}


def layer_of(unit: str) -> int:
    """The decoder block in a unit's name, counted from 1; 0 if there is none: ``"model.layers.3.mlp"`` → 4"""
    found = _LAYER.search(unit)
    return int(found[1]) + 1 if found else 0
