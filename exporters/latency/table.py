"""What a denoiser's layers cost in time by the ranks they keep, measured in a runtime: the table for a speedup.

A layer (an attention or feed-forward module with the norm before it and the residual around it, so that a runtime
fuses what it fuses in the model; or a resnet, which has them inside) is run alone, at a few ranks. All layers take
turns in changing order, one run each, and the whole dense model among them: a layer then finds the caches as cold as in
the model, and whatever slows the machine down for a while slows all of them. Where they do not fit into memory at once,
the layers come in groups. One more model, cut to half its ranks, shows how much of the difference that layers show
alone the whole model shows (the anchor). Layers of the same shape are measured once; what was measured is kept in a
file per machine, runtime, versions and thread count.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from exporters.engine.memory import available_memory
from exporters.graphs.export import export_module, export_unet, unet_inputs
from exporters.machine import machine_name, usable_cores
from exporters.runtimes.opening import open_session, version_of
from exporters.runtimes.unet import UNet
from exporters.settings import ExportSettings, TableSettings
from slimdiff.denoising.trajectory import Call, predict, watch_calls
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
_Run = Callable[[], Any]
_Job = tuple[str, str]
"""A layer's key and rank; of a whole model, nothing and its name."""


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
    inputs = _layer_inputs(denoiser, layers, call)
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
        times = _measure(denoiser, call, inputs, missing, thinned, halved, settings)
        for (key, name), milliseconds in times.items():
            table = known["layers" if key else "models"]
            table.setdefault(key or whole, {})[name] = milliseconds
        manifest.write_json(file, {**known, **where})
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
        "schema": 1,
        "runtime": f"{settings.runtime} {version}",
        "machine": machine_name(),
        "threads": _threads(settings),
        "rounds": settings.rounds,
        "exporter": torch.__version__,
    }


def _threads(settings: TableSettings) -> int:
    return settings.threads or (torch.get_num_threads() if settings.runtime == "torch" else usable_cores())


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


def _measure(
    denoiser: nn.Module,
    call: Call,
    inputs: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, Layer],
    ranks: Mapping[str, Sequence[int]],
    halved: Mapping[str, int],
    settings: TableSettings,
) -> dict[_Job, float]:
    """Median milliseconds by (layer's key, rank), and of the whole models by ("", "dense") and ("", "half")."""
    with TemporaryDirectory(prefix="slimdiff-latency-") as scratch, ExitStack() as after:
        folder = Path(scratch)
        if settings.runtime == "torch" and settings.threads:
            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings.threads)

        def whole(name: str) -> _Run:
            model = denoiser if name == "dense" else skeleton(denoiser, halved)
            if settings.runtime == "torch":
                return partial(predict, model, call)
            unet = UNet.open(export_unet(model, folder / name, call), settings.runtime, settings.threads)
            return partial(unet.predict, call)

        def alone(key: str, layer: Layer, rank: int) -> _Run:
            module = skeleton(denoiser, {layer.path: rank}).get_submodule(layer.path)
            return _layer_run(module, _group_of(layer), inputs[layer.path], folder / f"{key}-{rank}", settings)

        openers: list[dict[_Job, Callable[[], _Run]]] = [{("", n): partial(whole, n) for n in ("dense", "half")}]
        for key, layer in layers.items():
            openers.append({(key, str(rank)): partial(alone, key, layer, rank) for rank in ranks[layer.path]})
        return _median_times(openers, settings)


def _group_of(layer: Layer) -> Group[Any]:
    return GROUPS[layer.sites[0].group]


def _layer_run(
    module: nn.Module, group: Group[Any], inputs: Mapping[str, Tensor], folder: Path, settings: TableSettings
) -> _Run:
    x = inputs["hidden_states"]
    sequence = x.ndim == 3  # tokens; an attention over an image [B, C, H, W] has its norm and residual inside
    wrapped = copy.deepcopy(module).float().cpu().eval()
    if not group.stands_alone:
        wrapped = _Residual(wrapped, x.shape[-1], len(inputs) > 1, sequence)
    if settings.runtime == "torch":
        return torch.no_grad()(lambda: wrapped(*inputs.values()))
    file = export_module(wrapped, dict(inputs), ["output"], folder, ExportSettings())
    session = open_session(file, settings.runtime, settings.threads)
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    return partial(session.run, feed)


def _median_times(openers: Sequence[Mapping[_Job, Callable[[], _Run]]], settings: TableSettings) -> dict[_Job, float]:
    """Milliseconds of every job; all take turns, or as many as half of the free memory holds, a mapping at a time."""
    times: dict[_Job, float] = {}
    runs: dict[_Job, _Run] = {}
    most, process = available_memory() / 2, psutil.Process()
    before = process.memory_info().rss
    with bar(total=sum(map(len, openers)), name="latency: prepare") as shown:
        for together in openers:
            for job, opener in together.items():
                runs[job] = opener()
                runs[job]()  # first runs allocate
                shown.update()
            if process.memory_info().rss - before > most:
                times |= _take_turns(runs, settings)
                runs.clear()
                gc.collect()
    return times | (_take_turns(runs, settings) if runs else {})


def _take_turns(runs: Mapping[_Job, _Run], settings: TableSettings) -> dict[_Job, float]:
    # On one thread, processor time is latency without the waits for whoever else is on that core.
    clock = time.process_time if _threads(settings) == 1 else time.perf_counter
    jobs = list(runs)
    times: dict[_Job, list[float]] = {job: [] for job in jobs}
    shuffle = np.random.default_rng(0)  # so that nobody always runs after the same neighbour
    for _ in bar(range(settings.rounds), name="latency: time", leave=False):
        for index in shuffle.permutation(len(jobs)):
            start = clock()
            runs[jobs[index]]()
            times[jobs[index]].append(clock() - start)
    return {job: float(np.median(seconds) * 1e3) for job, seconds in times.items()}
