"""Where the two-layer perceptrons of diffusers have their layers: by type, for the code between them is the type's own.

An up projection gives value rows, then gate rows (or the other way round); a down projection receives their product.
Where attention's output is joined to what the down projection receives, its columns come first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers.models.attention import FeedForward
from torch import nn

from slimdiff.groups.group import Inner

GATED = ("GEGLU", "SwiGLU")
PLAIN = ("GELU", "ApproximateGELU", "LinearActivation")


class Mlp(NamedTuple):
    """A type's layers.

    Attributes:
        up: those that give the inner channels out, in parts of equal width; down: the one that receives them.
        times: the parts of each `up`: 2 where one linear gives values and gates.
        between: a layer that changes each channel of `up`'s by itself.
    """

    up: tuple[str, ...]
    down: str
    times: int = 1
    between: str | None = None


_SWIGLU = Mlp(("w1", "w3"), "w2")
_ONE_LINEAR = Mlp(("linear_in",), "linear_out", 2)
_SINGLE_STREAM = Mlp(("proj_mlp",), "proj_out")
_MLPS = {
    "attention.LuminaFeedForward": Mlp(("linear_1", "linear_3"), "linear_2"),
    "transformers.auraflow_transformer_2d.AuraFlowFeedForward": Mlp(("linear_1", "linear_2"), "out_projection"),
    "transformers.sana_transformer.GLUMBConv": Mlp(("conv_inverted",), "conv_point", 2, "conv_depth"),
    "transformers.transformer_bria_fibo2.FeedForward": _SWIGLU,
    "transformers.transformer_ernie_image.ErnieImageFeedForward": Mlp(("up_proj", "gate_proj"), "linear_fc2"),
    "transformers.transformer_flux2.Flux2FeedForward": _ONE_LINEAR,
    "transformers.transformer_flux3.Flux3FeedForward": _ONE_LINEAR,
    "transformers.transformer_hidream_image.HiDreamImageFeedForwardSwiGLU": _SWIGLU,
    "transformers.transformer_ideogram4.Ideogram4MLP": _SWIGLU,
    "transformers.transformer_kandinsky.Kandinsky5FeedForward": Mlp(("in_layer",), "out_layer"),
    "transformers.transformer_omnigen.OmniGenFeedForward": Mlp(("gate_up_proj",), "down_proj", 2),
    "transformers.transformer_qwenimage21.QwenImage21SwiGLUFeedForward": Mlp(("proj", "gate_layer"), "out"),
    "transformers.transformer_stable_audio3.StableAudio3FeedForward": Mlp(("proj_in",), "proj_out", 2),
    "transformers.transformer_z_image.FeedForward": _SWIGLU,
    # Blocks of a single stream, whose down projection receives attention's output, too.
    "transformers.transformer_bria.BriaSingleTransformerBlock": _SINGLE_STREAM,
    "transformers.transformer_bria_fibo.BriaFiboSingleTransformerBlock": _SINGLE_STREAM,
    "transformers.transformer_chroma.ChromaSingleTransformerBlock": _SINGLE_STREAM,
    "transformers.transformer_flux.FluxSingleTransformerBlock": _SINGLE_STREAM,
    "transformers.transformer_flux2.Flux2ParallelSelfAttention": Mlp(("to_qkv_mlp_proj",), "to_out", 2),
    "transformers.transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock": _SINGLE_STREAM,
    "transformers.transformer_hunyuan_video.HunyuanVideoTokenReplaceSingleTransformerBlock": _SINGLE_STREAM,
    "transformers.transformer_hunyuanimage.HunyuanImageSingleTransformerBlock": _SINGLE_STREAM,
    "transformers.transformer_longcat_image.LongCatImageSingleTransformerBlock": _SINGLE_STREAM,
    "transformers.transformer_ovis_image.OvisImageSingleTransformerBlock": Mlp(("proj_mlp",), "proj_out", 2),
}
"""By module below `diffusers.models` and name of the type."""


def layout(module: Any) -> dict[str, Inner] | str | None:
    """The layers that carry a perceptron's inner channels, or why they are not known; None for another module."""
    if isinstance(module, FeedForward):
        return _of_feed_forward(module)
    kind = type(module)
    where, _, inside = kind.__module__.partition("diffusers.models.")
    mlp = None if where else _MLPS.get(f"{inside}.{kind.__qualname__}")
    if mlp is None:
        return f"{kind.__name__} is a feed-forward of a kind that is not known" if _is_one(kind.__name__) else None
    ups, down = [getattr(module, name) for name in mlp.up], getattr(module, mlp.down)
    if any(not _is_plain(layer) for layer in (*ups, down)):
        return "a projection is not a plain linear layer"
    # What a fused up projection gives before the channels are queries, keys and values: three times attention's width.
    rows, columns = ups[0].weight.shape[0], down.weight.shape[1]
    channels = _width(module, mlp, rows, columns)
    joined, before = columns - channels, rows - mlp.times * channels
    if joined < 0 or before not in (0, 3 * joined):
        return "its projections do not fit together"
    layers = {name: Inner(0, (mlp.times,), before=before) for name in mlp.up}
    if mlp.between:
        layers[mlp.between] = Inner(0, (mlp.times,))
    return layers | {mlp.down: Inner(1, before=joined)}


def _of_feed_forward(module: FeedForward) -> dict[str, Inner] | str:
    up, down = module.net[0], module.net[2]
    activation = type(up).__name__
    if activation not in GATED + PLAIN:
        return f"its activation {activation} is not one of {', '.join(GATED + PLAIN)}"
    if type(up.proj) is not nn.Linear or type(down) is not nn.Linear:
        return "a projection is not a plain linear layer"
    return {"net.0.proj": Inner(0, times=(2, 1)), "net.2": Inner(1)}


def _width(module: Any, mlp: Mlp, rows: int, columns: int) -> int:
    """Channels of the perceptron alone: of a fused up projection, `rows = 3 a + t n` and `columns = a + n`."""
    if mlp.up == ("to_qkv_mlp_proj",):
        return (3 * columns - rows) // (3 - mlp.times)
    return rows // mlp.times


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1)


def _is_one(name: str) -> bool:
    return name.endswith(("FeedForward", "MLP", "Mlp", "FeedForwardSwiGLU"))
