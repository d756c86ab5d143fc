"""A layer, or a whole model, run alone in a runtime: modules, their graphs, and how they take turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.graphs.export import export_module, export_unet, unet_inputs
from exporters.graphs.quantise import quantise_all
from exporters.latency.int8 import WHOLE, Int8Job, named_int8
from exporters.layout import GRAPH
from exporters.machine import usable_cores
from exporters.runtimes.opening import open_session
from exporters.runtimes.unet import UNet
from exporters.settings import ExportSettings, TableSettings
from slimdiff.denoising.torch_state import on_threads, own_threads
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import require
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Group
from slimdiff.planning.knapsack import Layer
from slimdiff.slimming.skeleton import skeleton

EXPORT_SECONDS = (0.8, 0.035)
"""What the export of a graph takes, at all and per module in it, on one core that does nothing else: for the estimate.
Measured on a Xeon, of single layers and of a UNet of 6 M parameters."""
QUANTISE_SECONDS = 0.3
"""What NNCF takes for a layer's graph, on the same."""
FEWEST, Z = 8, 1.96
"""Runs before an interval is looked at, and half its width in standard deviations of a count of runs: 95 %."""
MOST_BYTES = 64 << 20
"""Read between runs, at most: more than a core's own caches hold."""
_Run = Callable[[], Any]


class _Residual(nn.Module):
    """A layer as a transformer block holds it: x + layer(norm(x))."""

    def __init__(self, layer: nn.Module, width: int, crosses: bool, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.layer = layer
        self.crosses = crosses

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        x = self.norm(hidden_states)
        return hidden_states + (self.layer(x, encoder_hidden_states) if self.crosses else self.layer(x))


@dataclass(frozen=True)
class Pace:
    """Seconds that a call of the dense model took in torch, and those that this thread had a core meanwhile."""

    call: float
    own: float

    @property
    def busy(self) -> float:
        """How much longer work takes here than on a machine that does nothing else."""
        return max(1.0, self.call / max(self.own, 1e-9))


class Measurement:
    """Milliseconds by rank, of a layer alone and of the whole model; a context, which has the threads asked for."""

    def __init__(
        self, denoiser: nn.Module, call: Call, inputs: Mapping[str, Mapping[str, Tensor]], settings: TableSettings
    ) -> None:
        self.denoiser, self.call, self.inputs, self.settings = denoiser, call, inputs, settings
        weights = sum(p.numel() * p.element_size() for p in denoiser.parameters())
        self.others = np.zeros(min(weights, MOST_BYTES) // 8 + 1)

    def __enter__(self) -> None:
        self.stack = ExitStack()
        if self.settings.runtime == "torch":
            self.stack.enter_context(on_threads(self.settings.threads))
            self.stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(own_threads())

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def estimate(
        self,
        layers: Mapping[str, Layer],
        ranks: Mapping[str, Sequence[int]],
        models: bool,
        pace: Pace,
        int8: Sequence[Int8Job],
    ) -> float:
        """Seconds that measuring will take: exports, and half of `settings.rounds`.

        All layers together take about a call of the dense model, at their dense ranks; at all ranks, half of that on
        average. A shape stands for its layer here, and for no other of the same shape.
        """
        graph, module = EXPORT_SECONDS if self.settings.runtime != "torch" else (0.0, 0.0)
        whole = len(list(self.denoiser.modules()))
        paths = [layer.path for layer in layers.values()] + [job.path for job in int8]
        sizes = [whole if path == WHOLE else len(list(self.denoiser.get_submodule(path).modules())) for path in paths]
        counts = [len(ranks[layer.path]) for layer in layers.values()] + [2 * len(job.ranks) for job in int8]
        seconds = sum(graph + module * size * count for size, count in zip(sizes, counts, strict=True)) * pace.busy
        seconds += QUANTISE_SECONDS * sum(len(job.ranks) for job in int8) * pace.busy
        runs = sum(size / whole * count for size, count in zip(sizes, counts, strict=True))
        if models:
            seconds += 2 * (graph + module * whole) * pace.busy
            runs += 2
        return seconds + runs * pace.call * self.settings.rounds / 2

    def whole(self, halved: Mapping[str, int]) -> dict[str, float]:
        """Of the `dense` model, and of one cut to these ranks, `half`."""
        models = {"dense": self.denoiser, "half": skeleton(self.denoiser, halved)}
        with TemporaryDirectory(prefix="slimdiff-latency-") as scratch:
            return self._take_turns({name: self._open(Path(scratch) / name, model) for name, model in models.items()})

    def _open(self, folder: Path, model: nn.Module) -> _Run:
        if self.settings.runtime == "torch":
            return partial(predict, model, self.call)
        unet = UNet.open(export_unet(model, folder, self.call), self.settings.runtime, self.settings.threads)
        return partial(unet.predict, self.call)

    def whole_in_int8(self) -> dict[str, float]:
        """Of the dense model, `1`, and of it with all that int8 may be worth it for in int8."""
        feed = {name: tensor.numpy() for name, tensor in unet_inputs(self.call).items()}
        with TemporaryDirectory(prefix="slimdiff-latency-") as scratch:
            file = export_unet(self.denoiser, Path(scratch), self.call)
            files = {"1": file, named_int8("1"): quantise_all(file, feed)}
            unets = {name: UNet.open(f, self.settings.runtime, self.settings.threads) for name, f in files.items()}
            return self._take_turns({name: partial(unet.predict, self.call) for name, unet in unets.items()})

    def alone(self, layer: Layer, ranks: Sequence[int], *, int8: bool = False) -> dict[str, float]:
        """Of a layer at these ranks; also in int8, if that is asked for."""
        inputs = self.inputs[layer.path]
        modules = {str(rank): _alone(self.denoiser, layer, rank, inputs) for rank in ranks}
        if self.settings.runtime == "torch":
            runs = {name: torch.no_grad()(partial(module, *inputs.values())) for name, module in modules.items()}
            return self._take_turns(runs)
        return self._in_runtime(modules, inputs, int8)

    def product(self, path: str) -> dict[str, float]:
        """Of a linear or convolution, `1`, and in int8."""
        module = copy.deepcopy(self.denoiser.get_submodule(path)).float().cpu().eval().requires_grad_(False)
        return self._in_runtime({"1": module}, self.inputs[path], int8=True)

    def _in_runtime(
        self, modules: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], int8: bool
    ) -> dict[str, float]:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        with TemporaryDirectory(prefix="slimdiff-latency-") as scratch:
            files = dict(_export_side_by_side(modules, inputs, Path(scratch)))
            files |= {named_int8(name): quantise_all(file, feed) for name, file in files.items()} if int8 else {}
            opened = {n: open_session(f, self.settings.runtime, self.settings.threads) for n, f in files.items()}
            return self._take_turns({name: partial(session.run, feed) for name, session in opened.items()})

    def _take_turns(self, runs: Mapping[str, _Run]) -> dict[str, float]:
        """Median milliseconds of every run; rounds end when all intervals are narrow, or at `settings.rounds`."""
        # On one thread, processor time is latency without the waits for whoever else is on that core.
        clock = time.process_time if threads_of(self.settings) == 1 else time.perf_counter
        names = list(runs)
        for name in names:
            runs[name]()  # first runs allocate
        times: dict[str, list[float]] = {name: [] for name in names}
        shuffle = np.random.default_rng(0)  # so that nobody always runs after the same neighbour
        for count in range(1, self.settings.rounds + 1):
            for index in shuffle.permutation(len(names)):
                self.others.sum()
                start = clock()
                runs[names[index]]()
                times[names[index]].append(clock() - start)
            if count >= FEWEST and all(interval_width(seconds) <= self.settings.interval for seconds in times.values()):
                break
        return {name: float(np.median(seconds) * 1e3) for name, seconds in times.items()}


def interval_width(seconds: Sequence[float]) -> float:
    """Width of the median's interval of 95 %, as a share of it: between two of the runs in order (binomial)."""
    rising, count = np.sort(seconds), len(seconds)
    low = max(0, int((count - Z * count**0.5) / 2))
    return float((rising[count - 1 - low] - rising[low]) / np.median(rising))


def group_of(layer: Layer) -> Group[Any]:
    return GROUPS[layer.sites[0].group]


def _alone(denoiser: nn.Module, layer: Layer, rank: int, inputs: Mapping[str, Tensor]) -> nn.Module:
    """A layer of this rank as it is run alone."""
    dense = denoiser.get_submodule(layer.path)
    module, weights = copy.deepcopy(dense), dense.state_dict()
    for site in layer.sites if rank < layer.dense_rank else ():
        GROUPS[site.group].resize(module, site, rank)
        weights |= GROUPS[site.group].cut(dense, site, site.first(rank))
    module.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()}, assign=True)
    module = module.float().cpu().eval().requires_grad_(False)
    if group_of(layer).stands_alone:
        return module
    x = inputs["hidden_states"]
    sequence = x.ndim == 3  # tokens; an attention over an image [B, C, H, W] has its norm and residual inside
    return _Residual(module, x.shape[-1], len(inputs) > 1, sequence)


class _SideBySide(nn.Module):
    """All of these modules on the same inputs."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> tuple[Tensor, ...]:
        inputs = (hidden_states,) if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)
        return tuple(part(*inputs) for part in self.parts)


def _export_side_by_side(
    modules: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], folder: Path
) -> Iterator[tuple[str, Path]]:
    """Export modules that take the same inputs together, and write a graph of each; gives names and files."""
    onnx = require("onnx", "onnx")
    outputs = [f"output_{name}" for name in modules]
    together = export_module(_SideBySide(list(modules.values())), dict(inputs), outputs, folder, ExportSettings())
    extractor = onnx.utils.Extractor(onnx.load(str(together)))
    for name, output in zip(modules, outputs, strict=True):
        file = folder / name / GRAPH
        file.parent.mkdir()
        onnx.save(extractor.extract_model(list(inputs), [output]), str(file))
        yield name, file


def threads_of(settings: TableSettings) -> int:
    return settings.threads or (own_threads() if settings.runtime == "torch" else usable_cores())
