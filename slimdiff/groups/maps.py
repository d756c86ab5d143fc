"""What slimming does to a weight, apart from the weight: it is linear in it, `W' = L^T W R`.

L takes dense outputs to those that are kept, R gives dense inputs back from the kept ones. They hold for any weight in
the layer's place: so an update `up @ down` of the dense layer, of whatever rank, is `L^T up` and `down R` of the slim
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

# Beyond it the mixture is kept in float32: half a mantissa is enough, the range may not be.
_LARGEST_HALF = 6e4
# Below this share of the largest singular value, a weight says nothing of what was done to it.
_CUTOFF = 1e-3


@dataclass
class AxisMap:
    """A map M from the r dimensions of a slim axis to the n of the dense one: `K + P N + c d^T + F`.

    A basis, K or P, is a selection (indices, int32 `[r]`) or a block for each head (`[H, d, r]`).

    Attributes:
        kept: K, `[n, r]`; the identity if there is none.
        rest: P, of what was removed; mixed: N, how that is made of what is kept.
        mean: c `[n]`, what stays of the mean when a bias carries it; ones: d `[r]`, how the kept dimensions make a 1.
            A layer's own weight does without them, for its bias has that part; an update has no bias.
        change: F `[n, r]`, by which the layer was solved again on what it receives in the slim model.
    """

    kept: Tensor | None = None
    rest: Tensor | None = None
    mixed: Tensor | None = None
    mean: Tensor | None = None
    ones: Tensor | None = None
    change: Tensor | None = None

    def fold(self, weight: Tensor, *, has_bias: bool = False) -> Tensor:
        """`M^T weight`, of a weight with the dense axis first `[n, ...]`: `[r, ...]`, float64.

        Args:
            has_bias: whether a bias carries the mean, so that c is left out.
        """
        flat = weight.double().flatten(1)
        folded = flat if self.kept is None else project(self.kept, flat)
        if self.rest is not None and self.mixed is not None:
            folded = folded + self.mixed.double().T @ project(self.rest, flat)
        if self.mean is not None and self.ones is not None and not has_bias:
            folded = folded + torch.outer(self.ones.double(), self.mean.double() @ flat)
        if self.change is not None:
            folded = folded + self.change.double().T @ flat
        return folded.unflatten(1, weight.shape[1:])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What there is, as it is stored: mixtures in half precision where that holds them."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is None:
                continue
            if tensor.is_floating_point():
                narrow = field.name in ("mixed", "change") and not (tensor.abs() > _LARGEST_HALF).any()
                tensor = tensor.to(torch.float16 if narrow else torch.float32)
            yield field.name, tensor.contiguous()


class LayerMap(NamedTuple):
    """The maps of a layer's outputs and inputs; None where they are the dense ones."""

    out: AxisMap | None = None
    into: AxisMap | None = None

    def update(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """An update's matrices `[out, rank, ...]` and `[rank, in, ...]` on the slim layer, float64."""
        up = up.double() if self.out is None else self.out.fold(up)
        down = down.double() if self.into is None else self.into.fold(down.transpose(0, 1)).transpose(0, 1)
        return up, down

    def weight(self, weight: Tensor, *, has_bias: bool) -> Tensor:
        """The slim layer's weight, float64."""
        half = weight.double() if self.out is None else self.out.fold(weight)
        return half if self.into is None else self.into.fold(half.transpose(0, 1), has_bias=has_bias).transpose(0, 1)


Maps = dict[str, LayerMap]
"""By path of a layer in the denoiser."""


def project(basis: Tensor, weight: Tensor) -> Tensor:
    """`B^T weight`."""
    if not basis.is_floating_point():
        return weight[basis.long()]
    heads, d, _ = basis.shape
    return (basis.double().mT @ weight.reshape(heads, d, -1)).flatten(0, 1)


def change_of(dense: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The least F with `dense F = after - before`, float64 `[n, r]`: what a layer gained when it was solved again.

    Least squares are linear in what they are to give out, `W x`, and so in the dense weight W `[out, n, ...]`; in
    directions of the input that it does not see nothing moves. `before` and `after` are slim weights `[out, r, ...]`.
    """
    wide, moved = dense.double().flatten(1), (after.double() - before.double()).flatten(1)
    return torch.linalg.lstsq(wide, moved, rcond=_CUTOFF, driver="gelsd").solution
