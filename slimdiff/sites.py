"""Where a denoiser can be slimmed: found by module type, never by model name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusers.models import attention_processor as processors
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

Group = Literal["query_key", "value_output", "feed_forward"]
GROUPS: tuple[Group, ...] = ("query_key", "value_output", "feed_forward")

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
        path: the `Attention` or `FeedForward` module's path in the denoiser.
        heads: number of heads; 1 for `feed_forward`.
        dense_rank: the inner dimension of the dense model: per head for attention, channels for `feed_forward`.
        cost: parameters that one unit of rank costs (per head dimension: all heads' rows, columns and biases).
    """

    path: str
    group: Group
    heads: int
    dense_rank: int
    cost: int

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


def find_sites(denoiser: nn.Module) -> tuple[list[Site], list[dict[str, str]]]:
    """Every site of a denoiser in the order of its modules, and those that must stay dense.

    Returns:
        the sites, and `{"site": path, "reason": text}` for attention and feed-forward modules that cannot be slimmed.
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
        else:
            continue
        if reason is not None:
            left_dense.append({"site": path, "reason": reason})
    return sites, left_dense


def _attention_obstacle(attention: Attention) -> str | None:
    linears = [attention.to_q, attention.to_k, attention.to_v, (attention.to_out or [None])[0]]
    if attention.added_kv_proj_dim is not None or attention.only_cross_attention:
        return "added key and value projections"
    if any(type(linear) is not nn.Linear for linear in linears):
        return "a projection is not a plain linear layer (a LoRA adapter? fuse it first)"
    if attention.fused_projections:
        return "fused projections (call unfuse_qkv_projections first)"
    if attention.norm_q is not None or attention.norm_k is not None:
        return "queries and keys are normalised (qk-norm)"
    if attention.inner_kv_dim != attention.inner_dim:
        return "fewer key and value heads than query heads"
    if attention.inner_dim % attention.heads:
        return f"its {attention.inner_dim} inner dimensions do not divide into {attention.heads} heads"
    if not attention.scale_qk:
        return "unscaled scores"
    if type(attention.processor).__name__ not in _STOCK_PROCESSORS or not isinstance(
        attention.processor, getattr(processors, type(attention.processor).__name__, ())
    ):
        return f"its processor {type(attention.processor).__name__} may do more than softmax attention"
    return None


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
        return "a projection is not a plain linear layer (a LoRA adapter? fuse it first)"
    return None


def _feed_forward_site(path: str, feed_forward: FeedForward) -> Site:
    up, down, gated = feed_forward_linears(feed_forward)
    rows = 2 if gated else 1
    cost = rows * (up.in_features + (up.bias is not None)) + down.out_features
    return Site(path, "feed_forward", 1, down.in_features, cost)
