"""`slimdiff compare`: how close a slim model is to its dense one, or one artifact to another."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.artifacts.kinds import kind_of
from deploy.artifacts.schedules import find_schedule
from deploy.cli import flags
from deploy.cli.console import calm_libraries, result
from deploy.cli.outputs import artifact_folder, check_apart, check_artifact, check_runnable
from deploy.quality.metrics import METRICS, check_names, check_weights
from deploy.recipe.gates import Gates
from deploy.recipe.material import comparison_material
from deploy.recipe.prompts import EMBEDDED, default_source
from exporters.registry import names
from slimdiff.errors import InputError
from slimdiff.settings import Sampling, SteeringSettings

DESCRIPTION = """Hold a slim model, or any artifact, against the dense one on the dense one's trajectories, and their
images of the same captions and seeds against each other. The embedded model's images are also judged by its
evaluator."""
EXAMPLE = """examples:
  slimdiff compare demo demo-slim
  slimdiff compare my-checkpoint slim --images 8 --save-images pairs
  slimdiff compare my-checkpoint slim --metrics lpips,clip --weights lpips=vgg16.pth --weights clip=clip-vit-b
  slimdiff compare my-checkpoint slim --gate max_noise_error=1e-2 --gate min_ssim=0.9
  slimdiff compare my-checkpoint slim --schedule schedule.json     # DENSE has every step guided and whole
  slimdiff compare demo-slim demo-onnx --json"""

STEPS = 25
CAPTIONS_SEED = 1
"""Which of the embedded model's held-out captions."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "dense", "DENSE", "a model, an ONNX folder, an engine, or a bundle")
    flags.text(parser, "slim", "SLIM", "a model, an ONNX folder, an engine, or a bundle")
    flags.add_variant(parser)
    flags.add_lora(parser, into="DENSE")
    flags.add_lora(parser, "--slim-lora", into="SLIM")
    by_default = "'general', the built-in ones from the back; for demo, captions held out of its training"
    flags.text(parser, "--prompts", "FILE", f"one prompt a line (default: {by_default})")
    flags.add_material(parser, "input-")
    flags.add_steering(parser)
    flags.add_ip_adapter_image(parser)
    flags.whole(parser, "--images", "images of each", default=16)
    flags.whole(parser, "--trajectories", "prompts for the noise error", default=2)
    flags.add_usage(parser, "steps", "guidance", steps=STEPS)
    flags.add(parser, Sampling, "batch", "height", "width", "scheduler", "whole_prompts")
    flags.add_arguments(parser)
    flags.add(parser, Sampling, "seed", default=10_000)
    parser.add_argument("--runtime", choices=names(), help="what runs ONNX and bundles (default: as for generate)")
    flags.text(parser, "--pipeline", "MODEL", "whose other components go with a denoiser alone")
    flags.add_schedule(parser)
    flags.text(parser, "--save-images", "DIR", "a folder to write the images of both into, with equal names")
    flags.text(parser, "--metrics", "LIST", f"of {', '.join(METRICS)}", type=lambda said: said.split(","), default=[])
    weights = "a metric's weights, which are never fetched: a file, or the folder of a CLIP model"
    flags.several(parser, "--weights", "NAME=PATH", weights)
    flags.text(parser, "--reference", "DIR", "real images that fid and kid hold both sides against")
    bounds = (
        "a bound as in a recipe's gates, such as max_noise_error=1e-3 or max_lpips=0.1: beyond it the exit code is 1, "
        "with it inside the figure's interval 4"
    )
    flags.several(parser, "--gate", "NAME=BOUND", bounds)


def run(args: argparse.Namespace) -> int:
    weights, gates = _weights(args), Gates.of_comparison(args.gate)
    for gate, metric in gates.metrics().items():
        if metric not in ("ssim", *weights):
            raise InputError(f"--gate {gate} is of {metric}, which is not measured: ask for it with --metrics {metric}")
    if args.save_images is not None:
        check_apart({"--save-images": Path(args.save_images)}, [path for path in weights.values() if path])
        check_artifact(Path(args.save_images), "images", "--save-images")
    both = (args.dense, args.slim)
    check_runnable(*both, args.pipeline)
    sampling = flags.read_usage(args, args.slim, args.dense, args.pipeline, steps=STEPS)
    variants = flags.read_variants(args, *both, args.pipeline)
    source = args.prompts or default_source(args.dense if kind_of(args.dense) == "model" else args.pipeline or "")
    folders = flags.named_material(args)
    count = max(args.images, args.trajectories)
    material = comparison_material(source, 0, count, CAPTIONS_SEED, **folders, default=args.prompts is None)
    material = replace(material, ip_adapter_image=flags.find_ip_adapter_image(args))

    calm_libraries()
    from deploy.build import EXIT_CODE, judge, overall, quality
    from deploy.opening.pairs import open_pair
    from deploy.opening.schedules import as_followed, compute_of, with_schedule
    from deploy.quality.folders import save_images
    from deploy.quality.measure import Measures
    from slimdiff import compare
    from slimdiff.denoising.tasks import has_prompts, make_inputs, text_of

    schedule = find_schedule(args.slim, args.schedule)
    steering = flags.read(args, SteeringSettings)
    loras = {"dense": args.lora, "slim": args.slim_lora}
    dense, slim, sampling = open_pair(*both, sampling, args.runtime, args.pipeline, variants, material, loras, steering)
    prompts, sampling = make_inputs(dense.pipeline, material, sampling)
    slim.pipeline, schedule = with_schedule(slim.pipeline, slim.opened, schedule, args.schedule)
    schedule = as_followed(schedule, slim.pipeline, sampling)
    counts = {"--images": min(args.images, len(prompts)), "--trajectories": min(args.trajectories, len(prompts))}
    if dense.fixed_batch or slim.fixed_batch:
        for flag, count in counts.items():
            if count % sampling.batch:
                raise InputError(f"{flag} is {count}, and a graph takes {sampling.batch} at a time: give a multiple")
    if source == EMBEDDED and counts["--images"] < 2:
        raise InputError("the embedded model's evaluator judges sets: make at least two images (--images 2)")
    about = {"count": counts["--images"], "pixels": slim.shorter_side(sampling), "captioned": has_prompts(prompts)}
    measures = Measures(weights, args.reference, **about)
    images: dict[str, list[Any]] = {}

    def look(before: list[Any], after: list[Any]) -> dict[str, Any]:
        images.update(dense=before, slim=after)
        return quality(before, after, CAPTIONS_SEED) if source == EMBEDDED else {}

    place = artifact_folder(Path(args.save_images), "images", "--save-images") if args.save_images else nullcontext()
    with place as folder:
        shown = {"images": args.images, "trajectories": args.trajectories}
        value = compare(dense.pipeline, slim.pipeline, prompts, sampling, **shown, quality=look)
        captions = list(map(text_of, prompts))
        measured = measures(**images, captions=captions)
        value["images"]["metrics"] = measured["images"]
        value["quality"] |= measured["quality"]
        if schedule is not None:
            value["schedule"] = {"says": str(schedule), **schedule.model_dump(exclude_none=True)}
            value["macs_per_image"] = compute_of(dense, slim, sampling, counts["--images"])
        value["precision"] = {"dense": dense.precision, "slim": slim.precision}
        if folder is not None:
            made_from = {"command": "compare", "sampling": value["sampling"]}
            save_images(folder, **images, captions=captions, made_from=made_from)
            value["saved"] = args.save_images
    if args.gate:
        value["gates"] = judge(gates, {"compare": value})
        value["verdict"] = overall(value["gates"])
    return result(args, value, _text(value), EXIT_CODE[value.get("verdict", "pass")])


def _weights(args: argparse.Namespace) -> dict[str, str | None]:
    """The metrics that were asked for, each with its weights."""
    metrics = [name.strip() for name in args.metrics]
    check_names(metrics)
    places = dict(said.split("=", 1) for said in args.weights if "=" in said)
    for said in args.weights:
        name = said.split("=", 1)[0]
        if "=" not in said:
            raise InputError(f"--weights {said}: write NAME=PATH, such as clip=clip-vit-base-patch16")
        check_names([name])
        if name not in metrics:
            raise InputError(f"--weights {said} is for a metric that --metrics does not ask for: add {name} there")
        if sum(other.startswith(f"{name}=") for other in args.weights) > 1:
            raise InputError(f"--weights {name} is there twice: a metric has one")
    weights = {name: places.get(name) for name in metrics}
    check_weights(weights)
    return weights


def _text(value: dict[str, Any]) -> str:
    images = value["images"]
    lines = [
        f"noise-prediction error: {value['noise_error']['relative_mse']:.3g} relative mean squared",
        f"images: PSNR {images['psnr_db']:.1f} dB, SSIM {images['ssim']:.4f}, {images['count']} pairs",
    ]
    if (schedule := value.get("schedule")) is not None:
        lines.append(f"schedule: {schedule['says']}")
    if (macs := value.get("macs_per_image", {})).get("saved") is not None:
        lines.append(
            f"multiply-adds per image: {macs['dense']:.4g} dense, every step guided and whole; {macs['slim']:.4g} "
            f"slim, by its schedule: {macs['saved']:.1%} saved"
        )
    elif "why" in macs:
        lines.append(f"multiply-adds per image: not counted, for {macs['why']}")
    lines += [f"{name}: {m['value']:.4g}{_between(m)}" for name, m in images["metrics"].items()]
    lines.append(f"precision: {' -> '.join(map(_said, value['precision'].values()))}")
    for name, q in value["quality"].items():
        change = f", difference {q['difference']:.4g}{_between(q)}" if "difference" in q else ""
        lines.append(f"{name}: {q['dense']:.4g} dense, {q['slim']:.4g} slim{change}")
    lines += [f"images of both: {value['saved']}"] if "saved" in value else []
    for gate in value.get("gates", []):
        found = "not measured" if gate["value"] is None else f"{gate['value']:.4g}"
        lines.append(f"gate {gate['gate']}: {found}, bound {gate['bound']:g}: {gate['verdict']}")
    return "\n".join(lines)


def _said(side: dict[str, Any]) -> str:
    share = side["int8_macs"]
    return side["precision"] + (f" ({100 * share:.1f} % of the multiply-adds)" if share else "")


def _between(metric: dict[str, Any]) -> str:
    return "" if metric["low"] is None else f" (95 % interval {metric['low']:.4g} to {metric['high']:.4g})"
