"""A timestep per sample in the place of one for all: for servers, which gather calls at different steps into a batch.

Triton has no scalars either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimdiff.errors import InputError, require

if TYPE_CHECKING:
    import onnx_ir as ir


def timestep_per_sample(model: ir.Model) -> None:
    """Make the input `timestep` of a UNet's graph `[B]`, as `sample`'s first size is, in place.

    The exported graph begins by spreading its scalar timestep over the batch; these nodes go. With the same timestep
    for all, it computes what it did.

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
    second = first and _only_reader(first.outputs[0], "Expand")
    last = second or (first if sample.shape[0] == 1 else None)  # a batch of 1 needs no spreading
    if first is None or last is None:
        raise InputError("this UNet's graph does not begin by spreading its timestep over the batch: export it again")
    last.outputs[0].replace_all_uses_with(timestep)
    model.graph.remove([node for node in (first, second) if node], safe=True)
    timestep.shape = require("onnx_ir", "onnx").Shape([sample.shape[0]])


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == operator else None
