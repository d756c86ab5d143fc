"""`slimdiff bench`: paired latency of two artifacts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.runtimes import GRAPH_RUNTIMES, RUNTIMES

if TYPE_CHECKING:
    from deploy.openers import Opened

EXAMPLE = """examples:
  slimdiff bench dense-onnx slim-onnx --gate 'speedup>=1.05'
  slimdiff bench demo demo-slim --runtime torch --gate 'latency<=1.03' --json
  slimdiff bench demo-onnx demo-onnx --base-runtime onnxruntime --runtime openvino"""

EXIT_CODE = {"pass": 0, "fail": 1, "inconclusive": 4}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "bench",
        help="paired latency, with an interval and a verdict: pass, fail or inconclusive",
        description="Time one denoiser call of each in turn, so that what slows the machine slows both, and give the "
        "median of the ratios with its 95 %% interval. Models are exported first where the runtime takes graphs.",
        epilog=EXAMPLE,
    )
    parser.add_argument("base", metavar="BASE", help="a model, ONNX, or an engine")
    parser.add_argument("candidate", metavar="CANDIDATE", help="a model, ONNX, or an engine")
    parser.add_argument("--runtime", choices=RUNTIMES, help="default: onnxruntime, or what an engine was built with")
    parser.add_argument("--base-runtime", choices=RUNTIMES, help="of BASE, if it is another")
    parser.add_argument(
        "--gate", metavar="BOUND", help="such as 'latency<=1.03' (candidate over base) or 'speedup>=1.1'"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="pairs of runs (default: 30)")
    parser.add_argument("--warmup", type=int, metavar="N", help="runs of each that are not counted (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the runtime (default: its own choice)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="samples in a call of a model (default: 2)")
    return parser


def run(args: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    from deploy.arguments import settings
    from deploy.console import calm_libraries, result
    from exporters.latency import Gate, LatencySettings, paired_latency
    from slimdiff.errors import InputError

    gate = Gate.parse(args.gate) if args.gate else None
    chosen = settings(LatencySettings, args, "rounds", "warmup")
    if args.batch < 1 or (args.threads is not None and args.threads < 1):
        raise InputError("--batch and --threads must be at least 1")
    calm_libraries()
    from deploy.steps import shapes

    with TemporaryDirectory(prefix="slimdiff-bench-") as scratch:
        base, base_call = _opened(args, args.base, args.base_runtime or args.runtime, Path(scratch) / "base")
        candidate, call = _opened(args, args.candidate, args.runtime, Path(scratch) / "candidate")
        if shapes(base_call) != shapes(call):
            raise InputError(
                f"the two take calls of different shapes, {shapes(base_call)} and {shapes(call)}: say --batch"
            )
        progress = None if args.quiet else "bench"
        sides = partial(base.predict, base_call), partial(candidate.predict, call)
        titles = dict.fromkeys(side.title for side in (base, candidate))
        value = paired_latency(
            sides[0], sides[1], chosen, gate=gate, runtime=" against ".join(titles), progress=progress
        )
    result(value, _text(value), args.json)
    return EXIT_CODE[value["verdict"]]


def _opened(args: argparse.Namespace, name: str, runtime: str | None, scratch: Path) -> tuple[Opened, Any]:
    """An artifact in the runtime that was asked for, exported if that takes graphs, and a call for it."""
    import torch

    from deploy.console import log
    from deploy.openers import kind_of, open_denoiser
    from exporters.onnx_export import export_unet
    from exporters.pipeline_export import example_call
    from exporters.runtimes.opening import version_of

    if kind_of(name) != "model":
        opened = open_denoiser(name, runtime, args.threads)
        return opened, synthetic_call(opened.denoiser.inputs, args.batch)
    runtime = runtime or "onnxruntime"
    if runtime in GRAPH_RUNTIMES:
        version_of(runtime)  # whether it is here shows before the export
    opened = open_denoiser(name, None if runtime in GRAPH_RUNTIMES else runtime)
    call = example_call(opened.pipeline, batch=args.batch)
    if runtime == "torch":
        if args.threads:
            torch.set_num_threads(args.threads)
        return opened, call
    log.info("bench: exporting %s", name)
    export_unet(opened.denoiser, scratch, call)
    return open_denoiser(str(scratch), runtime, args.threads), call


def synthetic_call(inputs: Mapping[str, Sequence[int | str]], batch: int) -> Any:
    """A call of a graph's shapes, of noise: latency does not depend on values."""
    import torch

    from slimdiff.trajectory import Call

    noise = torch.Generator().manual_seed(0)
    shaped = {name: [d if isinstance(d, int) else batch for d in shape] for name, shape in inputs.items()}
    tensors = {n: torch.randn(shape, generator=noise) for n, shape in shaped.items() if n != "timestep"}
    added = {n: tensors.pop(n) for n in ("text_embeds", "time_ids") if n in tensors}
    arguments: dict[str, Any] = {**tensors, "timestep": torch.tensor(500)}
    if added:
        arguments["added_cond_kwargs"] = added
    return Call(0, 500, arguments)


def _text(value: dict[str, Any]) -> str:
    speedup = value["speedup"]
    lines = [
        f"base      {value['baseline']['median_ms']:9.2f} ms median, {value['baseline']['p90_ms']:9.2f} ms p90",
        f"candidate {value['candidate']['median_ms']:9.2f} ms median, {value['candidate']['p90_ms']:9.2f} ms p90",
        f"speedup   {speedup['median']:.3f}x, 95 % interval {speedup['low']:.3f} to {speedup['high']:.3f}",
        f"{value['runtime']} on {value['machine']}",
    ]
    return "\n".join([*lines, f"gate {value['gate']}: {value['verdict']}" if value["gate"] else "no gate"])
