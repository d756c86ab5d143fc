"""What a model costs: parameters, multiply-accumulates, bytes; and tables of what it costs by the ranks it keeps."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slimdiff.denoising.modules import twin
from slimdiff.denoising.offloading import device_of, hollow
from slimdiff.denoising.scheduled import shallow_unet
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Site
from slimdiff.progress import working

CostName = Literal["parameters", "macs", "latency_ms", "bytes", "macs_per_image", "latency_ms_per_image"]
_Count = TypeVar("_Count")


@dataclass(frozen=True)
class CostTable:
    """What a denoiser costs by the ranks of its layers. Layers' costs add up; what is in no layer never changes.

    Attributes:
        name: the unit: `parameters`, `macs` (of one sample: a guided call has two an image), `latency_ms` (of a call),
            or `bytes` (of the weights in a graph's file); `macs_per_image` and `latency_ms_per_image` are of a whole
            picture by its schedule.
        dense: what the whole dense model costs.
        layers: module path -> rank -> what the layer costs with it; the largest rank is the dense one. Between
            ranks, costs are interpolated linearly. A constant in all of a layer's costs cancels.
        made_from: for a measured table, on what: `runtime`, `machine` and the like.
        int8: path of a linear or convolution -> rank of the layer that it lies in -> what it costs less in int8, below
            zero where that is slower. Of one that lies in none, any rank stands for it.
    """

    name: CostName
    dense: float
    layers: Mapping[str, Mapping[int, float]]
    made_from: Mapping[str, Any] = field(default_factory=dict)
    int8: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def savings(self, path: str, ranks: Sequence[int]) -> np.ndarray:
        """What a layer costs less than dense at each of these ranks."""
        known = sorted(self.layers[path])
        costs = [self.layers[path][rank] for rank in known]
        return costs[-1] - np.interp(ranks, known, costs)

    def int8_savings(self, path: str, ranks: Sequence[int]) -> np.ndarray:
        """What a linear or convolution costs less in int8, at each of these ranks of the layer that it lies in."""
        known = sorted(self.int8.get(path, {0: 0.0}))
        return np.interp(ranks, known, [self.int8[path][rank] if path in self.int8 else 0.0 for rank in known])

    def of(self, ranks: Mapping[str, int], int8: Collection[str] = ()) -> float:
        """What the whole model costs with these ranks (by module path); layers not named or not known are dense.

        Args:
            int8: paths of the linears and convolutions that are in int8.
        """
        known = {path: rank for path, rank in ranks.items() if path in self.layers}
        cost = self.dense - sum(float(self.savings(path, [rank])[0]) for path, rank in known.items())
        for path in int8:
            rank = next((rank for owner, rank in ranks.items() if path.startswith(f"{owner}.")), sys.maxsize)
            cost -= float(self.int8_savings(path, [rank])[0])
        return cost

    def most_removable(self, ranks: Mapping[str, Sequence[int]]) -> float:
        """The most that can go: every layer at the best of its ranks, and in int8 what is cheaper so.

        Args:
            ranks: by module path, those that layers may take.
        """
        total, inside = 0.0, set[str]()
        for owner, candidates in ranks.items():
            saved = self.savings(owner, candidates)
            for path in (path for path in self.int8 if path.startswith(f"{owner}.")):
                inside.add(path)
                saved = saved + self.int8_savings(path, candidates).clip(min=0)
            total += float(saved.max())
        return total + sum(max(0.0, *self.int8[path].values()) for path in self.int8 if path not in inside)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes that its weights take in files, in the dtype they are held in."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values()}  # a weight of two names is written once
    return sum(t.numel() * t.element_size() for t in tensors.values())


@working("count multiply-accumulates")
@torch.no_grad()
def count_macs(denoiser: nn.Module, call: Call) -> int:
    """Multiply-accumulates of one call, for its whole batch: linears, convolutions and attention products."""

    def count(run: Callable[[], Any], _model: nn.Module) -> int:
        counter = FlopCounterMode(display=False)
        # The counter knows attention by its plain products; which kernel runs does not change how many there are.
        with sdpa_kernel(SDPBackend.MATH), counter:
            run()
        return counter.get_total_flops() // 2

    return _counted(denoiser, call, count)


def left_out_of_shallow(unet: nn.Module, depth: str) -> list[str]:
    """Paths of the blocks that do not run in a call from that up block on; nothing else in the UNet is left out.

    Raises:
        InputError: if the UNet has no such depth.
    """
    shallow = shallow_unet(unet, depth)
    runs = {f"up_blocks.{len(unet.up_blocks) - 1 - i}" for i in range(len(shallow.up_blocks))}  # type: ignore[arg-type]
    runs |= {f"down_blocks.{i}" for i in range(len(shallow.down_blocks))}
    blocks = [name for name, _ in unet.named_modules() if re.fullmatch(r"mid_block|(up|down)_blocks\.[0-9]+", name)]
    left_out = [name for name in blocks if name not in runs]
    return [*left_out, f"down_blocks.{len(shallow.down_blocks) - 1}.downsamplers.0"]


@working("count multiply-accumulates of a shallow call")
@torch.no_grad()
def shallow_share(unet: nn.Module, depth: str, call: Call) -> float:
    """What a call from that up block on costs, as a share of a whole one's multiply-accumulates.

    Args:
        depth: as of `slimdiff.schedule.Schedule`.

    Raises:
        InputError: if the UNet has no such depth.
    """
    left_out = left_out_of_shallow(unet, depth)

    def count(run: Callable[[], Any], _model: nn.Module) -> float:
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            run()
        by_module = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
        return 1 - sum(by_module.get(name, 0) for name in left_out) / counter.get_total_flops()

    return _counted(unet, call, count)


def _counted(denoiser: nn.Module, call: Call, count: Callable[[Callable[[], Any], nn.Module], _Count]) -> _Count:
    """What `count` counts of a call to a model, which it runs.

    Shapes are all that counts, so nothing is computed; but where a model's numbers decide on its shapes, all is.

    Raises:
        InputError: if the model does not take the call.
    """
    arguments = call.to(device_of(denoiser), next(denoiser.parameters()).dtype)

    def count_in(model: nn.Module) -> _Count:
        return count(lambda: model(**arguments, return_dict=False), model)

    try:
        other = twin(denoiser)  # what a model keeps of its first call would have no numbers
        with FakeTensorMode(allow_non_fake_inputs=True):
            return count_in(hollow(other))
    except Exception:
        try:
            return count_in(denoiser)
        except RuntimeError as error:  # of shapes: its call is made by the other parts of its pipeline
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{type(denoiser).__name__} does not run on what its pipeline calls it with ({reason}): name a model "
                "whose parts were trained together"
            ) from error


def batch_of(call: Call) -> int:
    """Samples in a call, both branches of guidance counted."""
    name = next(k for k in ("sample", "hidden_states") if k in call.arguments)
    return int(call.arguments[name].shape[0])


def parameter_costs(denoiser: nn.Module, sites: Sequence[Site]) -> CostTable:
    """Parameters by rank."""
    layers: dict[str, dict[int, float]] = {}
    for site in sites:
        layer = layers.setdefault(site.path, {0: 0, site.dense_rank: 0})
        layer[site.dense_rank] += site.cost * site.dense_rank
    return CostTable("parameters", count_parameters(denoiser), layers)


@working("count multiply-accumulates by rank")
@torch.no_grad()
def mac_costs(denoiser: nn.Module, sites: Sequence[Site], call: Call) -> CostTable:
    """Multiply-accumulates by rank, of one sample with the shapes of `call`.

    Exactly what `count_macs` counts of the slim model: projections, convolutions, and attention's two products.
    """

    def count(run: Callable[[], Any], model: nn.Module) -> dict[str, int]:
        per_rank = {site.path: 0 for site in sites}
        with ExitStack() as stack:
            for site in sites:

                def add(macs: int, path: str = site.path) -> None:
                    per_rank[path] += macs

                for handle in GROUPS[site.group].macs(model.get_submodule(site.path), site, add):
                    stack.enter_context(handle)
            run()
        return per_rank

    per_rank = _counted(denoiser, call, count)
    batch = batch_of(call)
    ranks = {site.path: site.dense_rank for site in sites}
    layers = {path: {0: 0.0, ranks[path]: macs * ranks[path] / batch} for path, macs in per_rank.items()}
    return CostTable("macs", count_macs(denoiser, call) / batch, layers)
