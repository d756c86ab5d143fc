"""UNet to ONNX: one graph, weights as external data, every node named after its module."""

from __future__ import annotations

import inspect
import io
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from exporters.dtypes import DTYPES
from exporters.graphs.inputs import (
    BATCH,
    NAMES,
    SAMPLES,
    arguments_from,
    in_graph_dtype,
    latent_size,
    named_inputs,
    open_inputs,
)
from exporters.graphs.inputs import in_steps as in_steps
from exporters.graphs.inputs import open_size as open_size
from exporters.graphs.naming import name_by_module, with_layers
from exporters.graphs.precision import join_casts, keep_in_float32, paths_to_keep, widen_softmax
from exporters.graphs.quantise import check_calibration, quantise_graph
from exporters.graphs.shapes import add_shapes, check_leftovers
from exporters.graphs.split import split_graph
from exporters.graphs.timesteps import graph_time, has_whole_times
from exporters.graphs.tracing import closed_dims, closed_dims_in, refuse_closed, traceable
from exporters.layout import EXPORTED_FOR, GRAPH
from exporters.settings import ExportSettings
from slimdiff.denoising.precision import cast, floats
from slimdiff.denoising.scheduled import Scheduled
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError, require
from slimdiff.models import plan_of
from slimdiff.progress import working

if TYPE_CHECKING:
    from slimdiff.plan import Plan

log = logging.getLogger("slimdiff")
_TAKEN_FOR_ZERO = 1e-6
"""What is added is written as a sum that the exporter does not simplify; its own limit is 1e-8."""


def dtype_of(settings: ExportSettings) -> torch.dtype:
    """Of the weights, and of floating-point inputs and outputs."""
    return getattr(torch, DTYPES.get(settings.precision, "float32"))  # around int8 all is in floats


class Denoiser(nn.Module):
    """A module of diffusers with tensors only, in and out, as a graph has them: those of `names`, in that order.

    Args:
        batched: inputs that share an open batch.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str], batched: Collection[str] = ()):
        super().__init__()
        self.unet = unet
        self.names = tuple(names)
        self.batched = tuple(batched)

    def answer(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """What it gives for tensors in the places of its arguments."""
        named = dict(zip(self.names, inputs, strict=True))
        for name in self.batched:
            # An open batch is a size of its own for each input until torch is told. Transformers view one by another's.
            # By `shape`: `len` is a number, and closes it.
            torch._check(named[name].shape[0] == named[self.batched[0]].shape[0])
        arguments = arguments_from(named)
        if "encoder_hidden_states" in inspect.signature(self.unet.forward).parameters:
            arguments.setdefault("encoder_hidden_states", None)
        return self.unet(**arguments, return_dict=False)


class _OneAnswer(Denoiser):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.answer(inputs)[0]


@own_torch_state()
def export_unet(
    unet: nn.Module,
    folder: Path | str,
    call: Call,
    settings: ExportSettings | None = None,
    *,
    scheduler: Any = None,
    calibration: Sequence[Call] = (),
) -> Path:
    """Export a denoiser, dense or slim, with the shapes of a recorded call; gives the path of `model.onnx`, or the
    folder where `settings.split` puts it in parts (`exporters.graphs.split`).

    A UNet's inputs are named as optimum names them: `sample [B, C, H, W]`, `timestep` (a scalar: int64, or float32
    where the call's or any of the scheduler's is not whole), `encoder_hidden_states [B, L, D]`, for SDXL `text_embeds
    [B, E]` and `time_ids [B, 6]`, and whatever else the call has, by `exporters.graphs.inputs`; the output is
    `out_sample [B, C, H, W]`. A transformer's are `hidden_states`, `timestep [B]` (float32) and whatever else its call
    has. Its output is `out_hidden_states`.

    Args:
        unet: a UNet2DConditionModel, UNet2DModel or a transformer; its weights, dtype and training mode are as before
            afterwards.
        folder: gets `model.onnx`, `model.onnx.data` and `config.json`; in parts, a folder for each with the first two.
        call: whose shapes the graph is for.
        scheduler: that the graph is to run with.
        calibration: recorded calls that int8 is calibrated on: see `quantise_graph`.

    Raises:
        InputError: if the call has arguments that the graph would have no input for, nothing is there to split off, or
            int8 has no calls.
        SlimdiffError: if the graph has other shapes than torch, or something dense is left in a slim model's.
        MissingPackageError: without onnx and onnxscript, or nncf for int8.
    """
    settings = settings or ExportSettings()
    if settings.precision == "int8":
        check_calibration(calibration)
    if "sample" not in call.arguments:
        check_transformer(unet, call, settings)
    name = next((name for name in SAMPLES if name in call.arguments), "sample")
    file = export_called(_OneAnswer, unet, Path(folder), call, settings, [f"out_{name}"], scheduler=scheduler)
    if (plan := plan_of(unet)) is not None:
        plan = with_layers(plan, unet)
        check_leftovers(file, plan)
        warn_of_precision(plan, settings)
    if settings.precision == "int8":
        quantise_graph(file, in_precision(unet, torch.float32), calibration, settings, plan)
    return in_parts(file) if settings.split else file


def in_parts(file: Path) -> Path:
    """Put a graph's parts in its place (`exporters.graphs.split`); gives their folder."""
    split_graph(file, file.parent)
    for whole in file.parent.glob(f"{GRAPH}*"):
        whole.unlink()
    return file.parent


def check_transformer(model: nn.Module, call: Call, settings: ExportSettings) -> None:
    """Refuse what a transformer's graph cannot have.

    Raises:
        InputError: naming the flag.
    """
    kind = type(model).__name__
    for asked, flag in ((settings.precision == "int8", "--precision int8"), (settings.split, "--split")):
        if asked:
            raise InputError(f"{flag} is for UNets, and the model has a {kind}: leave it out")
    # Where hidden states are latents [B, C, H, W], the positions of one size become constants of the graph. A mask over
    # prompt and image follows both.
    of_one_size = call.arguments["hidden_states"].ndim != 3 or call.arguments.get("attention_mask") is not None
    if settings.dynamic_size and of_one_size:
        raise InputError(f"--dynamic size: the graph of a {kind} is for one size: leave it out")


def warn_of_precision(plan: Plan, settings: ExportSettings) -> None:
    """Say that a graph leaves out what its model's plan puts into int8."""
    if settings.precision != "int8" and (int8 := plan.int8()):
        log.warning("the model's plan puts %d layers into int8, and its graph is in %s", len(int8), settings.precision)


def refuse_scheduled(unet: nn.Module) -> None:
    """Refuse a denoiser that runs by a schedule: its graph would have every step whole, and say nothing of it.

    Raises:
        InputError: saying what is exported in its place.
    """
    if isinstance(unet, Scheduled):
        raise InputError(
            "this UNet runs by a schedule, which a graph alone does not follow: save the pipeline (save_pretrained), "
            "and export that folder with slimdiff export"
        )


def export_called(
    wrapper: type[Denoiser],
    model: nn.Module,
    folder: Path,
    call: Call,
    settings: ExportSettings,
    outputs: Sequence[str],
    *,
    scheduler: Any = None,
) -> Path:
    """Export what a pipeline calls as it does its denoiser; see `export_unet`."""
    refuse_scheduled(model)
    inputs = unet_inputs(call)
    if scheduler is not None and not has_whole_times(scheduler):
        inputs["timestep"] = inputs["timestep"].float()
    dtype = dtype_of(settings)
    step = _step_of(model) if settings.dynamic_size else None
    inputs, opened = open_inputs(inputs, batch=settings.dynamic_batch, step=step)
    examples = {name: in_graph_dtype(name, value, dtype) for name, value in inputs.items()}
    keep = paths_to_keep(model, settings.keep_fp32) if settings.precision == "fp16" else []
    module = in_precision(model, dtype, keep)
    with traceable(module, dtype):
        batched = [name for name, axes in opened.items() if axes.get(0) == BATCH]
        wrapped = wrapper(module, list(examples), batched)
        file = export_module(wrapped, examples, outputs, folder, settings, opened, "unet.")
    about: dict[str, Any] = {}
    if "sample" not in call.arguments:
        about[EXPORTED_FOR] = {"latents": None if settings.dynamic_size else latent_size(call.arguments)}
    if (plan := plan_of(model)) is not None:
        about["slim_plan"] = with_layers(plan, model).model_dump()
    write_config(model, folder, **about)
    return file


def _step_of(model: Any) -> int:
    """What the sides of the latents are multiples of."""
    if blocks := model.config.get("block_out_channels"):
        return 2 ** (len(blocks) - 1)
    patch = model.config.get("patch_size") or 1
    return patch[-1] if isinstance(patch, list | tuple) else patch


def unet_inputs(call: Call) -> dict[str, Tensor]:
    """A recorded call as the graph's inputs, by name, in the graph's order; dtypes as recorded.

    `timestep` of a UNet is a scalar: int64 if it is whole, else float32. A transformer's is one a sample, float32.

    Raises:
        InputError: if the call has arguments that the graph has no input for, or times that differ.
    """
    tensors, unknown = named_inputs(call.arguments)
    if not unknown and {"hidden_states", "timestep"} <= set(tensors):
        time = torch.as_tensor(tensors["timestep"]).float()
        return tensors | {"timestep": time.expand(len(tensors["hidden_states"])).clone()}
    if unknown or not {"sample", "timestep"} <= set(tensors):
        raise InputError(
            f"the ONNX export takes {', '.join(NAMES.values())}; this call has {', '.join(unknown or call.arguments)}"
        )
    whole = isinstance(call.timestep, int)
    tensors["timestep"] = graph_time(tensors["timestep"], "int64" if whole else "float32", "the graph")
    return tensors


@own_torch_state()
@working("export to ONNX")
def export_module(
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    folder: Path,
    settings: ExportSettings,
    dynamic: dict[str, dict[int, str]] | None = None,
    prefix: str = "",
) -> Path:
    """Export any module whose `forward` takes and gives tensors.

    Args:
        module: in the graph's dtype; in evaluation mode meanwhile.
        inputs: name -> example, in `forward`'s order.
        folder: gets `model.onnx` and `model.onnx.data`.
        dynamic: input name -> axis -> name of the open dim.
        prefix: cut off the module paths, see `name_by_module`.

    Returns:
        the path of `model.onnx`, which onnx's checker has seen.

    Raises:
        InputError: if an open dim is a constant of what the module computes.
    """
    onnx, ir = require("onnx", "onnx"), require("onnx_ir", "onnx")
    require("onnxscript", "onnx")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / GRAPH
    modes = {m: m.training for m in module.modules()}
    shapes: Any = tuple(dynamic.get(name) for name in inputs) if dynamic else None
    if shapes and isinstance(module, Denoiser):  # whose inputs are one argument to torch
        shapes = (shapes,)
    try:
        module.eval()
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=settings.opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                custom_translation_table={torch.ops.aten.squeeze.dim: _squeeze, torch.ops.aten.add.Tensor: _add},
                verbose=False,
            )
            assert program is not None
            refuse_closed(module, closed_dims(program.exported_program, list(inputs), dynamic or {}))
            widen_softmax(program.model)
            join_casts(program.model)
            name_by_module(program.model, prefix)
            ir.save(program.model, str(file), external_data=f"{GRAPH}.data")
    except torch.onnx.OnnxExporterError as error:
        refuse_closed(module, closed_dims_in(error, list(inputs)))
        raise
    finally:
        for part, training in modes.items():
            part.training = training
    model = onnx.load(str(file), load_external_data=False)
    del model.graph.value_info[:]  # torch's own: its shapes are what the graph's are held against
    add_shapes(model)
    file.write_bytes(model.SerializeToString())
    # By path: beyond 2 GB there is no other way. In full: without inference, tensors of two dtypes may meet in a node.
    onnx.checker.check_model(str(file), full_check=True)
    return file


def write_config(module: Any, folder: Path, **changed: Any) -> None:
    """Write the module's `config.json`, which optimum reads beside the graph; no paths of this machine in it.

    Args:
        changed: in the place of its own values.
    """
    source = module if hasattr(module, "to_json_string") else module.config  # diffusers' and transformers' ways
    config = {k: v for k, v in json.loads(source.to_json_string()).items() if k != "_name_or_path"} | changed
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _squeeze(self: Any, dim: int) -> Any:
    """What `torch.squeeze(x, dim)` means: nothing where the dimension is not 1. The exporter's own makes that invalid.

    PixArt's transformer squeezes so, on a dimension that is the number of its tokens.
    """
    from onnxscript import opset18 as op

    squeezes = len(self.shape) > 0 and self.shape[dim] == 1
    return op.Squeeze(self, [dim]) if squeezes else op.Identity(self)  # type: ignore[arg-type]


def _add(self: Any, other: Any, alpha: float = 1.0) -> Any:
    """A sum, also with a number that is nearly zero: the exporter takes what is below 1e-8 for zero, and leaves it out.

    Linear attention (Sana's, and that of its autoencoder) divides by a sum with 1e-15, which may be zero without.
    """
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.core import aten_add

    if isinstance(other, float) and 0 < abs(other) < _TAKEN_FOR_ZERO and alpha == 1:
        return op.Sum(self, op.CastLike(op.Constant(value_float=other), self))  # type: ignore[type-var]
    return aten_add(self, other, alpha)


def in_precision(module: nn.Module, dtype: torch.dtype, keep: Sequence[str] = ()) -> nn.Module:
    """The module itself if it is in that dtype, else a copy that is.

    Args:
        keep: paths of modules that compute in float32 all the same.
    """
    kept = {id(t) for path in keep for t in floats(module.get_submodule(path))}
    if not keep and all(t.dtype == dtype for t in floats(module)):
        return module
    copied = cast(module, lambda t: torch.float32 if id(t) in kept else dtype)
    keep_in_float32(copied, keep)
    return copied


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's chatter on stdout, which belongs to results, and its hints to its own developers."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
