"""What a mixture's experts were asked for, and how well a cache served it.

Only layers whose experts are not all there are recorded: of the others nothing moves, whatever they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Routed:
    """What one layer's experts were asked for.

    Attributes
    ----------
    asked
        By expert, in how many forwards some token was routed to it.
    hits
        Of all that, how often the expert was there, and nothing moved.
    cached
        The experts that were there when the generation ended; ``None`` until then.
    """

    asked: list[int]
    hits: int = 0
    cached: tuple[int, ...] | None = None


def asked_and_hits(experts: Mapping[str, Routed]) -> tuple[int, int]:
    """How often experts were asked for in all layers, and how often they were there."""
    every = list(experts.values())
    return sum(sum(routed.asked) for routed in every), sum(routed.hits for routed in every)


def experts_line(summary: Mapping[str, Any]) -> str:
    """``"62% expert hits, 148 experts and 0.39 GB moved a token"`` of a summary; empty where none move."""
    if not (experts := summary["experts"]):
        return ""
    moved = f"{experts['moved']:,.3g} experts and {experts['bytes'] / 1e9:.3g} GB moved a token"
    return f"{experts['hit_rate']:.0%} expert hits, {moved}"


@dataclass(frozen=True)
class ExpertUse:
    """Layers × experts.

    Attributes
    ----------
    layers
        Names of units, in the order in which they were first used.
    asked
        By layer and expert, in how many forwards some token was routed to it.
    hits
        By layer, how often an expert that was asked for was there.
    cached
        By layer, the experts that are there now; ``None`` where that is not known.
    sweeps
        Forwards so far.
    """

    layers: tuple[str, ...]
    asked: tuple[tuple[int, ...], ...]
    hits: tuple[int, ...]
    cached: tuple[frozenset[int] | None, ...]
    sweeps: int

    @property
    def most(self) -> int:
        """Experts of the largest layer."""
        return max(map(len, self.asked), default=0)

    @property
    def total(self) -> int:
        """How often any expert was asked for."""
        return sum(map(sum, self.asked))

    @property
    def share(self) -> float:
        """Of those, the share that was there."""
        return sum(self.hits) / self.total if self.total else 0.0

    @property
    def count_cached(self) -> int | None:
        """How many are there now; ``None`` where that is not known."""
        known = [len(each) for each in self.cached if each is not None]
        return sum(known) if known else None

    @property
    def top(self) -> tuple[int, int, int]:
        """Layer and expert that were asked for most, by number, and how often."""
        count, layer, expert = max(
            (count, -layer, -expert) for layer, row in enumerate(self.asked) for expert, count in enumerate(row)
        )
        return -layer, -expert, count


def expert_use(experts: Mapping[str, Routed], sweeps: int) -> ExpertUse | None:
    """What was asked for so far; ``None`` where nothing was, or all experts always are there.

    Parameters
    ----------
    experts, sweeps
        Those of a :class:`~airllm_nb.trace.Trace`, which may still be written.
    """
    every = {name: (tuple(each.asked), each.hits, each.cached) for name, each in list(experts.items())}
    if not any(sum(asked) for asked, _, _ in every.values()):
        return None
    asked, hits, cached = zip(*every.values(), strict=True)
    known = tuple(None if each is None else frozenset(each) for each in cached)
    return ExpertUse(tuple(every), asked, hits, known, sweeps)


def expert_table(use: ExpertUse) -> str:
    """One row a layer and a total: how often experts were asked for, how many different ones, hits, which most."""
    width = max([len(name) for name in use.layers] + [5])
    rows = [f"{'layer':<{width}}{'asked':>9}{'different':>11}{'hits':>7}{'cached':>9}  most often (times)"]
    for name, asked, hits, cached in zip(use.layers, use.asked, use.hits, use.cached, strict=True):
        order = sorted(range(len(asked)), key=lambda expert: (-asked[expert], expert))
        first = ", ".join(f"{expert} ({asked[expert]:,})" for expert in order[:3] if asked[expert])
        there = None if cached is None else len(cached)
        rows.append(f"{name:<{width}}{_row(sum(asked), sum(map(bool, asked)), hits, there)}  {first}")
    different = sum(sum(map(bool, asked)) for asked in use.asked)
    rows.append(f"{'total':<{width}}{_row(use.total, different, sum(use.hits), use.count_cached)}")
    return "\n".join(rows)


def _row(asked: int, different: int, hits: int, cached: int | None) -> str:
    share = f"{hits / asked:.0%}" if asked else ""
    return f"{asked:>9,}{different:>11,}{share:>7}{'' if cached is None else f'{cached:,}':>9}"
