"""Whether a model fits this machine: its disks, its RAM, its VRAM."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.hub.repository import cache_folder
from ..config import cache_dir, format_bytes
from ..disk import free_disk, nearest, status
from ..plan.residency import ResidencyPlan

if TYPE_CHECKING:
    from ..intake.planning import Prepared


_VERBS = {
    "download": "download to", "store": "write once to",
    "piecewise": "write once, each weight file deleted before the next is downloaded, to",
}  # fmt: skip


@dataclass(frozen=True)
class Space:
    """Bytes that would be put into a folder.

    Attributes
    ----------
    what
        ``"download"`` into the Hub's cache; ``"store"``: what is written once, compressed or in another format;
        ``"piecewise"``: such a store and one weight file at a time.
    free
        Free bytes there; ``None`` where nobody tells.
    beside
        Bytes of earlier spaces that go to the same disk.
    """

    what: str
    nbytes: int
    folder: Path
    free: int | None
    beside: int = 0

    @property
    def fits(self) -> bool | None:
        """``None`` where nobody tells how much is free."""
        return None if self.free is None else self.nbytes + self.beside <= self.free

    def __str__(self) -> str:
        text = f"{format_bytes(self.nbytes)} to {_VERBS[self.what]} {self.folder}"
        if self.beside:
            text += f" beside those {format_bytes(self.beside)}"
        if self.free is None:
            return f"{text}; how much is free there is not known"
        if self.fits:
            return f"{text}, {format_bytes(self.free)} free: fits"
        name = "set HF_HOME to" if self.what == "download" else "set layer_shards_saving_path to"
        return f"{text}, {format_bytes(self.free)} free: does not fit; {name} a folder on a larger disk"


@dataclass(frozen=True)
class Fit:
    """Whether there is room for a model, and what that is known from.

    Attributes
    ----------
    spaces
        What would be put on disk before the model can run; empty when everything is here.
    weights
        Bytes of all weights that stream or stay.
    in_vram
        Bytes of them that stay in VRAM; ``None`` where there is none.
    from_disk
        Bytes of them that every token reads from disk, because RAM does not hold them.
    sizes_from
        ``"files"`` that are here, ``"headers"`` on the Hub, or the ``"config"`` alone, for the reason in ``why``.
    disk_speed
        Bytes a second that the prediction assumes where there is no file to measure it with, else ``None``.
    chosen
        Which file of several was chosen, and why.
    compression
        How the weights are encoded, as in ``"4bit"`` or ``"GGUF: Q4_K, Q6_K"``; ``None`` where they are plain.
    """

    spaces: tuple[Space, ...]
    weights: int
    in_vram: int | None
    from_disk: int
    sizes_from: str
    why: str = ""
    disk_speed: float | None = None
    chosen: str = ""
    compression: str | None = None

    @property
    def disk(self) -> bool | None:
        """Whether what must be put on disk fits there; ``None`` where nobody tells how much is free."""
        verdicts = [space.fits for space in self.spaces]
        return False if False in verdicts else None if None in verdicts else True

    @property
    def ram(self) -> bool:
        """Whether RAM, with VRAM, holds what every token needs, so that nothing streams from disk."""
        return not self.from_disk

    @property
    def vram(self) -> bool | None:
        """Whether VRAM holds the whole model, so that nothing streams; ``None`` where there is none."""
        return None if self.in_vram is None else self.in_vram >= self.weights

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        each = [asdict(space) | {"folder": str(space.folder), "fits": space.fits} for space in self.spaces]
        return {"disk": self.disk, "ram": self.ram, "vram": self.vram, "weights": self.weights,
                "from_disk": self.from_disk, "spaces": each, "sizes_from": self.sizes_from,
                "why": self.why, "disk_speed": self.disk_speed, "chosen": self.chosen,
                "compression": self.compression}  # fmt: skip

    @property
    def rows(self) -> list[tuple[str, str]]:
        """A label and what is known, for people."""
        said = {True: "yes", False: "no", None: "not known"}[self.disk]
        verdicts = [f"disk {said if self.spaces else 'yes, all is here'}"]
        verdicts.append("RAM yes" if self.ram else
                        f"RAM in part: every token reads {format_bytes(self.from_disk)} from disk")  # fmt: skip
        if self.in_vram is not None:
            verdicts.append("VRAM yes" if self.vram else
                            f"VRAM in part: {format_bytes(self.in_vram)} of {format_bytes(self.weights)} stay "
                            "there, the rest streams")  # fmt: skip
        rows = [("chosen", self.chosen)] if self.chosen else []
        if self.compression:
            rows.append(("encoded" if self.compression in ("4bit", "8bit") else "packed", self.compression))
        rows += [*(("disk", str(space)) for space in self.spaces), ("fits", " | ".join(verdicts))]
        if self.sizes_from == "headers":
            rows.append(("sizes", "from the headers of the weight files on the Hub; no weights were downloaded"))
        elif self.sizes_from == "config" and self.why:
            rows.append(("sizes", f"from the config alone: {self.why}"))
        if self.disk_speed is not None and self.from_disk:
            speed = format_bytes(self.disk_speed)
            rows.append(("assumed", f"a disk of {speed}/s: no file is here to measure it with"))
        return rows


@dataclass(frozen=True)
class FittedPlan(ResidencyPlan):
    """A plan of a model that is not loaded, and whether there is room for it."""

    fit: Fit = field(kw_only=True)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return super().as_dict() | {"fit": self.fit.as_dict()}

    @property
    def rows(self) -> list[tuple[str, str]]:
        """A label and what is planned and known, for people; the prediction is the last."""
        *where, predicted = super().rows
        return [*where, *self.fit.rows, predicted]


def spaces(prepared: Prepared) -> tuple[Space, ...]:
    """What loading this model would put on which disk."""
    source, found = prepared.source, []
    if prepared.piecewise is not None:
        folder = _stores(prepared)
        return (Space("piecewise", prepared.piecewise, folder, free_disk(folder)),)
    if not source.files and prepared.sizes_from != "files":  # a store may have taken their place
        needed = _weights(prepared) if source.missing is None else source.missing
        found.append(("download", needed, cache_folder()))
    is_here = prepared.codec.compression == "none" or prepared.sizes_from == "files"
    if store := prepared.written_once + (0 if is_here else _weights(prepared)):
        found.append(("store", store, _stores(prepared)))
    made: list[Space] = []
    for what, nbytes, folder in found:
        disk = status(nearest(folder)).st_dev
        beside = sum(space.nbytes for space in made if status(nearest(space.folder)).st_dev == disk)
        made.append(Space(what, nbytes, folder, free_disk(folder), beside))
    return tuple(made)


def _stores(prepared: Prepared) -> Path:
    return Path(prepared.options.layer_shards_saving_path or cache_dir())


def with_fit(plan: ResidencyPlan, prepared: Prepared, on_disk: tuple[Space, ...]) -> FittedPlan:
    """``plan`` with what is known of the room for it."""
    fit = Fit(
        on_disk,
        weights=plan.tier_bytes("gpu") + plan.tier_bytes("ram") + plan.tier_bytes("disk"),
        in_vram=plan.tier_bytes("gpu") if plan.machine.has_device else None,
        from_disk=plan.swept_bytes("disk"),
        sizes_from=prepared.sizes_from,
        why=_why(prepared),
        disk_speed=None if prepared.sizes_from == "files" else plan.machine.disk,
        chosen=prepared.source.why,
        compression=prepared.encoding,
    )
    return FittedPlan(**{each.name: getattr(plan, each.name) for each in fields(plan)}, fit=fit)


def _why(prepared: Prepared) -> str:
    """Why the sizes come from the config alone; those of packed weights are smaller."""
    if prepared.sizes_from != "config" or prepared.codec.compression != "none":
        return prepared.why_config
    kind = prepared.container.packed_as
    unpacked = f"they are those of unpacked weights, and the checkpoint's are packed ({kind})" if kind else ""
    return "; ".join(filter(None, (prepared.why_config, unpacked)))


def _weights(prepared: Prepared) -> int:
    return sum(unit.nbytes for unit in prepared.sizes) + prepared.fixed_needs.small
