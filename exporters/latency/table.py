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

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from exporters.graphs.export import unet_inputs
from exporters.latency.alone import Measurement, Pace, group_of, threads_of
from exporters.latency.int8 import Int8Costs, Int8Job, check_runtime
from exporters.machine import machine_name
from exporters.runtimes.opening import version_of
from exporters.settings import TableSettings
from slimdiff.denoising.trajectory import Call, predict, watch_calls
from slimdiff.groups import find_sites
from slimdiff.planning.costs import CostTable
from slimdiff.planning.knapsack import Layer, find_layers
from slimdiff.planning.planner import chosen_sites
from slimdiff.progress import bar
from slimdiff.settings import PlanSettings
from slimdiff.storage import manifest

CACHE = "SLIMDIFF_CACHE"
"""The environment variable that names another folder for what was measured."""
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
    where = conditions(settings)
    if planning.precision == "int8":
        check_runtime(settings.runtime)
    layers = find_layers(chosen_sites(find_sites(denoiser)[0], planning), planning.align)
    clock = time.perf_counter(), time.thread_time()
    inputs = _layer_inputs(denoiser, layers, call)
    pace = Pace(time.perf_counter() - clock[0], time.thread_time() - clock[1])
    thinned = {layer.path: _thinned(layer.candidates, settings.ranks) for layer in layers}
    keys = {layer.path: _key(denoiser, layer, inputs[layer.path], thinned[layer.path]) for layer in layers}
    one_of = {keys[layer.path]: layer for layer in layers}
    whole = _key_of_model(denoiser, call, list(one_of))
    in_int8, int8 = None, list[Int8Job]()
    if planning.precision == "int8":
        in_int8 = Int8Costs(denoiser, call, layers, whole)
        others = [layer for layer in in_int8.modules if layer.path not in inputs]
        inputs |= _layer_inputs(denoiser, others, call) | {p: {"x": x} for p, x in in_int8.inputs.items()}
        own = {o.path: _key(denoiser, o, inputs[o.path], o.candidates) for o in others}
        int8 = list(in_int8.jobs(keys | own))
    file = (cache or cache_folder()) / f"latency-{manifest.fingerprint(where)[:16]}.json"
    known = _read(file)
    missing = {key: layer for key, layer in one_of.items() if key not in known["layers"]}
    halved = {layer.path: _half(layer) for layer in layers}
    to_round = list({job.key: job for job in int8 if job.key not in known["layers"]}.values())
    if missing or to_round or whole not in known["models"]:
        measurement = Measurement(denoiser, call, inputs, settings)
        jobs = []
        if whole not in known["models"]:
            jobs.append(_Job("models", whole, "whole models", 2, partial(measurement.whole, halved)))
        for key, layer in missing.items():
            ranks = thinned[layer.path]
            jobs.append(_Job("layers", key, layer.path, len(ranks), partial(measurement.alone, layer, ranks)))
        for one in to_round:
            jobs.append(_Job("layers", one.key, one.path, 2 * len(one.ranks), partial(one.run, measurement)))
        seconds = measurement.estimate(missing, thinned, whole not in known["models"], pace, to_round)
        log.info(
            "latency table: %d figures to measure in %s (%d layers of %d shapes, %d of these known), about %s; each is "
            "kept as it is measured, in %s",
            *(sum(job.figures for job in jobs), where["runtime"], len(layers), len(one_of)),
            *(len(one_of) - len(missing), _spoken(seconds), file),
        )
        with measurement:
            known = _measure(jobs, file, where)
    table = _scaled(known, whole, keys, halved)
    saved, anchor = in_int8.savings(int8, known["layers"]) if in_int8 else ({}, None)
    shown = {} if anchor is None else {"int8_anchor": round(anchor, 4)}
    return replace(table, made_from={**where, "measured": len(missing), **table.made_from, **shown}, int8=saved)


class _Job(NamedTuple):
    """A measurement that is kept by itself."""

    table: str
    """Of the file: `models` or `layers`."""
    key: str
    name: str
    """For people."""
    figures: int
    run: Callable[[], dict[str, float]]


def _measure(jobs: Sequence[_Job], file: Path, where: Mapping[str, Any]) -> dict[str, Any]:
    """Run what is missing, each kept as it is measured; gives all that is known then."""
    known = _read(file)
    with bar(total=sum(job.figures for job in jobs), name="latency table", unit="figure") as shown:
        for job in jobs:
            shown.set_postfix_str(job.name)
            times = job.run()
            known = _read(file)  # another process may have added to it
            known[job.table][job.key] = times
            manifest.write_json(file, {**known, **where})
            shown.update(job.figures)
    return known


def _scaled(known: Mapping[str, Any], whole: str, keys: Mapping[str, str], halved: Mapping[str, int]) -> CostTable:
    """The table of what is known, scaled by the share of the layers' own differences that the whole model shows."""
    dense, half = known["models"][whole]["dense"], known["models"][whole]["half"]
    curves = {path: _monotone(known["layers"][key]) for path, key in keys.items()}
    alone = CostTable("latency_ms", dense, curves)
    expected = dense - alone.of(halved)
    anchor = (dense - half) / expected if expected > 0 else 1.0
    if not 0.25 < anchor < 4:  # noise, not a difference: better the layers' own word than a wild factor
        anchor = 1.0
    scaled = {path: {rank: ms * anchor for rank, ms in curve.items()} for path, curve in curves.items()}
    return CostTable("latency_ms", dense, scaled, {"anchor": round(anchor, 4)})


def cache_folder() -> Path:
    """Where measurements are kept: `$SLIMDIFF_CACHE`, or `slimdiff` in the user's cache folder."""
    if named := os.environ.get(CACHE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "slimdiff"


def conditions(settings: TableSettings) -> dict[str, Any]:
    """All that latency depends on beside the model; also checks that the runtime is here."""
    version = torch.__version__ if settings.runtime == "torch" else version_of(settings.runtime)
    return {
        "schema": 2,
        "runtime": f"{settings.runtime} {version}",
        "machine": machine_name(),
        "threads": threads_of(settings),
        "rounds": settings.rounds,
        "interval": settings.interval,
        "exporter": torch.__version__,
    }


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
        second = group_of(layer).second_input
        inputs = {"hidden_states": next(iter(arguments.values())), second: arguments.get(second)}
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        seen[layer.path] = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(watch_calls(denoiser.get_submodule(layer.path), partial(see, layer)))
        predict(denoiser, call)
    return seen


def _key_of_model(denoiser: nn.Module, call: Call, layers: Sequence[str]) -> str:
    """Of all that the whole model's latency depends on; `layers` are the keys of its layers."""
    config = {k: v for k, v in dict(getattr(denoiser, "config", {})).items() if not k.startswith("_")}
    shapes = {name: list(tensor.shape) for name, tensor in unet_inputs(call).items()}
    return manifest.fingerprint({"config": config, "call": shapes, "layers": sorted(layers)})


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


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
