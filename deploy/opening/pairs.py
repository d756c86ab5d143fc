"""Two artifacts of any kind as pipelines that make the same images: of one size, and as many at once as both take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifacts.kinds import kind_of
from deploy.opening.openers import Opened, open_denoiser, whole_pipeline
from exporters.graphs.int8_layers import share_of_macs
from exporters.graphs.reading import read_graph
from slimdiff.denoising.sizes import pixels_per_latent
from slimdiff.denoising.tasks import for_task
from slimdiff.denoising.trajectory import denoiser_name
from slimdiff.errors import InputError
from slimdiff.prompts.material import Material
from slimdiff.settings import Lora, Sampling, SteeringSettings

_WIDTHS = ("in_channels", "out_channels", "cross_attention_dim")
"""What two denoisers that are called alike have in common."""


@dataclass
class Side:
    """One of the two."""

    name: str
    opened: Opened
    pipeline: Any

    @property
    def fixed_batch(self) -> bool:
        """Whether its graph takes one number of images at once, and no other."""
        return self.opened.kind != "model" and isinstance(self.opened.denoiser.batch, int)

    @property
    def size(self) -> dict[str, int]:
        """Height and width of the images that it makes if nobody says another size; empty if that is not known."""
        denoiser = getattr(self.pipeline, denoiser_name(self.pipeline))
        side, scale = getattr(denoiser.config, "sample_size", None), pixels_per_latent(self.pipeline)
        return dict.fromkeys(("height", "width"), side * scale) if isinstance(side, int) else {}

    @property
    def precision(self) -> dict[str, Any]:
        """`precision` that its denoiser computes in, and `int8_macs`: the part of its multiply-adds that is in int8,
        None where that is not known."""
        opened, found = self.opened, {"precision": self.opened.precision, "int8_macs": 0.0}
        if opened.kind == "model" or opened.precision != "int8":
            return found
        graph = Path(opened.denoiser.session.source)
        return found | {"int8_macs": share_of_macs(read_graph(graph)) if graph.suffix == ".onnx" else None}

    def shorter_side(self, sampling: Sampling) -> int | None:
        """Of its images, pixels; None if it is not known before there are any."""
        asked = [side for side in (sampling.height, sampling.width) if side]
        return min(asked or self.size.values(), default=None)


def open_pair(
    dense: str,
    slim: str,
    sampling: Sampling,
    runtime: str | None,
    rest: str | None,
    variants: Mapping[str | None, str | None],
    material: Material,
    loras: Mapping[str, Sequence[Lora]],
    steering: SteeringSettings | None = None,
) -> tuple[Side, Side, Sampling]:
    """Open both, and say how they make the same images.

    Args:
        runtime: of ONNX and bundles.
        rest: the model that gives the other components to a denoiser alone; the other of the two if it is whole.
        variants: of the models' weights.
        material: what their images are made from, which decides the pipelines that they run in.
        loras: to fuse into `dense` and `slim`.
        steering: to add to those of them that are models.

    Raises:
        InputError: if they cannot make the same images.
    """
    kinds = {name: kind_of(name) for name in (dense, slim)}
    takes = [name for name, kind in kinds.items() if kind in ("onnx", "bundle")] or [dense]
    sides = []
    for name, lora in ((dense, loras["dense"]), (slim, loras["slim"])):
        chosen, added = runtime if name in takes else None, steering if kinds[name] == "model" else None
        how: dict[str, Any] = {"variant": variants[name], "lora": lora, "rest": rest, "steering": added}
        opened = open_denoiser(name, chosen, **how)
        sides.append(Side(name, opened, opened.pipeline))
    whole = next((side.name for side in sides if side.opened.kind == "model" and side.pipeline is not None), None)
    for side in sides:
        if side.pipeline is None:
            place = rest or (None if (Path(side.name) / "model_index.json").is_file() else whole)
            side.pipeline = whole_pipeline(side.opened, side.name, place, variants.get(place))
        side.pipeline = for_task(side.pipeline, material)
    one, other_side = sides
    _check_alike(one, other_side)
    for side in sides:
        sampling = side.opened.sampling(sampling, side.pipeline)
    if one.opened.sampling(sampling, one.pipeline).batch != sampling.batch:
        raise InputError(
            f"{dense} and {slim} take other numbers of images at once: export one as the other, or with --dynamic batch"
        )
    fixed = [side.opened.pixels(side.pipeline) for side in sides]
    sizes = fixed if any(fixed) else [side.size for side in sides]
    if all(sizes) and sizes[0] != sizes[1]:
        said = " and ".join(" x ".join(map(str, size.values())) for size in sizes)
        raise InputError(f"{dense} and {slim} make images of {said}, which cannot be compared: name two of one size")
    return one, other_side, sampling.model_copy(update=fixed[0] | fixed[1])


def _check_alike(one: Side, other: Side) -> None:
    """Refuse denoisers that the same call cannot go through."""
    configs = [getattr(side.pipeline, denoiser_name(side.pipeline)).config for side in (one, other)]
    for name in _WIDTHS:
        widths = [getattr(config, name, None) for config in configs]
        if None not in widths and widths[0] != widths[1]:
            raise InputError(
                f"{one.name} has {name} {widths[0]} and {other.name} {widths[1]}: they are no two forms of one model"
            )
