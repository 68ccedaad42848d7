"""What computes on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..plan.residency import ResidencyPlan
from .units import ModelUnit, Weight


@dataclass(frozen=True)
class Stage:
    """What computes on one device.

    Attributes
    ----------
    units, small
        Its units in the order of use, and the weights that are always resident.
    plan
        The tier of each unit; ``plan.machine.has_device`` says whether weights are copied to compute memory.
    exact
        All is computed by native code.
    """

    device: torch.device
    units: list[ModelUnit]
    small: list[Weight]
    plan: ResidencyPlan
    exact: bool = False
