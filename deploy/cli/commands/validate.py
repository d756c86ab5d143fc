"""`slimdiff validate`: whether two artifacts of the same model compute the same."""

from __future__ import annotations

import argparse
from typing import Any

from exporters.settings import RUNTIMES

EXAMPLE = """examples:
  slimdiff validate slim slim-onnx
  slimdiff validate demo demo-onnx --runtime openvino-fp32
  slimdiff validate demo demo-onnx-fp16 --every-module --json"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "validate",
        help="parity of two artifacts of the same model on real trajectory inputs",
        description="Run both artifacts on denoiser calls recorded from a real trajectory, from its first to its last "
        "timestep, and hold their outputs, and the image at its end, against named bounds of the candidate's "
        "precision. BASE computes in float32. Where a graph misses the bounds of a model, the first tensor that "
        "diverges in it is named. Exit code 1 if they differ.",
        epilog=EXAMPLE,
    )
    parser.add_argument("base", metavar="BASE", help="the reference, in fp32: a model, or ONNX")
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
    parser.add_argument(
        "--every-module", action="store_true", help="also hold every module in the graph against the model's own"
    )
    parser.add_argument("--no-image", action="store_true", help="leave out the image, which takes a trajectory of each")
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.cli.arguments import settings
    from deploy.cli.console import calm_libraries, log, result
    from slimdiff.denoising.trajectory import record_calls
    from slimdiff.errors import InputError, require
    from slimdiff.settings import Sampling

    if args.calls < 1:
        raise InputError(f"--calls must be at least 1, got {args.calls}")
    wanted = settings(Sampling, args, "steps", batch=1)
    require("polygraphy", "onnx")
    calm_libraries()
    from deploy.build import spread
    from deploy.opening.openers import graph_of, open_denoiser
    from exporters.validation.graph import check_graph
    from exporters.validation.parity import check_parity, check_trajectory, with_checks
    from slimdiff.compression import with_denoiser
    from slimdiff.loading.pipelines import load_pipeline

    base, candidate = open_denoiser(args.base), open_denoiser(args.candidate, args.runtime)
    if base.precision != "fp32":
        raise InputError(
            f"{args.base} computes in {base.precision}: BASE is the reference and has to be fp32; name the model itself"
        )
    # The inside of a graph is looked at in ONNX Runtime: what another runtime makes of it would not show there.
    inside = base.kind == "model" and candidate.runtime.startswith("onnxruntime")
    if args.every_module and not inside:
        raise InputError(
            "--every-module holds the inside of a graph against its model: BASE a model, CANDIDATE ONNX in onnxruntime"
        )
    pipeline = base.pipeline or candidate.pipeline or (load_pipeline(args.pipeline) if args.pipeline else None)
    if pipeline is None:
        raise InputError("neither artifact is a whole model: say with --pipeline whose trajectory to record")
    sampling = candidate.sampling(base.sampling(_unguided(wanted, base, candidate)))
    sampling = sampling.model_copy(update=base.pixels(pipeline) | candidate.pixels(pipeline))
    prompts = [args.prompt] * sampling.batch
    log.info("validate: recording a trajectory of %d steps", sampling.steps)
    calls = spread(record_calls(pipeline, prompts, sampling), args.calls)
    precision: Any = args.precision or candidate.precision
    progress = None if args.quiet else "validate"
    if inside:
        value = check_graph(
            graph_of(args.candidate),
            base.denoiser,
            calls,
            candidate.predict,
            precision,
            every_module=args.every_module,
            progress=progress,
        )
    else:
        value = check_parity(calls, base.predict, candidate.predict, precision, progress=progress)
    if not args.no_image:
        log.info("validate: the image of each")
        pair = [with_denoiser(pipeline, side.denoiser) for side in (base, candidate)]
        bar = None if args.quiet else "validate: image"
        value = with_checks(value, check_trajectory(pair[0], pair[1], prompts, sampling, progress=bar))
    value |= {"reference": f"{base.kind}, {base.precision}", "timesteps": [call.timestep for call in calls]}
    result(value, _text(value, precision), args.json)
    return 0 if value["passed"] else 1


def _text(value: dict[str, Any], precision: str) -> str:
    lines = [
        f"{'ok  ' if c['passed'] else 'FAIL'} {c['tensor']} {c['metric']} {c['value']} (bound {c['bound']})"
        for c in value["checks"]
    ]
    verdict = "the same" if value["passed"] else f"they differ, first at {value['first_diverging']}"
    lines.append(f"{verdict}, within the bounds of {precision}" if value["passed"] else verdict)
    found = value["divergence"] or {}
    if found.get("kind") == "own error":
        if found["relative_l2"] is None:
            size = found["problem"] or f"{found['not_finite']} values are not finite"
        else:
            size = f"relative L2 {found['relative_l2']:.3g}, bound {found['bound']:g}"
        lines.append(f"given the model's own inputs, {found['module']} goes wrong at node {found['node']}: {size}")
    elif found.get("kind") == "not finite":
        lines.append(f"{found['not_finite']} values of node {found['node']} are not finite: {found['advice']}")
    elif found.get("kind") == "accumulated":
        largest = found["largest"]
        lines.append(
            "every module is right within its bound, the errors add up; the largest is "
            f"{largest['tensor']}'s, relative L2 {largest['relative_l2']:.3g}"
        )
    return "\n".join(lines)


def _unguided(sampling: Any, *sides: Any) -> Any:
    """Without guidance where a graph takes one sample at a time, or an odd number."""
    batches = [side.denoiser.inputs["sample"][0] for side in sides if side.kind != "model"]
    odd = any(isinstance(batch, int) and batch % 2 for batch in batches)
    return sampling.model_copy(update={"guidance": 1.0}) if odd else sampling
