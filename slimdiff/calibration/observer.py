"""Hooks that add what the sites' linear layers compute to statistics, in every forward pass of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.denoising.trajectory import time_of, watch_calls
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Site
from slimdiff.statistics import Statistics

# Successive multiples of the golden ratio, modulo 1, spread over the unit interval at any length.
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Observer:
    """Adds the activations of some sites to statistics: an even selection of each call's tokens, times its weight.

    Attributes:
        weigh: gives a timestep's weight.
        calls: how many calls like the present one the whole calibration has: what the share of tokens is taken from.
        step: of the latest call in its trajectory; before each batch, that of its first call less one.
        weight: of the present call's timestep.
    """

    statistics: Statistics
    tokens_per_dimension: int | None
    weigh: Callable[[float], float]
    calls: float = 1.0
    step: int = -1
    weight: float = 1.0

    @contextmanager
    def watching(self, denoiser: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
        """Every forward pass of the denoiser in this block adds to the statistics of these sites.

        Raises:
            InputError: in a forward pass, if an activation is not finite.
        """
        with ExitStack() as stack:
            # After every call, so that the first site to overflow is the one that is named.
            stack.enter_context(denoiser.register_forward_hook(lambda *_: self.statistics.check_finite()))
            for site in sites:
                for handle in GROUPS[site.group].watch(denoiser.get_submodule(site.path), site, self):
                    stack.enter_context(handle)
            with torch.no_grad(), watch_calls(denoiser, self._begin):
                yield

    def _begin(self, arguments: dict[str, Any]) -> None:
        self.step += 1
        self.weight = self.weigh(time_of(arguments))

    def add_rows(self, site: Site, x: Tensor, what: str = "") -> None:
        """Add `x [B, T, n]` to the sums named after the site, or `what` of it: the triangle of E[x x^T], and E[x]."""
        taken, of = self._taken(x, site), x.shape[0] * x.shape[1]
        x = x if taken is None else x[:, taken]
        name = f"{site.name}.{what}" if what else site.name
        self.statistics.add_rows(name, x.float().flatten(0, 1), self.weight, of)

    def add_heads(
        self, site: Site, what: str, x: Tensor, attended: Tensor | None = None, mean: Tensor | None = None
    ) -> None:
        """Add `x [B, T, H d]` to one moment per head, `what` of the site.

        Args:
            attended: float `[B, T, 1]`, zero for the tokens that do not count.
            mean: float32 `[B, 1, H d]`, subtracted first.
        """
        taken = self._taken(x, site)
        of = x.shape[0] * x.shape[1] if attended is None else int(attended.sum())
        if taken is not None:
            x = x[:, taken]
            attended = None if attended is None else attended[:, taken]
        x = x.float() if mean is None else x.float() - mean
        x = x if attended is None else x * attended
        tokens = None if attended is None else int(attended.sum())
        rows = x.reshape(-1, site.heads, site.dense_rank).transpose(0, 1)
        self.statistics.add_heads(f"{site.name}.{what}", rows, self.weight, tokens, of)

    def _taken(self, x: Tensor, site: Site) -> Tensor | None:
        """Positions of the tokens to take from x `[B, T, n]`; None for all of them.

        As many as bring the site's rows over the whole calibration to `tokens_per_dimension` times its width, evenly
        spread, shifted from step to step. They are the same for every sample of a call and depend on its step alone:
        so what is collected does not depend on how images are batched or dealt out.
        """
        if self.tokens_per_dimension is None:
            return None
        batch, count, _ = x.shape
        rows = self.tokens_per_dimension * max(site.widths) / self.calls
        share = math.ceil(rows / batch - 1e-9)
        if share >= count:
            return None
        shift = self.step * _GOLDEN % 1
        return ((torch.arange(share, dtype=torch.float64) + shift) * (count / share)).long().to(x.device)
