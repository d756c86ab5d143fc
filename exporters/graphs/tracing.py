"""What torch traces for a graph: a few modules compute it another way meanwhile, and open dims have to stay open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from slimdiff.errors import InputError

_CLOSED = re.compile(r"static shape of \d+ for dimension inputs\['(\w+)'\](?:\[(\d+)\])?\.shape\[(\d+)\]")


@contextmanager
def traceable(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a denoiser compute the same by what a graph of that dtype and an open batch can have."""
    with ExitStack() as changed:
        if (sines := getattr(model, "add_time_proj", None)) is not None:
            # SDXL's sines of sizes are float32 and joined with what is not: torch does that, `Concat` does not, and the
            # exporter writes it all the same. diffusers rounds the joined tensor in its next line: nothing is lost.
            changed.enter_context(sines.register_forward_hook(lambda _module, _inputs, output: output.to(dtype)))
        if (times := getattr(model, "time_extra_emb", None)) is not None:
            changed.enter_context(times.register_forward_pre_hook(_in_own_dtype, with_kwargs=True))
        times = getattr(model, "time_text_embed", None)
        if hasattr(times, "mod_proj"):
            changed.enter_context(patch.object(times, "forward", partial(_of_any_batch, times)))
        yield


def closed_dims(program: Any, inputs: Sequence[str], opened: Mapping[str, Mapping[int, Any]]) -> list[str]:
    """Which of the dims that were to be open are not in what was traced, as `hidden_states.0`.

    The exporter does what torch suggests where a dim cannot be open: it makes a constant of it, and says nothing. The
    graph's inputs may still say that it is open.

    Args:
        program: what `torch.export` gave.
        inputs: names, in order.
        opened: by input and axis.
    """
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    sizes = {
        f"{name}.{axis}": values[place].shape[axis]
        for name, place in zip(inputs, program.graph_signature.user_inputs, strict=True)
        for axis in opened.get(name, ())
    }
    single = {symbol for symbol, bounds in program.range_constraints.items() if bounds.is_singleton()}
    return [dim for dim, size in sizes.items() if isinstance(size, int) or size.node.expr.free_symbols & single]


def closed_dims_in(error: Exception, inputs: Sequence[str]) -> list[str]:
    """Those that the exporter itself names, where an open dim has nothing but a name: `closed_dims`."""
    found = _CLOSED.findall(str(error))
    return [f"{inputs[int(number)] if number else name}.{axis}" for name, number, axis in found]


def refuse_closed(module: nn.Module, dims: Sequence[str]) -> None:
    """Refuse a graph that is not open where it was to be.

    Raises:
        InputError: if there are such dims.
    """
    if dims:
        kind = type(getattr(module, "unet", module)).__name__
        raise InputError(
            f"a {kind} computes for one size of {', '.join(dims)}, and no graph of it is open there: export it for one "
            "size (leave out --dynamic)"
        )


def _in_own_dtype(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hunyuan-DiT computes in the dtype of the time, which is float32 in a graph of half precision, too."""
    return args, kwargs | {"hidden_dtype": next(module.parameters()).dtype}


def _of_any_batch(module: Any, timestep: Tensor) -> Tensor:
    """Chroma's embedding `[B, layers, D]` of times `[B]`. Its own has a list as long as the batch, a constant."""
    one = type(module).forward(module, timestep.new_zeros(1))
    times = module.time_proj(timestep).to(timestep.dtype)[:, None].expand(-1, one.shape[1], -1)
    rest = one[..., times.shape[-1] :].expand(timestep.shape[0], -1, -1)  # the same at all times
    return torch.cat([times, rest], dim=-1)
