"""What int8 saves by layer and rank: measured beside the ranks, for the same table.

A layer that can be slimmed, and every other module of such a kind, is run alone with all linears and convolutions in it
in int8 and with none; so is a linear or convolution that lies in none of these. What is saved is shared out among a
module's layers by their multiply-adds. NNCF quantises a layer's graph as it does a whole one's, on whatever input the
layer has had: numbers do not change how long it takes. The whole model in int8 shows how much of all this it shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from exporters.registry import runtime_of
from slimdiff.denoising.int8 import count_layer_macs
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError, require
from slimdiff.groups import find_sites
from slimdiff.planning.knapsack import Layer, find_layers
from slimdiff.storage import manifest

if TYPE_CHECKING:
    from exporters.latency.alone import Measurement

RANKS = 3
"""At which a layer is measured in int8; between them, lines."""
WHOLE = "whole"
_ENDING = "-int8"

Times = Mapping[str, float]
"""Milliseconds by rank, and by rank with `-int8` behind it."""


def check_runtime(runtime: str) -> None:
    """Refuse a runtime in which nothing runs in int8.

    Raises:
        InputError: if it is one.
        MissingPackageError: without what quantises.
    """
    row = runtime_of(runtime)
    if row.takes != "graph":
        raise InputError(f"{row.title} runs no int8 here: say with runtime where it counts, such as openvino")
    require("nncf", "int8")


def named_int8(name: str) -> str:
    """What a figure is called in int8."""
    return name + _ENDING


@dataclass(frozen=True)
class Int8Job:
    """Something to run in int8 and not, and the name that its figures are kept under."""

    key: str
    path: str
    layer: Layer | None
    """That a rank runs through; None of a linear or convolution alone."""
    ranks: Sequence[int]

    def run(self, measurement: Measurement) -> dict[str, float]:
        """Milliseconds, as `Times` has them."""
        if self.path == WHOLE:
            return measurement.whole_in_int8()
        if self.layer is None:
            return measurement.product(self.path)
        return measurement.alone(self.layer, self.ranks, int8=True)


class Int8Costs:
    """What is to be measured of a model in int8, and what follows from it.

    Args:
        layers: that may be slimmed.
        whole: under which figures of the whole model are kept.
    """

    def __init__(self, denoiser: nn.Module, call: Call, layers: Sequence[Layer], whole: str) -> None:
        self.macs = count_layer_macs(denoiser, call)
        slim = {layer.path: layer for layer in layers}
        others = find_layers(find_sites(denoiser)[0], 1)
        self.inside = {o.path: [path for path in self.macs if path.startswith(f"{o.path}.")] for o in others}
        ran = [o for o in others if self.inside[o.path]]
        self.modules = [slim.get(o.path) or Layer(o.sites, [o.dense_rank]) for o in ran]
        taken = {path for paths in self.inside.values() for path in paths}
        self.alone = [path for path in self.macs if path not in taken]
        self.inputs = _inputs_of(denoiser, self.alone, call)
        self.denoiser, self.whole = denoiser, whole

    def jobs(self, keys: Mapping[str, str]) -> Iterator[Int8Job]:
        """All of them, some perhaps of one key.

        Args:
            keys: of the modules' own measurements, by path: all that their latency depends on but the ranks.
        """
        yield Int8Job(named_int8(self.whole), WHOLE, None, [1])
        for layer in self.modules:
            yield Int8Job(named_int8(keys[layer.path]), layer.path, layer, _ends_and_middle(layer.candidates))
        for path in self.alone:
            yield Int8Job(named_int8(self._key(path)), path, None, [1])

    def savings(self, jobs: Sequence[Int8Job], known: Mapping[str, Times]) -> tuple[dict[str, dict[int, float]], float]:
        """What each linear and convolution costs less in int8, by path and rank; and the share of it that the whole
        model showed, which it is scaled by."""
        saved: dict[str, dict[int, float]] = {}
        expected = 0.0
        for job in jobs:
            times = known[job.key]
            by_rank = {rank: times[str(rank)] - times[named_int8(str(rank))] for rank in job.ranks}
            if job.path == WHOLE:
                shown = by_rank[1]
                continue
            expected += by_rank[max(by_rank)]
            members = [job.path] if job.layer is None else self.inside[job.path]
            total = sum(self.macs[path] for path in members)
            for path in members:
                saved[path] = {rank: ms * self.macs[path] / total for rank, ms in by_rank.items()}
        # A whole model that is slower in int8 takes the gain from all of its layers.
        anchor = min(max(shown / expected, 0.0), 4.0) if expected > 0 else 1.0
        return {path: {rank: ms * anchor for rank, ms in curve.items()} for path, curve in saved.items()}, anchor

    def _key(self, path: str) -> str:
        module = self.denoiser.get_submodule(path)
        parts = {"kind": repr(module), "input": list(self.inputs[path].shape)}
        return manifest.fingerprint(parts)


def _ends_and_middle(candidates: Sequence[int]) -> list[int]:
    """`RANKS` of them, or all."""
    picks = {round(i * (len(candidates) - 1) / (RANKS - 1)) for i in range(RANKS)}
    return [candidates[i] for i in sorted(picks)]


def _inputs_of(denoiser: nn.Module, paths: Sequence[str], call: Call) -> dict[str, Tensor]:
    """The tensor that goes into each of these layers in a call, float32 on the CPU."""
    seen: dict[str, Tensor] = {}

    def see(path: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[path] = args[0].detach().float().cpu()

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(denoiser.get_submodule(path).register_forward_pre_hook(partial(see, path)))
        predict(denoiser, call)
    return seen
