"""`slimdiff validate`: whether two artifacts of the same model compute the same."""

from __future__ import annotations

import argparse
from typing import Any

from exporters.runtimes import RUNTIMES

EXAMPLE = """examples:
  slimdiff validate slim slim-onnx
  slimdiff validate demo demo-onnx --runtime openvino-fp32
  slimdiff validate demo demo-onnx-fp16 --precision fp16 --json"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "validate",
        help="parity of two artifacts of the same model on real trajectory inputs",
        description="Run both artifacts on denoiser calls recorded from a real trajectory and hold their outputs "
        "against named bounds of the candidate's precision. Exit code 1 if they differ.",
        epilog=EXAMPLE,
    )
    parser.add_argument("base", metavar="BASE", help="the reference: a model, or ONNX")
    parser.add_argument("candidate", metavar="CANDIDATE", help="what is checked: a model, or ONNX")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), help="whose bounds hold (default: the candidate's)"
    )
    parser.add_argument("--runtime", choices=RUNTIMES, help="what runs the candidate's ONNX (default: onnxruntime)")
    parser.add_argument("--pipeline", metavar="MODEL", help="the model whose trajectory is recorded, if neither is one")
    parser.add_argument(
        "--calls", type=int, default=5, metavar="N", help="calls, spread over the trajectory (default: 5)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="scheduler steps of the trajectory (default: 20)")
    parser.add_argument("--prompt", default="a photo", metavar="TEXT", help="of the trajectory (default: %(default)r)")
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.arguments import settings
    from deploy.console import calm_libraries, log, result
    from slimdiff.errors import InputError, require
    from slimdiff.trajectory import Sampling, record_calls

    if args.calls < 1:
        raise InputError(f"--calls must be at least 1, got {args.calls}")
    wanted = settings(Sampling, args, "steps", batch=1)
    require("polygraphy", "onnx")
    calm_libraries()
    from deploy.openers import open_denoiser
    from deploy.workshop import spread
    from exporters.parity import check_parity
    from slimdiff.pipelines import load_pipeline

    base, candidate = open_denoiser(args.base), open_denoiser(args.candidate, args.runtime)
    pipeline = base.pipeline or candidate.pipeline or (load_pipeline(args.pipeline) if args.pipeline else None)
    if pipeline is None:
        raise InputError("neither artifact is a whole model: say with --pipeline whose trajectory to record")
    sampling = candidate.sampling(base.sampling(_unguided(wanted, base, candidate)))
    sampling = sampling.model_copy(update=base.pixels(pipeline) | candidate.pixels(pipeline))
    log.info("validate: recording a trajectory of %d steps", sampling.steps)
    calls = spread(record_calls(pipeline, [args.prompt] * sampling.batch, sampling), args.calls)
    precision: Any = args.precision or candidate.precision
    progress = None if args.quiet else "validate"
    value = check_parity(calls, base.predict, candidate.predict, precision, progress=progress)
    lines = [
        f"{'ok  ' if c['passed'] else 'FAIL'} {c['tensor']} {c['metric']} {c['value']} (bound {c['bound']})"
        for c in value["checks"]
    ]
    verdict = "the same" if value["passed"] else f"they differ, first at {value['first_diverging']}"
    result(value, "\n".join([*lines, f"{verdict}, within the bounds of {precision}"]), args.json)
    return 0 if value["passed"] else 1


def _unguided(sampling: Any, *sides: Any) -> Any:
    """Without guidance where a graph takes one sample at a time, or an odd number."""
    batches = [side.denoiser.inputs["sample"][0] for side in sides if side.kind != "model"]
    odd = any(isinstance(batch, int) and batch % 2 for batch in batches)
    return sampling.model_copy(update={"guidance": 1.0}) if odd else sampling
