"""What planning does not do with an offloaded denoiser: what reads all of its weights again for each site or plan."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from slimdiff.denoising.offloading import shards_of
from slimdiff.errors import InputError
from slimdiff.settings import PlanSettings

PLANNED_SO = ("parameters", "macs")
"""Kinds of budgets that take no slim model and no latencies."""


def check_offloaded(
    denoiser: nn.Module, settings: PlanSettings, budgets: Collection[str] = (), measured: bool = False
) -> None:
    """Refuse settings and kinds of budgets that an offloaded denoiser does not go with; any other passes.

    Args:
        measured: whether its sensitivities are known.

    Raises:
        InputError: saying why, and what would be right.
    """
    if shards_of(denoiser) is None:
        return
    if settings.allocation == "global" and not measured:
        raise InputError(
            "the global allocation measures sensitivities, which would read an offloaded denoiser anew for every site "
            "and call: take the local allocation, or uniform"
        )
    if settings.replans or settings.precision == "int8":
        what = "replans are" if settings.replans else "what int8 costs is"
        raise InputError(f"{what} measured on models in memory, and this denoiser is offloaded: leave that out")
    if settings.forms.compensate != "none":
        raise InputError(
            "errors are compensated on calls of a slim model in memory, and an offloaded denoiser's never is: give "
            "forms with compensate none"
        )
    if other := next((kind for kind in budgets if kind not in PLANNED_SO), None):
        raise InputError(
            f"a budget of {other} is measured on models in memory, and this denoiser is offloaded: give one in "
            "parameters or MACs"
        )
