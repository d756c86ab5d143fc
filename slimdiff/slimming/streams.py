"""Which layers are solved again, and where the residual stream can be read that their outputs join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusers import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from slimdiff.groups import GROUPS
from slimdiff.plan import Plan

# Least squares over a convolution's patches take two halves' sums, and one solution in float64.
MOST_SUM_BYTES = 2 * 2**30


class Spot(NamedTuple):
    """Where a sum can be read: in what a module receives, or in what it gives, times a scale."""

    path: str
    received: bool = False
    scale: float = 1.0


class Layer(NamedTuple):
    """A linear or convolution that is solved again.

    Attributes:
        path: in the denoiser.
        beside: of one of 1 x 1 that is solved with it, whose output joins the same sum.
        stream: where the sum can be read that its output joins; None where its output alone is to be the dense one.
        share: of the rows that memory holds; as many as it has inputs where layers are of very different widths.
    """

    path: str
    beside: str = ""
    stream: Spot | None = None
    share: int = 1

    @property
    def paths(self) -> list[str]:
        return [self.path, self.beside] if self.beside else [self.path]


def output_projection(denoiser: nn.Module, path: str) -> str | None:
    """Path of the projection (linear, or a convolution of 1 x 1) at the end of the transformer that a module is in.

    None where there is none: a transformer's blocks then add to a stream that goes on.
    """
    while path:
        path = path.rpartition(".")[0]
        last = getattr(denoiser.get_submodule(path), "proj_out", None)
        if type(last) is nn.Linear or (type(last) is nn.Conv2d and last.kernel_size == (1, 1) and last.groups == 1):
            return f"{path}.proj_out".lstrip(".")
    return None


def everything(denoiser: nn.Module, plan: Plan) -> list[Layer]:
    """Every layer that a plan's sites add to the stream by, slim or not, and the projections behind them."""
    found: dict[str, Layer] = {}
    for site in plan.sites.values():
        module: Any = denoiser.get_submodule(site.path)
        first, *others = [f"{site.path}.{name}" for name in GROUPS[site.group].added] or [""]
        beside = next((path for path in others if _layer(denoiser, path) is not None), "")
        if _layer(denoiser, first) is not None and first not in found:
            if _sum_bytes(denoiser, [first, *[beside] * bool(beside)]) > MOST_SUM_BYTES:
                first, beside = beside, ""
            if first:
                found[first] = _with_share(denoiser, Layer(first, beside, _stream(denoiser, site.path, module)))
        projection = output_projection(denoiser, site.path)
        if projection is not None and projection not in found:
            around = projection.rpartition(".")[0]
            whole: Any = denoiser.get_submodule(around)
            joins = type(whole) is Transformer2DModel and whole.is_input_continuous
            found[projection] = _with_share(denoiser, Layer(projection, stream=Spot(around) if joins else None))
    return list(found.values())


def _layer(denoiser: nn.Module, path: str) -> Any:
    """The linear or convolution at a path that can be solved; None if there is none."""
    try:
        layer = denoiser.get_submodule(path) if path else None
    except AttributeError:
        return None
    if isinstance(layer, nn.Conv2d):
        size = layer.kernel_size[0]
        simple = layer.groups == 1 and layer.stride == (1, 1) and layer.padding == (size // 2,) * 2
        return layer if simple and layer.kernel_size in ((1, 1), (3, 3)) and layer.padding_mode == "zeros" else None
    return layer if isinstance(layer, nn.Linear) else None


def _inputs(denoiser: nn.Module, paths: Sequence[str]) -> int:
    return sum(denoiser.get_parameter(f"{path}.weight")[0].numel() for path in paths)


def _sum_bytes(denoiser: nn.Module, paths: Sequence[str]) -> int:
    inputs = _inputs(denoiser, paths)
    return 4 * inputs * (inputs + len(denoiser.get_parameter(f"{paths[0]}.weight"))) * (2 + 5)


def _with_share(denoiser: nn.Module, layer: Layer) -> Layer:
    return layer._replace(share=_inputs(denoiser, layer.paths))


def _stream(denoiser: nn.Module, path: str, module: nn.Module) -> Spot | None:
    """Where the sum can be read that a module's last layer joins; None where that is not known."""
    if isinstance(module, ResnetBlock2D):
        return Spot(path, scale=float(module.output_scale_factor))
    parent, _, name = path.rpartition(".")
    block = denoiser.get_submodule(parent)
    if type(block) is not BasicTransformerBlock or getattr(block, "norm_type", "") != "layer_norm":
        return None
    if getattr(module, "residual_connection", False) or getattr(module, "rescale_output_factor", 1.0) != 1:
        return None
    # What a sub-layer's output is added to goes into the next one's norm, or out of the block.
    after = {"attn1": ("norm2", "norm3"), "attn2": ("norm3",), "ff": ()}.get(name)
    if after is None or hasattr(block, "fuser"):
        return None
    norm = next((norm for norm in after if getattr(block, norm, None) is not None), None)
    return Spot(parent) if norm is None else Spot(f"{parent}.{norm}", received=True)
