"""The `resnet` group: fewer inner channels between the two convolutions of a `ResnetBlock2D`.

Beyond the papers. With h = act(norm2(conv1(x) + t)), which conv2 receives, channels are chosen by what their loss does
to conv2's output, the same number out of every group of the norm. The norm's statistics move when channels go, so that
h changes at the kept ones too: therefore the norm's weight and bias are fitted again, and then conv2, on recorded
calls of the dense model, against the dense block's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D, TemporalResnetBlock
from torch import Tensor, nn
from torch.nn import functional

from slimdiff.algebra.elimination import ChannelOrder, elimination_order
from slimdiff.algebra.least_squares import Sums, solve
from slimdiff.algebra.low_rank import roots
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError
from slimdiff.groups.group import Evidence, Group, Inner, Site, wide
from slimdiff.groups.maps import AxisMap, LayerMap, Maps
from slimdiff.progress import bar
from slimdiff.settings import ResnetSettings

# Columns of unfolded pixels that are multiplied at once: bounds the memory beside the sums.
_MOST_PIXELS = 8192
# Bytes of memory for `ResnetSettings.memory_gib`, whatever is available.
_LEAST_MEMORY = 2 * 2**30


class Resnet(Group[ChannelOrder]):
    """Inner channels, equally many out of every group of the norm; `fit` is what makes them good."""

    name = "resnet"
    inner = {
        "conv1": Inner(0),
        "time_emb_proj": Inner(0, checked=False),  # None in some; holds the rank twice if it gives a scale and a shift
        "norm2": Inner(0, checked=False),
        "conv2": Inner(1),
    }
    fitted = True
    added = ("conv2", "conv_shortcut")
    second_input = "temb"
    stands_alone = True

    def site(self, path: str, module: nn.Module) -> Site | str | None:
        if isinstance(module, ResnetBlock2D):
            return _obstacle(module) or self.at(
                path, module, module.norm2.num_channels, multiple=module.norm2.num_groups
            )
        if isinstance(module, ResnetBlockCondNorm2D | TemporalResnetBlock):
            return f"{type(module).__name__} is a resnet class of its own"
        return None

    def factor(self, evidence: Evidence) -> ChannelOrder:
        return channel_order(evidence.moment(), wide(evidence.module.conv2.weight), evidence.site.multiple)

    def slim(self, evidence: Evidence, rank: int, factor: ChannelOrder) -> dict[str, Tensor]:
        """The dense weights of the channels that are kept: where `fit` begins."""
        return self.cut(evidence.module, evidence.site, factor.order[:rank].sort().values)

    @torch.no_grad()
    def fit(
        self,
        denoiser: nn.Module,
        ranks: Mapping[Site, int],
        factors: Mapping[str, ChannelOrder],
        calls: Sequence[Call],
        settings: ResnetSettings | None = None,
        maps: dict[str, Maps] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        settings = settings or ResnetSettings()
        if not calls:
            raise InputError(
                "slim resnets are fitted on recorded denoiser calls: give some "
                "(slimdiff.denoising.trajectory.record_calls)"
            )
        fits = []
        for site, rank in ranks.items():
            block, kept = denoiser.get_submodule(site.path), factors[site.name].order[:rank].sort().values
            fits.append(_Fit(site, block, kept, self.cut(block, site, kept)))
        if settings.affine:
            _pass(denoiser, fits, calls, _Fit.see_norm, "fit norms")
            for fit in fits:
                fit.solve_norm()
        if settings.solve != "none":
            _pass(denoiser, fits, calls, _Fit.see_channels, "fit channels")
            for fit in fits:
                fit.solve_channels(settings.ridge)
        if settings.solve == "im2col":
            for wave in _waves(fits, _memory(settings)):
                _pass(denoiser, wave, calls, _Fit.see_patches, "fit convolutions")
                for fit in wave:
                    fit.solve_patches(settings.ridge)
        if maps is not None:
            maps |= {fit.site.name: fit.maps() for fit in fits}
        return {fit.site.name: fit.weights for fit in fits}


def _obstacle(block: ResnetBlock2D) -> str | None:
    if type(block) is not ResnetBlock2D:
        return f"{type(block).__name__} is a resnet class of its own"
    if not (_plain_3x3(block.conv1) and _plain_3x3(block.conv2)):
        return "a convolution is not a plain one of 3 x 3 with a bias"
    if type(block.time_emb_proj) not in (nn.Linear, type(None)):
        return "the projection of the time embedding is not a plain linear layer"
    if type(block.norm2) is not nn.GroupNorm or not block.norm2.affine:
        return "the inner norm is not a plain group norm"
    if block.norm2.num_groups == block.norm2.num_channels:
        return "the inner norm has one channel per group: none can go"
    return None


def _plain_3x3(c: nn.Module) -> bool:
    if type(c) is not nn.Conv2d or (c.groups, c.padding_mode) != (1, "zeros") or c.bias is None:
        return False
    return (c.kernel_size, c.stride, c.padding, c.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


def channel_order(moment: Tensor, second: Tensor, groups: int) -> ChannelOrder:
    """Backward elimination on conv2's output error, the same number of channels from every group of the norm.

    The output's error is taken as if neighbouring pixels were uncorrelated and the norm did not move: with `W` of
    shape `[C, 9 out]`, `tr(W^T (C - C_:S C_SS^-1 C_S:) W)`, as for a feed-forward.

    Args:
        moment: E[h h^T] over pixels, `[C, C]`; second: conv2's weight `[out, C, 3, 3]`; groups: of the norm.

    Returns:
        channels from the most to the least worth keeping `[C]`; every multiple of `groups` of them has equally many
        out of each group, and the relative error with the first r kept `[C + 1]`.
    """
    weight = second.transpose(0, 1).flatten(1)
    root, _ = roots(weight @ weight.T)  # elimination sees the weight by its products alone
    return elimination_order(moment, root, groups=groups)


@dataclass
class _Seen:
    """One call at one resnet, in the dense model.

    Attributes:
        inner: what norm2 received, `[B, C, H, W]`; normed: what it gave.
        scale_shift: what `time_emb_proj` gave, `[B, 2 C]`, where that comes after the norm.
        hidden: what conv2 received, `[B, C, H, W]`; output: what it gave, `[B, out, H, W]`.
    """

    inner: Tensor
    normed: Tensor
    scale_shift: Tensor | None
    hidden: Tensor
    output: Tensor


@dataclass
class _Fit:
    """One resnet on its way to fewer channels: its weights so far, and the sums of the pass that is under way."""

    site: Site
    block: ResnetBlock2D
    kept: Tensor
    weights: dict[str, Tensor]
    sums: Any = None
    mixed: Tensor | None = None
    """How dense channels are made of the kept ones, less the kept ones themselves: `[C, r]`, by `solve_channels`."""

    @property
    def sum_bytes(self) -> int:
        """What the sums of `see_patches` over all calls take, in float32."""
        unknowns = 9 * len(self.kept)  # weights per output of conv2
        return 4 * unknowns * (unknowns + self.block.conv2.out_channels)

    def normed(self, seen: _Seen) -> Tensor:
        """The pruned norm's output before its weight and bias, `[B, r, H, W]`."""
        norm = self.block.norm2
        return functional.group_norm(
            seen.inner[:, self.kept.to(seen.inner.device)].float(), norm.num_groups, eps=norm.eps
        )

    def hidden(self, seen: _Seen) -> Tensor:
        """What the slim conv2 receives, `[B, r, H, W]`."""
        weight, bias = (
            self.weights[f"norm2.{n}"].to(seen.inner.device).float()[:, None, None] for n in ("weight", "bias")
        )
        x = self.normed(seen) * weight + bias
        if seen.scale_shift is not None:
            scale, shift = seen.scale_shift.float()[:, :, None, None].chunk(2, dim=1)
            kept = self.kept.to(x.device)
            x = x * (1 + scale[:, kept]) + shift[:, kept]
        return self.block.nonlinearity(x)

    def see_norm(self, _half: int, seen: _Seen) -> None:
        x = self.normed(seen).double()
        y = seen.normed[:, self.kept.to(x.device)].double()
        found = torch.stack([t.sum((0, 2, 3)) for t in (torch.ones_like(x), x, y, x * x, x * y)])
        self.sums = found if self.sums is None else self.sums + found

    def solve_norm(self) -> None:
        """Per channel, the line through (pruned norm's output, dense norm's output)."""
        count, x, y, xx, xy = self.sums.cpu()
        spread = xx / count - (x / count).square()
        slope = torch.where(spread > 1e-12, (xy / count - x * y / count**2) / spread.clamp(min=1e-12), 0.0)
        self.weights |= {"norm2.weight": slope, "norm2.bias": (y - slope * x) / count}
        self.sums = None

    def see_channels(self, half: int, seen: _Seen) -> None:
        x, y = (t.float().transpose(0, 1).flatten(1) for t in (self.hidden(seen), seen.hidden))
        self._add(half, x, y)

    def _add(self, half: int, x: Tensor, y: Tensor) -> None:
        if self.sums is None:
            self.sums = [Sums.zeros(len(x), len(y), x) for _ in range(2)]
        self.sums[half].add(x, y)

    def solve_channels(self, ridge: float | None) -> None:
        """conv2 of the dense channels as they are best made of the kept ones, for every pixel alike.

        A constant goes into the bias: exact but at the borders, where the padding is zero for both.
        """
        second = self.block.conv2
        prior = torch.zeros(len(self.kept), second.in_channels, dtype=torch.float64)
        prior[torch.arange(len(self.kept)), self.kept] = 1.0
        mix, constant = solve(self.sums, prior, ridge)
        self.mixed = (mix - prior).T
        weight = wide(second.weight)
        self.weights["conv2.weight"] = torch.einsum("rc,ochw->orhw", mix, weight)
        self.weights["conv2.bias"] = wide(second.bias) + torch.einsum("c,ochw->o", constant, weight)
        self.sums = None

    def maps(self) -> Maps:
        """Of conv2 by its channels, for every pixel alike: what `solve_patches` adds belongs to its weight alone."""
        kept, out = self.kept.int(), {}
        for path in ("conv1", "time_emb_proj"):
            if (layer := getattr(self.block, path)) is not None:
                parts = torch.arange(len(layer.weight) // self.site.dense_rank)[:, None] * self.site.dense_rank
                out[path] = LayerMap(AxisMap((self.kept + parts).flatten().int()))
        every = None if self.mixed is None else torch.arange(len(self.mixed)).int()
        return out | {"conv2": LayerMap(None, AxisMap(kept, every, self.mixed))}

    def see_patches(self, half: int, seen: _Seen) -> None:
        hidden, output = self.hidden(seen), seen.output.float()
        step = max(1, _MOST_PIXELS // hidden[0, 0].numel())
        for x, y in zip(hidden.split(step), output.split(step), strict=True):
            patches = functional.unfold(x, 3, padding=1)
            self._add(half, patches.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1))

    def solve_patches(self, ridge: float | None) -> None:
        """conv2 by least squares against the dense one's output."""
        weight, bias = solve(self.sums, self.weights["conv2.weight"].double().flatten(1).T, ridge)
        self.weights |= {"conv2.weight": weight.T.unflatten(1, (-1, 3, 3)), "conv2.bias": bias}
        self.sums = None


def _memory(settings: ResnetSettings) -> float:
    """Bytes that sums may take: each wave is a pass over all calls, so few large ones are faster."""
    if settings.memory_gib is not None:
        return settings.memory_gib * 2**30
    return max(psutil.virtual_memory().available / 4, _LEAST_MEMORY)


def _waves(fits: Sequence[_Fit], memory: float) -> Iterator[list[_Fit]]:
    """Fits whose patches memory holds, as many together as it can: each half's sums, and one solution in float64."""

    def need(wave: Sequence[_Fit]) -> int:
        sizes = [fit.sum_bytes for fit in wave]
        return 2 * sum(sizes) + 5 * max(sizes)

    wave: list[_Fit] = []
    for fit in fits:
        if need([fit]) > memory:
            continue
        if wave and need([*wave, fit]) > memory:
            yield wave
            wave = []
        wave.append(fit)
    if wave:
        yield wave


def _halves(calls: Sequence[Call]) -> list[list[Call]]:
    """Two lists, by images: every other trajectory; the first and the last calls if there is only one."""
    starts = [i for i, call in enumerate(calls) if i == 0 or call.step <= calls[i - 1].step]
    if len(starts) == 1:
        starts.append(-(-len(calls) // 2))
    trajectories = [calls[a:b] for a, b in zip(starts, [*starts[1:], len(calls)], strict=True)]
    return [[call for some in trajectories[half::2] for call in some] for half in range(2)]


def _pass(
    denoiser: nn.Module,
    fits: Sequence[_Fit],
    calls: Sequence[Call],
    see: Callable[[_Fit, int, _Seen], None],
    name: str,
) -> None:
    """Run the dense model on every call, and show each resnet to its fit, with the half that the call belongs to."""
    with bar(name=name, unit="call", total=len(calls)) as done:
        for half, some in enumerate(_halves(calls)):
            with ExitStack() as stack:
                for fit in fits:
                    for handle in _watch(fit, partial(see, fit, half)):
                        stack.enter_context(handle)
                for call in some:
                    predict(denoiser, call)
                    done.update()


def _watch(fit: _Fit, see: Callable[[_Seen], None]) -> list[Any]:
    block: ResnetBlock2D = fit.block
    at: dict[str, Tensor] = {}

    def of_norm(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        at["inner"], at["normed"] = args[0], output

    def of_time(_module: nn.Module, _args: Any, output: Tensor) -> None:
        at["scale_shift"] = output

    def of_second(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.isfinite(output).all():
            raise InputError(f"{fit.site.name} gives values that are not finite: the model overflows; use float32")
        see(_Seen(at.pop("inner"), at.pop("normed"), at.pop("scale_shift", None), args[0], output))

    handles = [block.norm2.register_forward_hook(of_norm), block.conv2.register_forward_hook(of_second)]
    if block.time_emb_proj is not None and block.time_embedding_norm == "scale_shift":
        handles.append(block.time_emb_proj.register_forward_hook(of_time))
    return handles
