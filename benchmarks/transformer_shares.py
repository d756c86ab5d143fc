"""What slimming reaches in today's transformers: `python -m benchmarks.transformer_shares`.

Each class is made in its default configuration, which for most is the published model's, with no memory behind its
weights. A row has its parameters, and what share of them each group's layers hold.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from slimdiff.groups import find_sites
from slimdiff.planning.costs import count_parameters
from slimdiff.settings import TRANSFORMER_GROUPS

IMAGES = (
    *("DiTTransformer2DModel", "PixArtTransformer2DModel", "HunyuanDiT2DModel", "SD3Transformer2DModel"),
    *("FluxTransformer2DModel", "Flux2Transformer2DModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel"),
    *("AuraFlowTransformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel"),
    "CogView4Transformer2DModel",
)
VIDEOS = (
    *("WanTransformer3DModel", "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel"),
    "HunyuanVideoTransformer3DModel",
)

NEEDED = {"HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "sample_size": 128}}
"""What a class has no default for."""


@dataclass
class Share:
    """One class: parameters, the share that each group's layers hold, and modules that stay dense by reason."""

    name: str
    parameters: int
    groups: dict[str, float]
    left_dense: Counter[str]


def share_of(name: str) -> Share | None:
    """None where this version of diffusers has no such class."""
    kind: Any = getattr(diffusers, name, None)
    if kind is None:
        return None
    with torch.device("meta"):
        model = kind(**NEEDED.get(name, {}))
    sites, left_dense = find_sites(model)
    total, held = count_parameters(model), Counter[str]()
    for site in sites:
        held[site.group] += site.cost * site.dense_rank
    groups = {group: held[group] / total for group in TRANSFORMER_GROUPS}
    return Share(name, total, groups, Counter(row["reason"] for row in left_dense))


def main() -> None:
    print("| class | parameters | " + " | ".join(f"`{group}`" for group in TRANSFORMER_GROUPS) + " |")
    print("| --- " * (2 + len(TRANSFORMER_GROUPS)) + "|")
    for name in (*IMAGES, *VIDEOS):
        if found := share_of(name):
            cells = [f"{found.groups[group]:.0%}" if found.groups[group] else "-" for group in TRANSFORMER_GROUPS]
            print(f"| `{name}` | {found.parameters / 1e9:.1f} B | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
