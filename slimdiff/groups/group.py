"""What a kind of group says of itself, and what all kinds have in common.

A group is the layers of a module that share an inner dimension. Most of what others ask follows from `Group.inner`:
what a unit of rank costs, smaller weights and layers, and where graphs and engines show the rank. A new kind needs no
more than `site`, `factor` and `slim` beside it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from slimdiff.denoising.trajectory import Call
from slimdiff.groups.maps import Maps
from slimdiff.settings import Forms, ResnetSettings
from slimdiff.statistics import Statistics, triangle_size

if TYPE_CHECKING:
    from slimdiff.calibration.observer import Observer


@dataclass(frozen=True)
class Site:
    """One group at one module path.

    Attributes:
        path: the module's path in the denoiser.
        group: the group's name.
        heads: number of heads; 1 but for attention.
        dense_rank: the inner dimension of the dense model: per head for attention, channels for the others.
        cost: parameters that one unit of rank costs (per head dimension: all heads' rows, columns and biases).
        multiple: ranks are multiples of this: the groups of a resnet's inner norm, which must stay equal.
        received: widths of what the last layers receive, where that is not the inner dimensions of one layer alone.
    """

    path: str
    group: str
    heads: int
    dense_rank: int
    cost: int
    multiple: int = 1
    received: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what each last layer receives."""
        return self.received or (self.heads * self.dense_rank,)

    @property
    def name(self) -> str:
        return f"{self.path}.{self.group}"

    def first(self, rank: int) -> Tensor:
        """The first inner dimensions `[rank]`, equally many out of each of `multiple` parts."""
        return torch.arange(self.dense_rank).unflatten(0, (self.multiple, -1))[:, : rank // self.multiple].flatten()


class Inner(NamedTuple):
    """How a layer's weight `[out, in, ...]` carries a group's rank.

    Attributes:
        axis: which one it is: 0 where the layer gives the inner dimensions out, 1 where it receives them.
        times: how often, for all heads, the axis may hold the rank: twice where gate rows follow the value rows.
        checked: whether every exported graph has this layer's weight.
        before: how much of the axis comes before it and is something else.
    """

    axis: int
    times: tuple[int, ...] = (1,)
    checked: bool = True
    before: int = 0


class Factor(Protocol):
    """Everything of a site that does not depend on the rank; `tail[r]` is the relative local error at rank r."""

    @property
    def tail(self) -> Tensor: ...


F = TypeVar("F", bound=Factor)


class Evidence(NamedTuple):
    """What slim weights are made from."""

    module: Any
    """The dense model's module at the site."""
    site: Site
    statistics: Statistics
    forms: Forms = Forms()

    def moment(self, what: str = "") -> Tensor:
        """The second moment of this name below the site's, float64 `[n, n]` or `[H, d, d]`."""
        return self.statistics.mean(f"{self.site.name}.{what}" if what else self.site.name)

    def received(self, last: Any, what: str = "") -> tuple[Tensor, Tensor | None]:
        """`moment(what)` of what a last layer receives, about its mean `[n]` where a constant is carried."""
        moment, mean = self.moment(what), None
        if self.forms.constant and last.bias is not None:
            mean = self.statistics.first(f"{self.site.name}.{what}" if what else self.site.name)
            moment.addr_(mean, mean, alpha=-1)
        return moment, mean


class Group(ABC, Generic[F]):
    """A kind of group. Modules are the dense model's; weights go by parameter name below the site's module.

    Attributes:
        name: in plans, settings and names of sites.
        inner: the layers that carry the rank, by path below the module.
        per_head: whether the rank is one head's.
        shares_rank_with: groups of the same modules that keep the same rank: they are slimmed together.
        fitted: whether slim weights come from `fit`, on recorded calls, and not from `slim`.
        compensated: path of the linear that error compensation solves again; None if it is to leave the module alone.
        added: paths of the layers whose outputs join the residual stream, which are solved again where everything is;
            those after the first are solved with it.
        second_input: name of the module's second argument, where it has one.
        stands_alone: whether the module has its norm and residual inside.
        fills_up: whether slim inner dimensions are filled up to the dense ones between its layers.
        product_dim: what `attention_of` of a TensorRT network calls this rank in the attention products.
    """

    name: str
    inner: Mapping[str, Inner]
    per_head = False
    shares_rank_with: tuple[str, ...] = ()
    fitted = False
    compensated: str | None = None
    added: tuple[str, ...] = ()
    second_input = "encoder_hidden_states"
    stands_alone = False
    fills_up = False
    product_dim: str | None = None

    @abstractmethod
    def site(self, path: str, module: nn.Module) -> Site | str | None:
        """The site at a module, or the reason why it stays dense; None for a module of another kind."""

    @abstractmethod
    def factor(self, evidence: Evidence) -> F:
        """The site's basis or order."""

    @abstractmethod
    def slim(self, evidence: Evidence, rank: int, factor: F) -> dict[str, Tensor]:
        """The site's smaller weights and biases, float64."""

    def maps(self, evidence: Evidence, rank: int, factor: F) -> Maps:
        """By path of a layer below the module, how its slim weight follows from the dense one; none if nobody knows.

        It agrees with `slim`, up to rounding, and reads no weight: dense ones may be released already.
        """
        return {}

    def emulate(self, evidence: Evidence, rank: int, factor: F) -> dict[str, Tensor]:
        """Weights with which the dense module computes what it would with this site alone slim.

        Their shapes are the dense ones where another group of the module shares the rank.
        """
        return self.slim(evidence, rank, factor)

    def fit(
        self,
        denoiser: nn.Module,
        ranks: Mapping[Site, int],
        factors: Mapping[str, F],
        calls: Sequence[Call],
        settings: ResnetSettings | None = None,
        maps: dict[str, Maps] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """By site name, slim weights of these sites from forward passes of the dense model; none if not `fitted`.

        Args:
            maps: gets those of each site, by its name.

        Raises:
            InputError: if there is no call, or the model gives values that are not finite.
        """
        return {}

    def at(self, path: str, module: nn.Module, dense_rank: int, heads: int = 1, multiple: int = 1) -> Site:
        """The site of a module, its cost counted off the layers."""
        cost = 0
        for _, parameter, inner in self._carriers(module):
            width = parameter.shape[inner.axis]
            cost += parameter.numel() // width * (width - inner.before)
        return Site(path, self.name, heads, dense_rank, cost // dense_rank, multiple)

    def layout(self, module: nn.Module) -> Mapping[str, Inner]:
        """`inner` of this module, where types of modules have layers of other names."""
        return self.inner

    def mended(self, module: nn.Module) -> str | None:
        """`compensated` of this module."""
        return self.compensated

    def last(self, module: nn.Module) -> nn.Module:
        """The layer that receives the inner dimensions."""
        return next(layer for _, layer, inner in self.layers(module) if inner.axis == 1)

    def layers(self, module: nn.Module) -> Iterator[tuple[str, Any, Inner]]:
        """The layers that carry the rank, of those that the module has, with their paths."""
        for path, inner in self.layout(module).items():
            if (layer := attrgetter(path)(module)) is not None:
                yield path, layer, inner

    def watch(self, module: nn.Module, site: Site, observer: Observer) -> list[Any]:
        """Handles of hooks that add to the statistics in every call: here, what the last layer receives."""

        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            if isinstance(layer, nn.Conv2d):  # [B, n, H, W], whose tokens are its pixels
                x = x.flatten(2).mT
            observer.add_rows(site, x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else x[:, None])

        return [self.last(module).register_forward_pre_hook(hook)]

    def sums(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The moments that `watch` fills, by name: `(n,)` for a triangle with its E[x], `(H, d, d)` for heads."""
        return {site.name: site.widths[:1]}

    def moment_bytes(self, site: Site) -> int:
        """Memory that a site's sums take while they are collected."""
        shapes = self.sums(site).values()
        return sum(4 * triangle_size(s[0]) + 8 * s[0] if len(s) == 1 else 4 * math.prod(s) for s in shapes)

    def covers(self, site: Site, statistics: Statistics) -> bool:
        """Whether the site ran during calibration."""
        return bool(statistics.tokens.get(site.name))

    def cut(self, module: nn.Module, site: Site, kept: Tensor) -> dict[str, Tensor]:
        """The dense weights of these inner dimensions, rising: `[r]` alike in every head, or `[H, r]`."""
        weights = {}
        for name, parameter, inner in self._carriers(module):
            parts = torch.arange((parameter.shape[inner.axis] - inner.before) // site.dense_rank)[:, None]
            rows = (kept + parts * site.dense_rank).flatten() + inner.before
            rows = torch.cat([torch.arange(inner.before), rows])
            weights[name] = parameter[:, rows] if inner.axis else parameter[rows]
        return weights

    def resize(self, module: nn.Module, site: Site, rank: int) -> None:
        """Replace the layers that carry the rank by uninitialised smaller ones, in place."""
        for path, layer, inner in list(self.layers(module)):
            parts = (layer.weight.shape[inner.axis] - inner.before) // site.dense_rank
            module.set_submodule(path, _like(layer, inner.axis, inner.before + parts * rank))

    def macs(self, module: nn.Module, site: Site, add: Callable[[int], None]) -> list[Any]:
        """Handles of hooks that add, in every call, the multiply-accumulates that one unit of rank costs."""

        def hook(weight: Tensor, inner: Inner, _layer: nn.Module, _args: Any, output: Tensor) -> None:
            places = output.numel() // output.shape[1 if weight.ndim == 4 else -1]
            width = weight.shape[inner.axis]
            add(places * (weight.numel() // width * (width - inner.before)) // site.dense_rank)

        weights = ((layer, layer.weight, inner) for _, layer, inner in self.layers(module))
        return [layer.register_forward_hook(partial(hook, w, inner)) for layer, w, inner in weights if w.ndim > 1]

    def _carriers(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Inner]]:
        """The parameters with an axis that carries the rank, with their names and how they carry it."""
        for path, layer, inner in self.layers(module):
            for kind, parameter in layer.named_parameters():
                if kind == "weight" or inner.axis == 0:
                    yield f"{path}.{kind}", parameter, inner


def _like(layer: Any, axis: int, width: int) -> nn.Module:
    """An uninitialised layer that is like this one but for one axis of its weight."""
    place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.GroupNorm):
        return nn.GroupNorm(layer.num_groups, width, layer.eps, **place)
    shape = list(layer.weight.shape[:2])
    shape[axis] = width
    place["bias"] = layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        if layer.groups == layer.in_channels > 1:  # each channel by itself
            shape, place["groups"] = [width, width], width
        size: tuple[Any, ...] = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return nn.utils.skip_init(nn.Conv2d, shape[1], shape[0], *size, **place)
    return nn.utils.skip_init(nn.Linear, shape[1], shape[0], **place)


def wide(tensor: Tensor) -> Tensor:
    """A tensor as the algebra takes it: float64 on the CPU."""
    return tensor.detach().double().cpu()


def projected(name: str, linear: nn.Linear, basis: Tensor) -> dict[str, Tensor]:
    """A projection whose head outputs x become x B: basis `[H, d, r]`."""
    heads, d, _ = basis.shape
    weight = wide(linear.weight).reshape(heads, d, -1)
    result = {f"{name}.weight": (basis.mT @ weight).flatten(0, 1)}
    if linear.bias is not None:
        bias = wide(linear.bias).reshape(heads, d, 1)
        result[f"{name}.bias"] = (basis.mT @ bias).flatten()
    return result


def solved(
    path: str, last: nn.Linear, weight: Tensor, mean: Tensor | None, keep: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """A last linear's slim weight W' by name, and `b + W E[x] - W' E[x']` as its bias where a constant is carried.

    Args:
        mean: E[x], or None; keep: gives E[x'] of it.
    """
    weights = {f"{path}.weight": weight}
    if mean is not None:  # it keeps the mean of what is removed
        weights[f"{path}.bias"] = wide(last.bias) + wide(last.weight) @ mean - weight @ keep(mean)
    return weights
