"""Where a denoiser can be slimmed: found by module type, never by model name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from diffusers.models import attention_processor as processors
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D, TemporalResnetBlock
from torch import nn

from slimdiff.settings import Group

_GATED = ("GEGLU", "SwiGLU")
_PLAIN = ("GELU", "ApproximateGELU", "LinearActivation")
# Processors that compute plain softmax attention with a scale of 1/sqrt(head dim): what the closed forms assume.
_STOCK_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
    "AttnProcessorNPU",
)


@dataclass(frozen=True)
class Site:
    """One group at one module path.

    Attributes:
        path: the `Attention`, `FeedForward` or `ResnetBlock2D` module's path in the denoiser.
        heads: number of heads; 1 but for attention.
        dense_rank: the inner dimension of the dense model: per head for attention, channels for the others.
        cost: parameters that one unit of rank costs (per head dimension: all heads' rows, columns and biases).
        multiple: ranks are multiples of this: the groups of a resnet's inner norm, which must stay equal.
    """

    path: str
    group: Group
    heads: int
    dense_rank: int
    cost: int
    multiple: int = 1

    @property
    def name(self) -> str:
        return f"{self.path}.{self.group}"


def attention_linears(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """The query, key, value and output projections of a slimmable `Attention`."""
    return attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]  # type: ignore[union-attr,index,return-value]


def feed_forward_linears(feed_forward: nn.Module) -> tuple[nn.Linear, nn.Linear, bool]:
    """The up and down projections of a slimmable `FeedForward`, and whether up holds value rows and then gate rows."""
    net: nn.ModuleList = feed_forward.net  # type: ignore[assignment]
    return net[0].proj, net[2], type(net[0]).__name__ in _GATED  # type: ignore[return-value]


def last_linear(denoiser: nn.Module, path: str) -> str:
    """Path of the last linear of a slimmable `Attention` or `FeedForward`."""
    return f"{path}.to_out.0" if isinstance(denoiser.get_submodule(path), Attention) else f"{path}.net.2"


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


@dataclass(frozen=True)
class ResnetLayers:
    """The layers of a slimmable `ResnetBlock2D` that share its inner channels.

    Attributes:
        time: the projection of the time embedding, whose outputs are added to the inner channels, or None.
        parts: 2 if `time` gives a scale and then a shift per channel, applied after `norm`; else 1.
    """

    first: nn.Conv2d
    time: nn.Linear | None
    norm: nn.GroupNorm
    second: nn.Conv2d
    parts: int


def resnet_layers(block: nn.Module) -> ResnetLayers:
    """The inner layers of a slimmable `ResnetBlock2D`."""
    parts = 2 if block.time_embedding_norm == "scale_shift" else 1
    return ResnetLayers(block.conv1, block.time_emb_proj, block.norm2, block.conv2, parts)  # type: ignore[arg-type]


def find_sites(denoiser: nn.Module) -> tuple[list[Site], list[dict[str, str]]]:
    """Every site of a denoiser in the order of its modules, and those that must stay dense.

    query_key and value_output keep the same rank in a layer, so what hinders one leaves the layer's attention dense.

    Returns:
        the sites, and `{"site": path, "reason": text}` for modules of these kinds that cannot be slimmed.
    """
    sites: list[Site] = []
    left_dense: list[dict[str, str]] = []
    for path, module in denoiser.named_modules():
        if isinstance(module, Attention):
            reason = _attention_obstacle(module)
            if reason is None:
                sites += _attention_sites(path, module)
        elif isinstance(module, FeedForward):
            reason = _feed_forward_obstacle(module)
            if reason is None:
                sites.append(_feed_forward_site(path, module))
        elif isinstance(module, ResnetBlock2D):
            reason = _resnet_obstacle(module)
            if reason is None:
                sites.append(_resnet_site(path, module))
        elif isinstance(module, ResnetBlockCondNorm2D | TemporalResnetBlock):
            reason = f"{type(module).__name__} is a resnet class of its own"
        elif isinstance(module, AttentionModuleMixin):
            reason = "; ".join([f"{type(module).__name__} is an attention class of its own", *_oddities(module)])
        else:
            continue
        if reason is not None:
            left_dense.append({"site": path, "reason": reason})
    return sites, left_dense


def _attention_obstacle(attention: Attention) -> str | None:
    """Everything that keeps an attention layer dense, or None."""
    reasons = _oddities(attention)
    if attention.to_out is None:
        reasons.append("no output projection of its own")
    elif not attention.only_cross_attention:
        linears = [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]]
        if any(type(linear) is not nn.Linear for linear in linears):
            reasons.append("a projection is not a plain linear layer")
    if attention.fused_projections:
        reasons.append("fused projections (call unfuse_qkv_projections first)")
    if attention.inner_kv_dim != attention.inner_dim:
        reasons.append("fewer key and value heads than query heads")
    if attention.inner_dim % attention.heads:
        reasons.append(f"its {attention.inner_dim} inner dimensions do not divide into {attention.heads} heads")
    if not attention.scale_qk:
        reasons.append("unscaled scores")
    processor = type(attention.processor).__name__
    if not reasons and not (
        processor in _STOCK_PROCESSORS and isinstance(attention.processor, getattr(processors, processor, ()))
    ):
        reasons.append(f"its processor {processor} may do more than softmax attention")
    return "; ".join(reasons) or None


def _oddities(attention: nn.Module) -> list[str]:
    """What an attention module of any class does between its projections that the closed forms do not know."""
    reasons = []
    if getattr(attention, "added_kv_proj_dim", None) is not None:
        reasons.append("added key and value projections")
    if getattr(attention, "norm_q", None) is not None or getattr(attention, "norm_k", None) is not None:
        reasons.append("queries and keys are normalised (qk-norm)")
    processor = getattr(attention, "processor", None)
    if processor is not None and any("rotary" in name for name in inspect.signature(processor.__call__).parameters):
        reasons.append("rotary positions turn queries and keys")
    return reasons


def _attention_sites(path: str, attention: Attention) -> list[Site]:
    query, key, value, output = attention_linears(attention)
    rank = attention.inner_dim // attention.heads
    pair = query.in_features + key.in_features + (query.bias is not None) + (key.bias is not None)
    through = value.in_features + output.out_features + (value.bias is not None)
    return [
        Site(path, "query_key", attention.heads, rank, attention.heads * pair),
        Site(path, "value_output", attention.heads, rank, attention.heads * through),
    ]


def _feed_forward_obstacle(feed_forward: FeedForward) -> str | None:
    net = feed_forward.net
    activation = type(net[0]).__name__
    if activation not in _GATED + _PLAIN:
        return f"its activation {activation} is not one of {', '.join(_GATED + _PLAIN)}"
    if type(net[0].proj) is not nn.Linear or type(net[2]) is not nn.Linear:
        return "a projection is not a plain linear layer"
    return None


def _feed_forward_site(path: str, feed_forward: FeedForward) -> Site:
    up, down, gated = feed_forward_linears(feed_forward)
    rows = 2 if gated else 1
    cost = rows * (up.in_features + (up.bias is not None)) + down.out_features
    return Site(path, "feed_forward", 1, down.in_features, cost)


def _resnet_obstacle(block: ResnetBlock2D) -> str | None:
    if type(block) is not ResnetBlock2D:
        return f"{type(block).__name__} is a resnet class of its own"
    convolutions = (block.conv1, block.conv2)
    if any(type(c) is not nn.Conv2d or not _plain_3x3(c) for c in convolutions):
        return "a convolution is not a plain one of 3 x 3 with a bias"
    if type(block.time_emb_proj) not in (nn.Linear, type(None)):
        return "the projection of the time embedding is not a plain linear layer"
    if type(block.norm2) is not nn.GroupNorm or not block.norm2.affine:
        return "the inner norm is not a plain group norm"
    if block.norm2.num_groups == block.norm2.num_channels:
        return "the inner norm has one channel per group: none can go"
    return None


def _plain_3x3(convolution: nn.Conv2d) -> bool:
    c = convolution
    plain = (c.stride, c.padding, c.dilation) == ((1, 1), (1, 1), (1, 1)) and c.groups == 1
    return plain and c.kernel_size == (3, 3) and c.padding_mode == "zeros" and c.bias is not None


def _resnet_site(path: str, block: ResnetBlock2D) -> Site:
    layers = resnet_layers(block)
    taps = layers.first.weight[0, 0].numel()
    cost = taps * (layers.first.in_channels + layers.second.out_channels) + 3  # biases of conv1 and norm, norm's weight
    if layers.time is not None:
        cost += layers.parts * (layers.time.in_features + (layers.time.bias is not None))
    return Site(path, "resnet", 1, layers.norm.num_channels, cost, layers.norm.num_groups)
