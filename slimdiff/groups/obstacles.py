"""What keeps attention, or a part of it, dense: what a module does between its projections that closed forms must know.

Queries and keys meet in scores; a norm or a rotation between a projection and the scores is no part of the algebra.
Values are mixed over tokens, head by head, and go into the output projections: what is done to queries and keys does
not touch them.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from torch import nn

# Processors that compute plain softmax attention with a scale of 1/sqrt(head dim): what the closed forms assume.
_STOCK_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
    "AttnProcessorNPU",
)
# Processors that mix values over tokens, each head by itself, and project the result: read, and held by tests.
_MIXING = (
    *("AttnProcessor", "AttnProcessor2_0", "AuraFlowAttnProcessor2_0", "CogVideoXAttnProcessor2_0"),
    *("CogView4AttnProcessor", "Flux2AttnProcessor", "FluxAttnProcessor", "HunyuanAttnProcessor2_0"),
    *("JointAttnProcessor2_0", "LTXVideoAttnProcessor", "Lumina2AttnProcessor2_0", "QwenDoubleStreamAttnProcessor2_0"),
    *("SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0", "WanAttnProcessor", "ZSingleStreamAttnProcessor"),
)


def of_queries(attention: Any) -> str | None:
    """Everything that keeps queries and keys dense, or None."""
    if not isinstance(attention, Attention):
        return "; ".join([f"{type(attention).__name__} is an attention class of its own", *_oddities(attention)])
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
    names = inspect.signature(processor.__call__).parameters if processor is not None else ()
    if any("rotary" in name or name == "freqs_cis" for name in names):
        reasons.append("rotary positions turn queries and keys")
    return reasons


def of_values(attention: Any) -> str | None:
    """What keeps values dense where queries and keys are, or None."""
    out = getattr(attention, "to_out", None)
    if not isinstance(out, nn.ModuleList) or getattr(attention, "to_v", None) is None:
        return "values have no projections of their own on both sides"
    added = [getattr(attention, name, None) for name in ("add_v_proj", "to_add_out")]
    if any(type(layer) is not nn.Linear for layer in (attention.to_v, out[0], *filter(None, added))):
        return "a projection is not a plain linear layer"
    if attention.fused_projections:
        return "fused projections (call unfuse_qkv_projections first)"
    width, heads, values = out[0].in_features, attention.heads, attention.to_v.out_features
    if width % heads or values % (width // heads) or heads % (values // (width // heads)):
        return f"its {values} values do not divide into heads like its {heads} query heads"
    processor = type(attention.processor)
    if processor.__name__ not in _MIXING or not processor.__module__.startswith("diffusers."):
        return f"its processor {processor.__name__} may do more to values than mix them"
    return None
