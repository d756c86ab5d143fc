"""A denoiser in memory as a job that fresh processes can open."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from exporters.graphs.export import export_unet
from exporters.latency.pair import Job
from exporters.registry import runtime_of
from exporters.runtimes.torch_model import save_model
from slimdiff.denoising.trajectory import Call


def write_job(name: str, denoiser: nn.Module, call: Call, runtime: str, folder: Path) -> Job:
    """Write a denoiser to where a runtime opens it: its weights, or a graph of it.

    Args:
        name: for people.
        denoiser: not changed.
        call: whose shapes count.
        runtime: that takes models or graphs.
        folder: that is not there yet.

    Raises:
        InputError: for another runtime, or a denoiser that is not exported.
    """
    if runtime_of(runtime, "model", "graph").takes == "model":
        save_model(denoiser, call, folder)
        return Job(name, str(folder), runtime)
    return Job(name, str(export_unet(denoiser, folder, call)), runtime)
