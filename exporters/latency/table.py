"""What a denoiser's layers cost in time by the ranks they keep, measured in a runtime: the table for a speedup.

A layer (an attention or feed-forward module with the norm before it and the residual around it, so that a runtime
fuses what it fuses in the model; or a resnet, which has them inside) is run alone, at a few ranks. Its ranks take turns
in changing order, one run each, so that whatever slows the machine down for a while slows all of them; between runs, as
many bytes as the model's weights are read, so that a layer finds the caches as cold as in the model. Figures are taken
until each one's interval is narrow, or `TableSettings.rounds` are run. All ranks of a layer come out of one export,
which takes hardly longer than that of one. The whole dense model and one cut to half its ranks show how much of the
difference that layers show alone the whole model shows (the anchor). Layers of the same shape are measured once; what
was measured is kept in a file per machine, runtime, versions and thread count, shape by shape: a measurement that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import logging
import os
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
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from exporters.graphs.export import export_module, export_unet, unet_inputs
from exporters.layout import GRAPH
from exporters.machine import machine_name, usable_cores
from exporters.runtimes.opening import open_session, version_of
from exporters.runtimes.unet import UNet
from exporters.settings import ExportSettings, TableSettings
from slimdiff.denoising.torch_state import on_threads, own_threads
from slimdiff.denoising.trajectory import Call, predict, watch_calls
from slimdiff.errors import require
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Group
from slimdiff.planning.costs import CostTable
from slimdiff.planning.knapsack import Layer, find_layers
from slimdiff.planning.planner import chosen_sites
from slimdiff.progress import bar
from slimdiff.settings import PlanSettings
from slimdiff.slimming.skeleton import skeleton
from slimdiff.storage import manifest

CACHE = "SLIMDIFF_CACHE"
"""The environment variable that names another folder for what was measured."""
EXPORT_SECONDS = (0.8, 0.035)
"""What the export of a graph takes, at all and per module in it, on one core that does nothing else: for the estimate.
Measured on a Xeon, of single layers and of a UNet of 6 M parameters."""
FEWEST, Z = 8, 1.96
"""Runs before an interval is looked at, and half its width in standard deviations of a count of runs: 95 %."""
MOST_BYTES = 64 << 20
"""Read between runs, at most: more than a core's own caches hold."""
_Run = Callable[[], Any]
log = logging.getLogger("slimdiff")


def measure_latency(
    denoiser: nn.Module,
    call: Call,
    planning: PlanSettings | None = None,
    settings: TableSettings | None = None,
    *,
    cache: Path | None = None,
) -> CostTable:
    """Milliseconds of one call by layer and rank; measures what the cache does not hold.

    Args:
        call: whose shapes count, batch included.
        cache: folder of the measurements; by default `slimdiff` in the user's cache folder, or `$SLIMDIFF_CACHE`.

    Returns:
        a table whose `made_from` has `runtime`, `machine`, `threads`, `measured` (how many shapes were measured now,
        the others were known) and `anchor`: the share of the layers' own differences that the whole model showed.

    Raises:
        InputError: if nothing can be slimmed.
        MissingPackageError: if the runtime is not here.
    """
    settings, planning = settings or TableSettings(), planning or PlanSettings()
    where = _conditions(settings)
    layers = find_layers(chosen_sites(find_sites(denoiser)[0], planning), planning.align)
    clock = time.perf_counter(), time.thread_time()
    inputs = _layer_inputs(denoiser, layers, call)
    pace = _Pace(time.perf_counter() - clock[0], time.thread_time() - clock[1])
    thinned = {layer.path: _thinned(layer.candidates, settings.ranks) for layer in layers}
    keys = {layer.path: _key(denoiser, layer, inputs[layer.path], thinned[layer.path]) for layer in layers}
    one_of = {keys[layer.path]: layer for layer in layers}
    config = {k: v for k, v in dict(getattr(denoiser, "config", {})).items() if not k.startswith("_")}
    shapes = {name: list(tensor.shape) for name, tensor in unet_inputs(call).items()}
    whole = manifest.fingerprint({"config": config, "call": shapes, "layers": sorted(one_of)})
    file = (cache or cache_folder()) / f"latency-{manifest.fingerprint(where)[:16]}.json"
    known = _read(file)
    missing = {key: layer for key, layer in one_of.items() if key not in known["layers"]}
    halved = {layer.path: _half(layer) for layer in layers}
    if missing or whole not in known["models"]:
        measurement = _Measurement(denoiser, call, inputs, settings)
        jobs: list[tuple[str, str, str, int, Callable[[], dict[str, float]]]] = []
        if whole not in known["models"]:
            jobs.append(("models", whole, "whole models", 2, partial(measurement.whole, halved)))
        for key, layer in missing.items():
            ranks = thinned[layer.path]
            jobs.append(("layers", key, layer.path, len(ranks), partial(measurement.alone, layer, ranks)))
        figures = sum(count for *_, count, _ in jobs)
        seconds = measurement.estimate(missing, thinned, whole not in known["models"], pace)
        log.info(
            "latency table: %d figures to measure in %s (%d layers of %d shapes, %d of these known), about %s; each is "
            "kept as it is measured, in %s",
            *(figures, where["runtime"], len(layers), len(one_of), len(one_of) - len(missing), _spoken(seconds), file),
        )
        with measurement, bar(total=figures, name="latency table", unit="figure") as shown:
            for table, key, name, count, measure in jobs:
                shown.set_postfix_str(name)
                times = measure()
                known = _read(file)  # another process may have added to it
                known[table][key] = times
                manifest.write_json(file, {**known, **where})
                shown.update(count)
    dense, half = known["models"][whole]["dense"], known["models"][whole]["half"]
    curves = {path: _monotone(known["layers"][key]) for path, key in keys.items()}
    alone = CostTable("latency_ms", dense, curves)
    expected = dense - alone.of(halved)
    anchor = (dense - half) / expected if expected > 0 else 1.0
    if not 0.25 < anchor < 4:  # noise, not a difference: better the layers' own word than a wild factor
        anchor = 1.0
    scaled = {path: {rank: ms * anchor for rank, ms in curve.items()} for path, curve in curves.items()}
    return CostTable("latency_ms", dense, scaled, {**where, "measured": len(missing), "anchor": round(anchor, 4)})


def cache_folder() -> Path:
    """Where measurements are kept: `$SLIMDIFF_CACHE`, or `slimdiff` in the user's cache folder."""
    if named := os.environ.get(CACHE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "slimdiff"


def _conditions(settings: TableSettings) -> dict[str, Any]:
    """All that latency depends on beside the model; also checks that the runtime is here."""
    version = torch.__version__ if settings.runtime == "torch" else version_of(settings.runtime)
    return {
        "schema": 2,
        "runtime": f"{settings.runtime} {version}",
        "machine": machine_name(),
        "threads": _threads(settings),
        "rounds": settings.rounds,
        "interval": settings.interval,
        "exporter": torch.__version__,
    }


def _threads(settings: TableSettings) -> int:
    return settings.threads or (own_threads() if settings.runtime == "torch" else usable_cores())


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {"layers": dict(known["layers"]), "models": dict(known["models"])}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours: measured again
        return {"layers": {}, "models": {}}


def _thinned(candidates: Sequence[int], count: int) -> list[int]:
    picks = np.unique(np.linspace(0, len(candidates) - 1, count).round().astype(int))
    return [candidates[i] for i in picks]


def _half(layer: Layer) -> int:
    return min(layer.candidates, key=lambda rank: abs(rank - layer.dense_rank / 2))


def _monotone(curve: Mapping[str, float]) -> dict[int, float]:
    """Noise may say that a larger rank is faster; the closest rising curve does not."""
    ranks = sorted(int(r) for r in curve)
    fitted = isotonic_regression([curve[str(r)] for r in ranks]).x
    return dict(zip(ranks, map(float, fitted), strict=True))


def _layer_inputs(denoiser: nn.Module, layers: Sequence[Layer], call: Call) -> dict[str, dict[str, Tensor]]:
    """What each layer is called with, by module path: `hidden_states` and, where it has one, a second input."""
    seen: dict[str, dict[str, Tensor]] = {}

    def see(layer: Layer, arguments: dict[str, Any]) -> None:
        second = _group_of(layer).second_input
        inputs = {"hidden_states": next(iter(arguments.values())), second: arguments.get(second)}
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        seen[layer.path] = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(watch_calls(denoiser.get_submodule(layer.path), partial(see, layer)))
        predict(denoiser, call)
    return seen


def _key(denoiser: nn.Module, layer: Layer, inputs: Mapping[str, Tensor], ranks: Sequence[int]) -> str:
    """Of all that a layer's latency depends on."""
    module = denoiser.get_submodule(layer.path)
    parts = {
        "kind": type(module).__name__,
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "heads": layer.sites[0].heads,
        "dense_rank": layer.dense_rank,
        "parts": [type(part).__name__ for part in module.modules()],
        "weights": [[name, list(p.shape)] for name, p in module.named_parameters()],
        "processor": type(getattr(module, "processor", None)).__name__,
        "ranks": list(ranks),
    }
    return manifest.fingerprint(parts)


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
class _Pace:
    """Seconds that a call of the dense model took in torch, and those that this thread had a core meanwhile."""

    call: float
    own: float

    @property
    def busy(self) -> float:
        """How much longer work takes here than on a machine that does nothing else."""
        return max(1.0, self.call / max(self.own, 1e-9))


class _Measurement:
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
        self, layers: Mapping[str, Layer], ranks: Mapping[str, Sequence[int]], models: bool, pace: _Pace
    ) -> float:
        """Seconds that measuring will take: exports, and half of `settings.rounds`.

        All layers together take about a call of the dense model, at their dense ranks; at all ranks, half of that on
        average. A shape stands for its layer here, and for no other of the same shape.
        """
        graph, module = EXPORT_SECONDS if self.settings.runtime != "torch" else (0.0, 0.0)
        whole = len(list(self.denoiser.modules()))
        sizes = [len(list(self.denoiser.get_submodule(layer.path).modules())) for layer in layers.values()]
        counts = [len(ranks[layer.path]) for layer in layers.values()]
        seconds = sum(graph + module * size * count for size, count in zip(sizes, counts, strict=True)) * pace.busy
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

    def alone(self, layer: Layer, ranks: Sequence[int]) -> dict[str, float]:
        """Of a layer at these ranks."""
        inputs = self.inputs[layer.path]
        modules = {str(rank): _alone(self.denoiser, layer, rank, inputs) for rank in ranks}
        if self.settings.runtime == "torch":
            runs = {name: torch.no_grad()(partial(module, *inputs.values())) for name, module in modules.items()}
            return self._take_turns(runs)
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        with TemporaryDirectory(prefix="slimdiff-latency-") as scratch:
            files = _export_side_by_side(modules, inputs, Path(scratch))
            sessions = {n: open_session(file, self.settings.runtime, self.settings.threads) for n, file in files}
            return self._take_turns({name: partial(session.run, feed) for name, session in sessions.items()})

    def _take_turns(self, runs: Mapping[str, _Run]) -> dict[str, float]:
        """Median milliseconds of every run; rounds end when all intervals are narrow, or at `settings.rounds`."""
        # On one thread, processor time is latency without the waits for whoever else is on that core.
        clock = time.process_time if _threads(self.settings) == 1 else time.perf_counter
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
            if count >= FEWEST and all(_width(seconds) <= self.settings.interval for seconds in times.values()):
                break
        return {name: float(np.median(seconds) * 1e3) for name, seconds in times.items()}


def _width(seconds: Sequence[float]) -> float:
    """Width of the median's interval of 95 %, as a share of it: between two of the runs in order (binomial)."""
    rising, count = np.sort(seconds), len(seconds)
    low = max(0, int((count - Z * count**0.5) / 2))
    return float((rising[count - 1 - low] - rising[low]) / np.median(rising))


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _group_of(layer: Layer) -> Group[Any]:
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
    if _group_of(layer).stands_alone:
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
