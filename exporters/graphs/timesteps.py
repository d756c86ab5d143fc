"""The input `timestep` of a UNet's graph: which dtype it has, what it is fed with, and one per sample for servers."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimdiff.errors import InputError, require

if TYPE_CHECKING:
    import onnx_ir as ir


STEPS = range(1, 51)
"""Numbers of steps that a scheduler's timesteps are looked at for: most are whole for some of them."""


def has_whole_times(scheduler: Any) -> bool:
    """Whether all timesteps of a scheduler are whole, whatever the number of steps.

    Those of some are fractions (Karras sigmas, steps on an even grid), or logarithms of noise levels (EDM).
    """
    scheduler = copy.deepcopy(scheduler)
    for steps in STEPS:
        with suppress(Exception):  # not every scheduler takes every number, and diffusers raises anything for it
            scheduler.set_timesteps(steps)
            times = torch.as_tensor(scheduler.timesteps)
            if bool((times != times.round()).any()):
                return False
    return True


def graph_time(timestep: Any, dtype: str, graph: str) -> Tensor:
    """A timestep as a graph takes it: a scalar of the dtype of its input.

    Args:
        timestep: a number, or a tensor of one, or of one per sample that are all the same.
        dtype: `int64`, or a floating-point one.
        graph: its name, for people.

    Raises:
        InputError: for timesteps that differ, and for one that is not whole where the graph takes whole ones.
    """
    values = torch.as_tensor(timestep).detach().cpu().flatten()
    if len(values) == 0 or not bool((values == values[0]).all()):
        raise InputError(f"{graph} takes one timestep for all samples, given were {values.tolist()}")
    time = values[0].to(getattr(torch, dtype))
    if not time.is_floating_point() and float(time) != float(values[0]):
        raise InputError(
            f"{graph} takes whole timesteps, and the scheduler gave {float(values[0]):g}: export the model again with "
            "that scheduler in its pipeline, or take one whose timesteps are whole"
        )
    return time


def timestep_per_sample(model: ir.Model) -> None:
    """Make the input `timestep` of a UNet's graph `[B]`, as `sample`'s first size is, in place.

    Servers gather calls at different steps into a batch, and Triton has no scalars.

    The exported graph begins by spreading its scalar timestep over the batch (a UNet2DModel's, by multiplying it by
    ones); these nodes go. With the same timestep for all, it computes what it did.

    Args:
        model: what `export_unet` wrote. One that has it so already stays as it is.

    Raises:
        InputError: for a graph that begins otherwise.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    if not {"sample", "timestep"} <= set(inputs):
        raise InputError(f"this graph is no UNet: its inputs are {', '.join(map(str, inputs))}")
    timestep, sample = inputs["timestep"], inputs["sample"]
    if timestep.shape or not sample.shape:
        return
    first = _only_reader(timestep, "Unsqueeze")
    second = first and (_only_reader(first.outputs[0], "Expand") or _only_reader(first.outputs[0], "Mul"))
    if second and second.op_type == "Mul" and not any(map(_is_ones, second.inputs)):
        second = None
    last = second or (first if sample.shape[0] == 1 else None)  # a batch of 1 needs no spreading
    if first is None or last is None:
        raise InputError("this UNet's graph does not begin by spreading its timestep over the batch: export it again")
    last.outputs[0].replace_all_uses_with(timestep)
    model.graph.remove([node for node in (first, second) if node], safe=True)
    timestep.shape = require("onnx_ir", "onnx").Shape([sample.shape[0]])


def _is_ones(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Expand":
        value = node.inputs[0]
    tensor = require("onnx_ir", "onnx").convenience.get_const_tensor(value) if value is not None else None
    return tensor is not None and bool((tensor.numpy() == 1).all())


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == operator else None
