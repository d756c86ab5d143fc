"""What a schedule runs in some steps, held against the model's own: what a whole step keeps, and what reuses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters.validation.parity import Bounds, at_time, compare
from slimdiff.denoising.scheduled import Passes
from slimdiff.denoising.trajectory import Call


@torch.no_grad()
def check_shallow(
    result: dict[str, Any], reference: Passes, candidate: Passes, calls: Sequence[Call], depth: str, bounds: Bounds
) -> dict[str, Any]:
    """Hold the shallow pass of a denoiser against a reference's, both on what the reference's whole one keeps.

    Args:
        result: `check_calls`'s of the two.
        depth: the path of the up block whose input is kept.

    Returns:
        the result with checks of what is kept (`kept@t=981`) and of the shallow output (`shallow@t=981`). One that
        fails is the first only if none before it did.
    """
    rows: list[dict[str, Any]] = []
    for call in calls:
        arguments = call.to("cpu")
        kept = [passes.whole(arguments, depth)[1] for passes in (reference, candidate)]
        assert kept[0] is not None and kept[1] is not None
        rows += compare(at_time("kept", call), _array(kept[0]), _array(kept[1]), bounds)
        right, own = (_array(passes.shallow(arguments, depth, kept[0])) for passes in (reference, candidate))
        rows += compare(at_time("shallow", call), right, own, bounds)
    failed = next((row["tensor"] for row in rows if not row["passed"]), None)
    return result | {
        "passed": result["passed"] and failed is None,
        "checks": [*result["checks"], *rows],
        "first_diverging": result["first_diverging"] or failed,
    }


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().contiguous().numpy()
