"""How a model is used: the steps, guidance and scheduler that were said when it was calibrated, which artifacts keep.

A model distilled for few steps is not right at any others, so its slim model, graphs, engines and bundles are run as it
was calibrated unless somebody says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimdiff.loading.naming import places_of
from slimdiff.settings import Sampling
from slimdiff.storage import manifest

SAMPLING = "sampling"
"""Where it lies in what a manifest says that an artifact was made from."""
_INSIDE = ("settings", "onnx", "made_from")
"""Under which builds, pipelines of engines and bundles keep that of what they were made from."""


def said_of(*samplings: Sampling) -> dict[str, Any]:
    """`sampling`, with the `steps`, `guidance` and `scheduler` that somebody set; empty if nobody set any.

    Args:
        samplings: the first that has one set counts for it.
    """
    known: dict[str, Any] = {}
    for sampling in reversed(samplings):
        known |= sampling.model_dump(include={"steps", "guidance", "scheduler"} & sampling.model_fields_set)
    return {SAMPLING: known} if known else {}


def usage_of(*names: str | None) -> dict[str, Any]:
    """`steps`, `guidance` and `scheduler` of the first of these artifacts that knows any; empty if none does.

    Args:
        names: of artifacts; what is no folder with a manifest, such as a dense checkpoint, knows none. A component
            folder is used as its pipeline is.

    Raises:
        InputError: for a damaged manifest.
    """
    folders = [place for name in names if name not in (None, "demo") for place in places_of(name)]
    contents = [manifest.read_manifest(f)["made_from"] for f in folders if (f / manifest.MANIFEST).is_file()]
    return next((usage for content in contents if (usage := _inside(content))), {})


def use(sampling: Sampling, usage: Mapping[str, Any]) -> Sampling:
    """A sampling with what `usage_of` found in the place of what nobody set."""
    return sampling.model_copy(update={k: v for k, v in usage.items() if k not in sampling.model_fields_set})


def _inside(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        return {}
    return content.get(SAMPLING) or next((usage for k in _INSIDE if (usage := _inside(content.get(k)))), {})
