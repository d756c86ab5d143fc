"""A timestep per sample in the place of one for all: for servers, which gather calls at different steps into a batch.

Triton has no scalars either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimdiff.errors import InputError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def timestep_per_sample(model: ModelProto) -> None:
    """Make the input `timestep` of a UNet's graph `[B]`, as `sample`'s first size is, in place.

    The exported graph begins by spreading its scalar timestep over the batch; these nodes go. With the same timestep
    for all, it computes what it did.

    Args:
        model: what `export_unet` wrote; its weights need not be loaded. One that has it so already stays as it is.

    Raises:
        InputError: for a graph that begins otherwise.
    """
    graph = model.graph
    inputs = {i.name: i.type.tensor_type.shape for i in graph.input}
    if not {"sample", "timestep"} <= set(inputs):
        raise InputError(f"this graph is no UNet: its inputs are {', '.join(inputs)}")
    if inputs["timestep"].dim:
        return

    def only_reader(name: str, kind: str) -> NodeProto | None:
        readers = [node for node in graph.node if name in node.input]
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None

    first = only_reader("timestep", "Unsqueeze")
    second = None if first is None else only_reader(first.output[0], "Expand")
    batch = inputs["sample"].dim[0]
    # A batch of 1 needs no spreading.
    last = second or (first if batch.dim_value == 1 else None)
    if first is None or last is None:
        raise InputError("this UNet's graph does not begin by spreading its timestep over the batch: export it again")
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == last.output[0]:
                node.input[index] = "timestep"
    gone = [node for node in (first, second) if node is not None]
    for node in gone:
        graph.node.remove(node)
    for value in [v for v in graph.value_info if v.name in {node.output[0] for node in gone}]:
        graph.value_info.remove(value)
    inputs["timestep"].dim.add().CopyFrom(batch)
