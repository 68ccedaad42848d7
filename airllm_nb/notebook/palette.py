"""Colours and hatches: Okabe–Ito's, told apart by colour-blind people, in print and on a dark page.

A colour never says anything alone: each comes with a hatch of its own, or with a label beside it. In the lanes of a
sweep the colour is the tier that the bytes come from, the hatch is what happens to them.
"""

from __future__ import annotations

from typing import NamedTuple

BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
INK, MUTED, FAINT, PAPER = "#222222", "#555555", "#D4D4D4", "#FFFFFF"


class Look(NamedTuple):
    """How an area is filled; the hatch is drawn in the colour of the edge."""

    face: str
    edge: str
    hatch: str = ""


_RISING, _FALLING = "////", "\\\\\\\\"
_DARK = {
    ORANGE: "#7A5200", SKY: "#0B5C8A", GREEN: "#005C43", PURPLE: "#7A2F55", YELLOW: "#857B00", VERMILLION: "#7A3600",
}  # fmt: skip

TIERS = {
    "gpu": Look(GREEN, _DARK[GREEN]),
    "ram": Look(SKY, _DARK[SKY], _FALLING),
    "disk": Look(ORANGE, _DARK[ORANGE], _RISING),
}
TIER_NAMES = {"gpu": "GPU", "ram": "RAM", "disk": "disk"}

LANES = {
    "read": Look(ORANGE, _DARK[ORANGE], _RISING),
    "copy": Look(SKY, _DARK[SKY], _FALLING),
    "dequantise": Look(PURPLE, _DARK[PURPLE], "xxxx"),
    "compute": Look(BLUE, BLUE),
}
LANE_NAMES = {
    "read": "disk read",
    "copy": "host to device",
    "dequantise": "dequantise",
    "compute": "compute",
    "wait": "compute waits",
}
WAITS = {
    "read": Look(VERMILLION, _DARK[VERMILLION], _RISING),
    "copy": Look("#F3BE9B", _DARK[VERMILLION], _FALLING),
    "host": Look(FAINT, MUTED),
}
WAIT_NAMES = {"read": "waits for a read", "copy": "waits for a copy", "host": "idle otherwise"}

PARTS = {
    "weights": TIERS["gpu"],
    "slots": Look(SKY, _DARK[SKY], _FALLING),
    "idle slots": Look("#E3F2FB", _DARK[SKY]),
    "kv cache": Look(PURPLE, _DARK[PURPLE], "xxxx"),
    "activations": Look(YELLOW, _DARK[YELLOW], "...."),
    "scratch": Look(ORANGE, _DARK[ORANGE], "----"),
    "unused": Look("#F4F4F4", "#BBBBBB", "//"),
    "others": Look("#DDDDDD", "#AAAAAA", ".."),
    "free": Look(PAPER, MUTED),
    "process": Look(BLUE, BLUE),
}


def moved(stage: str, tier: str | None) -> Look:
    """A read or a copy of a unit that lives in ``tier``."""
    lane, home = LANES[stage], TIERS.get(tier or "", LANES[stage])
    return Look(home.face, home.edge, lane.hatch)
