"""A UNet's graph in int8: NNCF quantises it on recorded calls, and the layers that suffer most stay as they are.

Which those are is measured. NNCF quantises every linear and convolution once; then each of them alone is given, in
torch, what that graph has of it (its input rounded to the graph's steps, its rounded weight, its moved bias), and the
change of the noise prediction on recorded calls is what it costs. Errors of layers are as good as independent, so their
sum stands for the error of all of them, and the layers that cost most for their multiply-adds stay wide until the sum
is within `ExportSettings.int8_error`. NNCF then quantises the rest. Where a slim model's plan names layers and their
precision, that is what is done.

What NNCF is asked for, and why:

- Symmetric steps, zero points all 0: TensorRT takes no others.
- Weights of 7 bits, for x86 processors without VNNI clip sums of wider ones without a word (`exporters.graphs.int8`).
- Ranges of all calls: by itself it takes the mean of their largest values, and inputs grow and shrink over a
  trajectory, so that it would cut them off at one end of it.
- No smoothing (SmoothQuant) ahead of linears: it is a product more at run time.
- Products of two activations, and whatever is no linear or convolution, are left alone; so are time layers, which
  multiply one row a sample.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from torch import nn

from exporters.graphs.inputs import in_graph_dtype, named_inputs
from exporters.graphs.int8_costs import in_int8, macs_of
from exporters.graphs.int8_layers import REPORT, Int8Layer, int8_layers
from exporters.graphs.precision import paths_to_keep
from exporters.graphs.reading import WEIGHTED, inputs_of, module_of, name_of, read_graph, shape_of, weight_of
from exporters.graphs.shapes import add_shapes
from exporters.graphs.stretches import peak_bytes, work_in_stretches
from exporters.settings import ExportSettings
from slimdiff.denoising.int8 import input_ranges
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError, SlimdiffError, require
from slimdiff.planning.costs import count_macs
from slimdiff.planning.precision import choose_int8, errors_alone, settled_within

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from slimdiff.plan import Plan

log = logging.getLogger("slimdiff")
WEIGHT_BITS = 7
"""Of weights: what no processor's sums clip."""


def quantise_graph(
    file: Path, unet: nn.Module, calls: Sequence[Call], settings: ExportSettings, plan: Plan | None = None
) -> dict[str, Any]:
    """Put a UNet's fp32 graph into int8, in its place.

    Args:
        file: `model.onnx` as `export_unet` wrote it in fp32.
        unet: that it was made from, float32.
        calls: recorded from trajectories, of all times and both branches of guidance.
        plan: whose layers are chosen already, if it names any: `settings.int8_error` is then not looked at.

    Returns:
        what the graph carries from now on as `int8_layers.REPORT`, and the manifest of an export: `layers` (module
        paths of what is in int8), `wide` (of what is not: `layer`, `reason` and `noise_error`, what it would have cost
        alone, None where that was not measured), `noise_error` (the sum of the int8 layers' own, None where a plan does
        not say), `share` (of the calls' multiply-adds), `weight_bits`,
        `quantiser` (with its version) and `calls`.

    Raises:
        InputError: without calls, for calls on which an activation is not finite, if no layer can be in int8, or a plan
            says so of one that the graph does not have.
        MissingPackageError: without nncf.
    """
    check_calibration(calls)
    graph = read_graph(file)
    layers = _layers(graph, unet)
    feeds = [_feed(graph, call, number) for number, call in enumerate(calls)]
    kept = paths_to_keep(unet, settings.keep_fp32)
    wide = {
        path: _wide(path, "keep_fp32 names it") for path in layers if any(f"{path}.".startswith(f"{k}.") for k in kept)
    }
    constant = _constant_inputs(unet, list(layers), calls)
    wide |= {path: _wide(path, f"its input is {value:g} in all calls") for path, value in constant.items()}
    macs = macs_of(unet, list(layers), calls[0])
    _warn_of_memory(peak_bytes(graph.graph, len(calls)))
    alone: Mapping[str, float | None]
    if plan is not None and plan.layers:
        alone, others = _as_planned(plan, layers)
        model = None
    else:
        alone, others, model = _as_measured(file, unet, calls, feeds, layers, wide, macs, settings.int8_error)
    wide = others | wide
    int8 = [path for path in layers if path in alone and path not in wide]
    if not int8:
        raise InputError("the plan leaves no layer to put into int8: export in fp32")
    model = model or _quantised(file, feeds, [layers[path] for path in int8])
    if list(int8_layers(model)) != int8:
        odd = sorted(set(int8) ^ set(int8_layers(model)))
        raise SlimdiffError(f"NNCF did not quantise what it was asked to, such as {odd[0]}: say so to its authors")
    costs = [alone[path] for path in int8]
    report: dict[str, Any] = {
        "layers": int8,
        "wide": [wide[path] for path in layers if path in wide],
        "noise_error": None if None in costs else sum(cost or 0.0 for cost in costs),
        "share": sum(macs[path] for path in int8) / count_macs(unet, calls[0]),
        "weight_bits": WEIGHT_BITS,
        "quantiser": f"nncf {_nncf().__version__}",
        "calls": len(calls),
    }
    _write(model, file, report)
    return report


def quantise_all(file: Path, feed: Mapping[str, np.ndarray]) -> Path:
    """A copy of a graph, in a folder beside it, with every product of rows with a weight in int8: for its time alone.

    Args:
        feed: that it is calibrated on.
    """
    ir, graph = require("onnx_ir", "onnx"), read_graph(file)
    nodes = [n for n in graph.graph if n.op_type in WEIGHTED and weight_of(n) is not None]
    out = file.parent / "int8" / file.name
    out.parent.mkdir()
    for config in file.parent.glob("config.json"):  # what opens a whole model reads it
        shutil.copy(config, out.parent)
    model = _quantised(file, [feed], [n for n in nodes if len(shape_of(n.outputs[0])) > 2])
    ir.save(model, str(out), external_data=f"{file.name}.data")
    return out


def _as_planned(plan: Plan, layers: Mapping[str, ir.Node]) -> tuple[dict[str, float | None], dict[str, dict[str, Any]]]:
    """What a plan puts into int8, each with its cost, and what it does not."""
    if odd := [path for path in plan.int8() if path not in layers]:
        raise InputError(f"the plan puts {odd[0]} into int8, and the UNet's graph has no product of it alone")
    alone = {path: plan.layers[path].noise_error for path in plan.int8()}
    wide = {}
    for path in layers:
        if path not in alone:
            said = plan.layers.get(path)
            reason = said.reason if said is not None and said.reason else "the plan keeps it so"
            wide[path] = _wide(path, reason, said.noise_error if said is not None else None)
    return alone, wide


def _as_measured(
    file: Path,
    unet: nn.Module,
    calls: Sequence[Call],
    feeds: Sequence[Mapping[str, np.ndarray]],
    layers: Mapping[str, ir.Node],
    kept: Collection[str],
    macs: Mapping[str, int],
    most: float,
) -> tuple[dict[str, float | None], dict[str, dict[str, Any]], ir.Model | None]:
    """What goes into int8 by what it costs alone, what does not, and the graph if it is all that could.

    Args:
        kept: what stays wide without being measured.
        most: that it may cost together.
    """
    rows = [path for path, node in layers.items() if len(shape_of(node.outputs[0])) < 3 and path not in kept]
    wide = {path: _wide(path, "it multiplies one row a sample: there is nothing to gain") for path in rows}
    asked = [path for path in layers if path not in wide and path not in kept]
    trial = _quantised(file, feeds, [layers[path] for path in asked])
    there = {path: layer for path, layer in int8_layers(trial).items() if path in asked}

    def rounded(path: str) -> AbstractContextManager[None]:
        return in_int8(unet.get_submodule(path), there[path])

    alone = errors_alone(unet, list(there), calls, rounded, settled_within(macs, most))
    int8 = choose_int8(alone, macs, most)
    if not int8:
        raise InputError(
            f"no layer of this UNet stays within int8_error {most:g} in int8; the cheapest costs "
            f"{min(alone.values(), default=float('nan')):.2g}: allow more, or export in fp32"
        )
    dear = [path for path in asked if path not in int8]
    wide |= {path: _wide(path, "it costs too much for its multiply-adds", alone.get(path)) for path in dear}
    return {path: alone[path] for path in int8}, wide, None if dear else trial


def check_calibration(calls: Sequence[Call]) -> None:
    """Refuse int8 without calls to calibrate on, or without NNCF, before the long work.

    Raises:
        InputError, MissingPackageError: see `quantise_graph`.
    """
    _nncf()
    if not calls:
        raise InputError("int8 is calibrated on recorded denoiser calls, and there are none: export a whole pipeline")


def _nncf() -> Any:
    with patch.dict(os.environ, {"NNCF_CI": "1"}):  # or it reports its use to its makers
        return require("nncf", "int8")


def _warn_of_memory(need: int) -> None:
    """Say before the long work that there is less memory than it takes."""
    if need > (there := psutil.virtual_memory().available):
        log.warning(
            "int8: NNCF takes about %.0f GB here, and %.0f GB are free: the system may end this process",
            *(need / 1e9, there / 1e9),
        )


def _wide(path: str, reason: str, error: float | None = None) -> dict[str, Any]:
    return {"layer": path, "reason": reason, "noise_error": error}


def _layers(graph: ir.Model, unet: nn.Module) -> dict[str, ir.Node]:
    """The linears and convolutions that the graph has one product of, by module path, in execution order."""
    kinds = (nn.Linear, nn.Conv2d)
    paths = {path for path, module in unet.named_modules() if isinstance(module, kinds)}
    nodes = [node for node in graph.graph if node.op_type in WEIGHTED and weight_of(node) is not None]
    times = Counter(map(module_of, nodes))
    return {path: node for node in nodes if (path := module_of(node)) in paths and times[path] == 1}


def _feed(graph: ir.Model, call: Call, number: int) -> dict[str, np.ndarray]:
    """A recorded call as a graph takes it, whatever its batch: samples in turn, beginning with another each call."""
    tensors, _ = named_inputs(call.arguments)
    samples = int(call.arguments["sample"].shape[0])
    feed = {}
    for name, spec in inputs_of(graph).items():
        tensor = in_graph_dtype(name, tensors[name], torch.float32)
        if name == "timestep":
            tensor = tensor.reshape(-1)[0]
        elif spec.shape and isinstance(batch := spec.shape[0], int) and tensor.shape[:1] == (samples,) != (batch,):
            tensor = tensor[(torch.arange(batch) + number) % samples]
        feed[name] = tensor.contiguous().numpy().astype(spec.dtype)
    return feed


def _constant_inputs(unet: nn.Module, paths: Sequence[str], calls: Sequence[Call]) -> dict[str, float]:
    """The layers whose input is one number in all calls, with that number: no steps can be measured for it."""
    return {path: low for path, (low, high) in input_ranges(unet, paths, calls).items() if low == high}


def _quantised(file: Path, feeds: Sequence[Mapping[str, np.ndarray]], nodes: Sequence[ir.Node]) -> ir.Model:
    """The graph with these nodes in int8; of what is not, the weights are still in the file."""
    names = {str(node.name) for node in nodes}
    return work_in_stretches(file, feeds, names, partial(_stretch_quantised, names, file.parent.resolve()))


def _stretch_quantised(
    names: Collection[str], folder: Path, model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]]
) -> onnx.ModelProto:
    """A stretch with these of its nodes in int8, all of it in memory."""
    nncf = _nncf()
    advanced = require("nncf.quantization.advanced_parameters", "int8")
    ranges = require("nncf.quantization.range_estimator", "int8")
    others = [node.name for node in model.graph.node if node.name not in names]
    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(list(feeds)),
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(feeds),
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
            advanced_parameters=advanced.AdvancedQuantizationParameters(
                overflow_fix=advanced.OverflowFix.ENABLE,
                activations_range_estimator_params=ranges.RangeEstimatorParametersSet.MINMAX,
                smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1),
                backend_params={"external_data_dir": str(folder)},
            ),
        )


def _write(model: ir.Model, file: Path, report: dict[str, Any]) -> None:
    """Write a quantised graph over the one that it was made from: named by module, with every tensor's shape.

    What is not quantised is read from the old file meanwhile.
    """
    onnx, ir = require("onnx", "onnx"), require("onnx_ir", "onnx")
    for layer in int8_layers(model).values():
        _name(layer)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    model.metadata_props.clear()
    with TemporaryDirectory(prefix=".", dir=file.parent) as folder:
        new, data = Path(folder) / file.name, f"{file.name}.data"
        ir.save(model, str(new), external_data=data)
        proto = onnx.load(str(new), load_external_data=False)
        del proto.graph.value_info[:]
        add_shapes(proto)
        onnx.helper.set_model_props(proto, {REPORT: json.dumps(report)})
        new.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(str(new), full_check=True)
        (new.parent / data).replace(file.parent / data)
        new.replace(file)


def _name(layer: Int8Layer) -> None:
    """Name a layer's quantisers and their constants after its module, as `name_by_module` does its nodes.

    What quantises the input of several layers is named after the first of them.
    """
    path, (active, weight) = layer.path, (value.producer() for value in layer.node.inputs[:2] if value is not None)
    assert active is not None and weight is not None and active.inputs[0] is not None
    maker = active.inputs[0].producer()
    assert maker is not None
    for node, name in ((maker, "QuantizeLinear"), (active, "DequantizeLinear"), (weight, "DequantizeLinear_weight")):
        if "/" in (node.name or "") and (node.name or "").rpartition("/")[2] in (name, "QuantizeLinear"):
            continue  # named after another layer already
        node.name = f"{path}/{name}"
        node.outputs[0].name = f"{path}.{name}"
        endings = {"QuantizeLinear": ("input_scale", "input_zero_point"), "DequantizeLinear": ()}.get(name)
        values = node.inputs[1:] if name == "QuantizeLinear" else node.inputs if endings is None else ()
        for value, ending in zip(values, endings or ("weight", "weight_scale", "weight_zero_point"), strict=False):
            if value is not None and value.is_initializer():
                _rename(value, f"{path}.{ending}")


def _rename(value: ir.Value, name: str) -> None:
    if value.graph is not None and name != name_of(value) and name not in value.graph.initializers:
        value.name = name


@contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's bars and lines, which it writes to stdout, where results belong.

    Its own switch for that turns down every handler of the process.
    """
    theirs = logging.getLogger("nncf")
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.setLevel(before)
