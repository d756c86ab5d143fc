"""Hooks that add what the sites' linear layers compute to statistics, in every forward pass of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.denoising.trajectory import watch_calls
from slimdiff.groups.sites import Site, attention_linears, feed_forward_linears, resnet_layers
from slimdiff.statistics import Statistics

# Successive multiples of the golden ratio, modulo 1, spread over the unit interval at any length.
_GOLDEN = (math.sqrt(5) - 1) / 2


class Observer:
    """Adds the activations of some sites to statistics.

    Attributes:
        calls: how many calls like the present one the whole calibration has: what the share of tokens is taken from.
        step: of the present call in its trajectory, from 0.
        weight: of the present call's timestep.
    """

    def __init__(
        self,
        statistics: Statistics,
        *,
        tokens_per_dimension: int | None,
        weigh: Callable[[float], float],
    ) -> None:
        self.statistics = statistics
        self.tokens_per_dimension = tokens_per_dimension
        self.weigh = weigh
        self.calls = 1.0
        self.step = -1
        self.weight = 1.0
        self._attended: dict[str, Tensor | None] = {}

    @contextmanager
    def watching(self, denoiser: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
        """Every forward pass of the denoiser in this block adds to the statistics of these sites.

        Raises:
            InputError: in a forward pass, if an activation is not finite.
        """
        # After every call, so that the first site to overflow is the one that is named.
        handles: list[Any] = [denoiser.register_forward_hook(lambda *_: self.statistics.check_finite())]
        for site in sites:
            module = denoiser.get_submodule(site.path)
            if site.group == "feed_forward":
                handles.append(feed_forward_linears(module)[1].register_forward_pre_hook(self._inputs(site)))
                continue
            if site.group == "resnet":
                handles.append(resnet_layers(module).second.register_forward_pre_hook(self._inputs(site)))
                continue
            query, key, value, output = attention_linears(module)
            handles.append(module.register_forward_pre_hook(self._mask(site), with_kwargs=True))
            if site.group == "query_key":
                handles.append(query.register_forward_hook(self._per_head(site, "query")))
                handles.append(key.register_forward_hook(self._per_head(site, "key")))
            else:
                handles.append(output.register_forward_pre_hook(self._inputs(site)))
                handles.append(value.register_forward_hook(self._per_head(site, "value")))
        try:
            with torch.no_grad(), watch_calls(denoiser, self._begin):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_trajectory(self, step: int, calls: float) -> None:
        """Before each batch: the step of its first call, and `calls`."""
        self.step, self.calls = step - 1, calls

    def _begin(self, arguments: dict[str, Any]) -> None:
        self.step += 1
        self.weight = self.weigh(float(torch.as_tensor(arguments["timestep"]).flatten()[0]))

    def _inputs(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            # A convolution receives [B, n, H, W], whose tokens are its pixels.
            x = x.flatten(2).mT if site.group == "resnet" else x.reshape(-1, *x.shape[-2:])
            taken, of = self._taken(x, site), x.shape[0] * x.shape[1]
            x = x if taken is None else x[:, taken]
            self.statistics.add_rows(site.name, x.float().flatten(0, 1), self.weight, of)

        return hook

    def _per_head(self, site: Site, what: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            x = output.detach()
            mask = self._attended.get(site.path) if what != "query" else None
            attended = None if mask is None else mask.to(x.device).reshape(len(x), -1, 1)
            mean = None
            if what == "key":
                # Over an image's tokens: softmax does not see what all keys of an image have in common.
                mean = _mean(x, attended)
                self.statistics.add_heads(f"{site.name}.key_mean", _heads(mean, site), self.weight)
            taken = self._taken(x, site)
            of = x.shape[0] * x.shape[1] if attended is None else int(attended.sum())
            if taken is not None:
                x = x[:, taken]
                attended = None if attended is None else attended[:, taken]
            x = x.float() if mean is None else x.float() - mean
            x = x if attended is None else x * attended
            tokens = None if attended is None else int(attended.sum())
            self.statistics.add_heads(f"{site.name}.{what}", _heads(x, site), self.weight, tokens, of)

        return hook

    def _mask(self, site: Site) -> Callable[..., None]:
        """Keep which keys a mask leaves: `attention_mask` is an additive bias `[B, 1, L]`, far below zero where not."""

        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            bias = kwargs.get("attention_mask")
            states = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            keys: Tensor = (args[0] if args else kwargs["hidden_states"]) if states is None else states
            fits = isinstance(bias, Tensor) and bias.is_floating_point() and bias.numel() == keys[..., 0].numel()
            self._attended[site.path] = (bias > -1).float() if isinstance(bias, Tensor) and fits else None

        return hook

    def _taken(self, x: Tensor, site: Site) -> Tensor | None:
        """Positions of the tokens to take from x `[B, T, n]`; None for all of them.

        As many as bring the site's rows over the whole calibration to `tokens_per_dimension` times its width, evenly
        spread, shifted from step to step. They are the same for every sample of a call and depend on its step alone:
        so what is collected does not depend on how images are batched or dealt out.
        """
        if self.tokens_per_dimension is None:
            return None
        batch, count, _ = x.shape
        wanted = self.tokens_per_dimension * site.heads * site.dense_rank / self.calls
        share = math.ceil(wanted / batch - 1e-9)
        if share >= count:
            return None
        shift = self.step * _GOLDEN % 1
        return ((torch.arange(share, dtype=torch.float64) + shift) * (count / share)).long().to(x.device)


def _heads(x: Tensor, site: Site) -> Tensor:
    """`[B, T, H d]` as `[H, B T, d]`."""
    return x.reshape(-1, site.heads, site.dense_rank).transpose(0, 1)


def _mean(x: Tensor, attended: Tensor | None) -> Tensor:
    """Mean over the tokens of `[B, T, n]`, float32 `[B, 1, n]`."""
    if attended is None:
        return x.mean(dim=1, keepdim=True, dtype=torch.float32)
    return (x.float() * attended).sum(1, keepdim=True) / attended.sum(1, keepdim=True).clamp(min=1)
