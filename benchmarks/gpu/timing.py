"""Running a UNet in a runtime, and timing runs in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Any]


def without_starts(run: Run, device: str) -> Run:
    """The run without what the CPU takes to start its kernels: a CUDA graph; on a CPU the run itself."""
    return graphed(run) if device == "cuda" else run


def graphed(run: Run) -> Run:
    """The run as a CUDA graph, whose kernels are started together."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(_inputs_of: Run = run) -> Any:  # the graph reads the run's tensors: they must live as long as it does
        graph.replay()
        return kept

    return replay


def runner(unet: nn.Module, inputs: dict[str, Any], runtime: str) -> Run:
    """One UNet call in a runtime of torch's, as a function that gives the output."""
    called: Any = torch.compile(unet, dynamic=False) if runtime.startswith("compile") else unet

    def run() -> Tensor:
        return called(**inputs, return_dict=False)[0]

    return graphed(run) if runtime.endswith("graph") else run


def timed(runs: dict[Any, Run], device: str, rounds: int, seconds: float = 1e9) -> dict[Any, list[float]]:
    """Seconds of every run, one after the other in turn, forwards and then backwards.

    It ends after `rounds`, or after the first even number of them, 8 at least, that took `seconds`.
    """
    for run in runs.values():
        for _ in range(3):
            run()
    synchronize(device)
    times: dict[Any, list[float]] = {key: [] for key in runs}
    started = time.perf_counter()
    for number in range(rounds):
        for key in runs if number % 2 == 0 else reversed(runs):
            times[key].append(_one(runs[key], device))
        if number >= 7 and number % 2 and time.perf_counter() - started > seconds:
            break
    return times


def _one(run: Run, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    tensor = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (4000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = tensor[picks].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
