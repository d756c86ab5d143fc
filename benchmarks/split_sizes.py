"""What leaves the graph of a step: parameters of the UNets of SD 1.5, SD 2.1 and SDXL by the part that they are in.

`python -m benchmarks.split_sizes [--model sd15,sd21,sdxl]` prints a Markdown table. The UNets are made from public
configurations without weights, and exported in memory: the graph is cut as `slimdiff export --split` cuts it.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.full_size import MODELS
from exporters.graphs.export import Denoiser
from exporters.graphs.inputs import named_inputs
from exporters.graphs.naming import name_by_module
from exporters.graphs.split import parameters_of_parts
from exporters.layout import PARTS
from slimdiff.planning.costs import count_parameters

TOKENS = 77


class _Whole(Denoiser):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.answer(inputs)[0]


def measure(name: str) -> dict[str, Any]:
    """One model's row: `name`, `parameters` (the model's own), and `parts`, those of each graph."""
    model = MODELS[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**model.config).eval()
        added = {key: torch.zeros(model.batch, *shape) for key, shape in model.conditions.items()}
        arguments = {
            "sample": torch.zeros(model.batch, 4, model.latents, model.latents),
            "timestep": torch.tensor(1),
            "encoder_hidden_states": torch.zeros(model.batch, TOKENS, model.text),
            "added_cond_kwargs": added,
        }
    return {"name": name, "parameters": count_parameters(unet), "parts": parameters_of_parts(_graph(unet, arguments))}


def _graph(unet: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """The graph in memory; constants are not folded, as there are no values."""
    inputs, _ = named_inputs(arguments)
    logging.disable(logging.WARNING)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Whole(unet, list(inputs)),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=22,
            input_names=list(inputs),
            output_names=["out_sample"],
            optimize=False,
            verbose=False,
        )
    assert program is not None
    name_by_module(program.model, "unet.")
    return program.model


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, parameters in millions."""
    lines = [
        "| UNet | whole | prompt, once an image | time, once a step and size | step | leaves the step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        whole = row["parameters"]
        parts = " | ".join(f"{row['parts'][part] / 1e6:.1f} M" for part in PARTS)
        gone = whole - row["parts"]["step"]
        lines.append(f"| {row['name']} | {whole / 1e6:.1f} M | {parts} | {gone / 1e6:.1f} M, {gone / whole:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15,sd21,sdxl", help=f"of {', '.join(MODELS)} (default: %(default)s)")
    print(table([measure(name) for name in parser.parse_args().model.split(",")]))


if __name__ == "__main__":
    main()
