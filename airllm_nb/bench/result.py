"""What a measurement found, as data and as rows for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import format_bytes, format_seconds
from ..plan.residency import ResidencyPlan
from ..routed import experts_line
from ..trace import Trace, speed_line, stage_rows


@dataclass(frozen=True)
class BenchResult:
    """One measurement.

    Attributes
    ----------
    routing
        How tokens were routed to experts; ``None`` is as the model does.
    predicted_sweep_seconds, bound_by
        From the plan.
    sweep_seconds, achieved_of_predicted
        The median of the sweeps after the prompt, and the prediction divided by it.
    tokens_per_second
        Of all sequences, by the wall clock, the prompt left out.
    first_token_seconds
        From the prompt to the first token.
    open_seconds
        ``None`` where the model was open already.
    peak_bytes
        The most VRAM that was reserved; on a CPU the memory of this process.
    links
        By ``"disk"``, ``"link"`` (host to device) and ``"memory"`` (what compute reads): ``bytes`` a sweep by the plan
        (of a mixture, that were moved), ``gb_per_second`` achieved, ``probed_gb_per_second``.
    experts
        Of a mixture whose experts move, a sweep: experts ``asked`` for, ``hit_rate``, ``moved``; ``bytes`` over the
        link, ``moved_bytes`` those of experts, ``read_bytes`` from disk; and ``expert_bytes`` of one, ``prompt_bytes``
        of the prompt's sweep.
    stages
        As in :meth:`~airllm_nb.trace.Trace.summary`.
    same_tokens
        Whether the generation that warmed up gave the same tokens as the measured one.
    synthetic
        Of a checkpoint with random weights: its shape, layers, folder, and whether it was kept.
    """

    model: str
    compression: str | None
    device: str
    dtype: str
    sweeps: int
    prompt_tokens: int
    batch: int
    routing: str | None
    predicted_sweep_seconds: float
    bound_by: str
    sweep_seconds: float
    achieved_of_predicted: float
    tokens_per_second: float
    first_token_seconds: float
    open_seconds: float | None
    peak_bytes: int
    same_tokens: bool
    links: dict[str, dict[str, float]]
    experts: dict[str, float] | None
    stages: dict[str, dict[str, Any]]
    plan: dict[str, Any]
    probed: dict[str, Any]
    machine: dict[str, Any]
    vram_cap: int | None = None
    synthetic: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return dataclasses.asdict(self)

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        return f"{self.model} ({self.compression or 'not compressed'}, {self.dtype}) on {self.machine['device']}"

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Labels and values, for people."""
        asked = f"{self.sweeps} sweeps after a prompt of {self.prompt_tokens} tokens, batch {self.batch}"
        asked += f", {self.routing} routing" if self.routing else ""
        first = format_seconds(self.first_token_seconds)
        rows = [
            ("speed", speed_line(self.as_dict())),
            ("tokens", f"{self.tokens_per_second:.3g} a second, the first after {first}"),
            ("measured", asked + ("" if self.same_tokens else "; the two generations gave different tokens")),
            *([("experts", experts_line(self.as_dict()))] if self.experts else []),
            *((name, _link_text(link)) for name, link in self.links.items() if link["bytes"]),
            ("weights", " | ".join(f"{tier} {format_bytes(has['bytes'])} ({has['units']} units)"
                                   for tier, has in self.plan["tiers"].items() if has["units"])),
            ("memory peak", self._peak_text()),
        ]  # fmt: skip
        if self.open_seconds is not None:
            rows.append(("opened in", format_seconds(self.open_seconds)))
        rows += stage_rows(self.stages)
        if self.synthetic:
            rows.append(("checkpoint", _synthetic_text(self.synthetic)))
        versions = ", ".join(f"{name} {self.machine[name]}" for name in ("torch", "transformers", "python"))
        return [*rows, ("probed", _probed_text(self.probed)), ("versions", versions)]

    def _peak_text(self) -> str:
        text = format_bytes(self.peak_bytes)
        if not self.plan["vram_budget"] or self.device == "cpu":
            return f"{text} in this process"
        budget = f"{text} of VRAM; planned {format_bytes(self.plan['device_bytes'])} of "
        return budget + format_bytes(self.plan["vram_budget"]) + (", enforced" if self.vram_cap else "")

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows)
        return "\n".join([self.title, *(f"  {label:<{width}}  {value}" for label, value in self.rows)])


def _link_text(link: dict[str, float]) -> str:
    return (f"{link['gb_per_second']:.3g} GB/s of {link['probed_gb_per_second']:.3g} probed, "
            f"{link['bytes'] / 1e9:.3g} GB a sweep")  # fmt: skip


def _synthetic_text(facts: dict[str, Any]) -> str:
    text = f"random weights, {facts['shape']} cut to {facts['layers']} of {facts['layers_of_shape']} layers; "
    return text + (f"kept in {facts['folder']}" if facts["kept"] else "deleted again (--keep keeps it)")


def _probed_text(probed: dict[str, Any]) -> str:
    # A bandwidth where nothing is copied is none.
    known = {name: value for name, value in probed.items() if name != "has_device" and value is not None}
    if not probed.get("has_device"):
        known.pop("link", None)
    return ", ".join(
        f"{name} {value / 1e9:.3g} GB/s" if isinstance(value, float) and value > 1e6 else f"{name} {value}"
        for name, value in known.items()
    )


def experts_of(trace: Trace, plan: ResidencyPlan) -> dict[str, float] | None:
    """Of a mixture whose experts move, what the sweeps after the prompt's were like, by what was recorded."""
    if not (found := trace.summary()["experts"]):
        return None
    spans, (_, after), sweeps = trace.recent(), trace.windows[0], max(trace.sweeps - 1, 1)

    def moved(stage: str, is_prompt: bool, units: Collection[str] | None = None) -> int:
        return sum(span.nbytes for span in spans if span.stage == stage and (span.start < after) == is_prompt
                   and (units is None or span.unit in units))  # fmt: skip

    stage = "copy" if plan.machine.has_device else "read"
    return {**found, "expert_bytes": next(unit.experts.nbytes for unit in plan.units if unit.experts),
            "moved_bytes": moved(stage, False, trace.experts) / sweeps, "read_bytes": moved("read", False) / sweeps,
            "prompt_bytes": moved(stage, True)}  # fmt: skip


def links_of(plan: ResidencyPlan, seconds: float, experts: Mapping[str, float] | None) -> dict[str, dict[str, float]]:
    """What each link carried in a sweep, see :attr:`BenchResult.links`."""
    moved: dict[str, float] = {"disk": plan.swept_bytes("disk"), "memory": plan.swept_bytes("gpu", "ram", "disk")}
    if plan.machine.has_device:
        moved["link"] = plan.swept_bytes("ram", "disk")
    if experts:
        moved |= {"disk": experts["read_bytes"]} | ({"link": experts["bytes"]} if "link" in moved else {})
    return {
        name: {"bytes": moved[name], "gb_per_second": moved[name] / seconds / 1e9,
               "probed_gb_per_second": getattr(plan.machine, name) / 1e9}
        for name in ("disk", "link", "memory") if name in moved
    }  # fmt: skip
