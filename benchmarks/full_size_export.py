"""ONNX of whole pipelines at full size: seconds, memory and file sizes, dense and slim, in fp32 and fp16.

`python -m benchmarks.full_size_export [--model sd15,sdxl] [--precision fp32,fp16]` prints a Markdown table, one process
per row. Weights are random, and slim UNets are cut to given ranks without calibration: a graph's size and its export's
time and memory depend on neither. In fp32, `--check` also runs the UNet's graph in ONNX Runtime against torch, and
`--image STEPS` has optimum's `ORTDiffusionPipeline` load the folder and make the image that torch makes of one seed.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from benchmarks.full_size import LATENTS, MODELS, Clock, peak_bytes
from benchmarks.random_models import random_pipeline
from benchmarks.ranks import uniform_ranks
from exporters.graphs.export import unet_inputs
from exporters.graphs.naming import check_reduced_dims
from exporters.graphs.pipeline import example_call, export_pipeline
from exporters.graphs.reading import read_graph, shape_of
from exporters.graphs.shapes import leftover_dims
from exporters.machine import machine_name
from exporters.settings import ExportSettings
from slimdiff.denoising.torch_state import own_threads
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.models import plan_of
from slimdiff.planning.costs import count_bytes, count_parameters
from slimdiff.slimming.skeleton import skeleton

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder")


def measure(
    name: str,
    variant: str,
    settings: ExportSettings,
    folder: Path,
    held: torch.dtype,
    check: bool = False,
    steps: int = 0,
) -> dict[str, Any]:
    """Export one pipeline in this process.

    Args:
        name: of `MODELS`.
        variant: `dense`, or `slim`: the UNet without what the model's budget says, the same share of every block.
        settings: of the export.
        folder: gets the graphs.
        held: dtype that the pipeline is in when the export begins.
        check: run the UNet's graph against torch afterwards.
        steps: of an image that torch and the exported folder make of one seed; 0: none.

    Returns:
        the row: seconds, peak memory, bytes by component, and what was seen in the graphs.
    """
    pipeline = random_pipeline(name, LATENTS.get(name))
    if variant == "slim":
        pipeline.unet = skeleton(pipeline.unet, uniform_ranks(pipeline.unet, MODELS[name].budget))
    pipeline.to(held)
    gc.collect()
    row: dict[str, Any] = {"model": name, "variant": variant, "precision": settings.precision}
    row |= {"parameters": count_parameters(pipeline.unet), "held": str(held).removeprefix("torch.")}
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    row["weights"] = sum(map(count_bytes, modules))
    expected_image = _image(pipeline, steps) if steps else None
    row["before"] = peak_bytes(reset=True)
    with Clock() as clock:
        call = example_call(pipeline)
        files = export_pipeline(pipeline, folder, settings, call=call)
    row |= {"wall": clock.wall, "cpu": clock.cpu, "peak": peak_bytes()}
    row["bytes"] = {f.parent.name: sum(p.stat().st_size for p in f.parent.glob("model.onnx*")) for f in files}
    row["graph"] = sum(file.stat().st_size for file in files)
    row["sample"] = list(call.arguments["sample"].shape)
    row["unknown"] = sum(_without_shape(file) for file in files)
    plan = plan_of(pipeline.unet)
    if plan is not None:
        graph = folder / "unet" / "model.onnx"
        row["leftovers"] = len(leftover_dims(graph, plan))
        row["misfits"] = sum(not site["ok"] for site in check_reduced_dims(graph, plan))
    expected = predict(pipeline.unet, call) if check else None
    del pipeline, modules
    gc.collect()
    if expected is not None:
        row["error"] = _error(folder / "unet" / "model.onnx", call, expected)
    if expected_image is not None:
        from optimum.onnxruntime import ORTDiffusionPipeline

        found = _image(ORTDiffusionPipeline.from_pretrained(folder), steps)
        row |= {"psnr": _psnr(found, expected_image), "steps": steps, "image": list(found.shape)}
    return row


def _image(pipeline: DiffusionPipeline, steps: int) -> np.ndarray:
    """One image with guidance, `[H, W, 3]` in [0, 1], of a seed and words that the random pipelines' tokenizer has."""
    seed = torch.Generator().manual_seed(0)
    found = pipeline("a red circle", num_inference_steps=steps, generator=seed, output_type="np")
    return found.images[0]


def _psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Of two images, dB. The peak is the range of the expected one: random weights make images of little contrast."""
    return float(-10 * np.log10(np.square(found - expected).mean() / np.ptp(expected) ** 2 + 1e-20))


def _without_shape(file: Path) -> int:
    """How many tensors of a graph have no shape, or one with a size that is not known."""
    values = [value for node in read_graph(file).graph for value in node.outputs if value.name]
    return sum(value.shape is None or "" in shape_of(value) for value in values)


def _error(graph: Path, call: Call, expected: Tensor) -> float:
    """Relative L2 of the graph's answer in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in unet_inputs(call).items()})[0])
    return float((found - expected).norm() / expected.norm())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| pipeline | UNet | precision | weights, as held | export | processor time | peak | UNet file | text encoders "
        "| VAE | all files | graphs alone |",
        "| --- | --- | --- | " + "--- | " * 9,
    ]
    for r in rows:
        size = {name: r["bytes"].get(name, 0) for name in COMPONENTS}
        cells = [
            f"{r['model']}, {r['variant']}",
            f"{r['parameters'] / 1e6:,.1f} M",
            r["precision"],
            f"{_gib(r['weights'])}, {r['held']}",
            f"{r['wall']:.0f} s",
            f"{r['cpu']:.0f} s",
            _gib(r["peak"]),
            _gib(size["unet"]),
            _gib(size["text_encoder"] + size["text_encoder_2"]),
            _gib(size["vae_decoder"] + size["vae_encoder"]),
            _gib(sum(size.values())),
            f"{r['graph'] / 2**20:.1f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for r in rows:
        seen = [f"{r['unknown']} tensors without a shape"]
        if "leftovers" in r:
            seen.append(f"{r['leftovers']} dense dimensions left, {r['misfits']} sites of another rank than planned")
        if "error" in r:
            seen.append(f"relative L2 {r['error']:.1e} in ONNX Runtime")
        if "psnr" in r:
            pixels = "x".join(map(str, r["image"][:2]))
            seen.append(f"image of ORTDiffusionPipeline ({pixels}, {r['steps']} steps): PSNR {r['psnr']:.0f} dB")
        shape = "x".join(map(str, r["sample"]))
        lines.append(f"{r['model']}, {r['variant']}, {r['precision']}: sample {shape}; {'; '.join(seen)}.")
    lines.append("Random weights; slim UNets are cut to given ranks without calibration.")
    return "\n".join([*lines, f"{machine_name()}; {own_threads()} threads; torch {torch.__version__}"])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15,sdxl", help="of sd15, sdxl, tiny (default: %(default)s)")
    parser.add_argument("--variant", default="dense,slim", help="of dense, slim (default: %(default)s)")
    parser.add_argument("--precision", default="fp32,fp16", help="of fp32, fp16 (default: %(default)s)")
    parser.add_argument("--held", choices=("float32", "float16"), default="float32", help="dtype before the export")
    parser.add_argument("--dynamic", action="store_true", help="leave batch and size open")
    parser.add_argument("--check", action="store_true", help="run the UNet's graph in ONNX Runtime, fp32")
    parser.add_argument("--image", type=int, default=0, metavar="STEPS", help="make one in torch and in optimum, fp32")
    parser.add_argument("--scratch", type=Path, help="where the graphs go while a row lasts (default: the system's)")
    parser.add_argument("--row", action="store_true", help="measure one here and print its row as JSON")
    args = parser.parse_args()
    if args.row:
        settings = ExportSettings(precision=args.precision, dynamic_batch=args.dynamic, dynamic_size=args.dynamic)
        with tempfile.TemporaryDirectory(dir=args.scratch, prefix="slimdiff-export-") as folder:
            exact = args.precision == "fp32"
            steps = args.image if exact else 0
            held = getattr(torch, args.held)
            row = measure(args.model, args.variant, settings, Path(folder), held, args.check and exact, steps)
        print(json.dumps(row))
        return
    rows = []
    for name in args.model.split(","):
        for variant in args.variant.split(","):
            for precision in args.precision.split(","):
                # A process of its own, for its peak memory.
                command = [sys.executable, "-m", "benchmarks.full_size_export", "--row", "--model", name]
                command += ["--variant", variant, "--precision", precision, "--held", args.held]
                command += ["--dynamic"] * args.dynamic + ["--check"] * args.check + ["--image", str(args.image)]
                command += ["--scratch", str(args.scratch)] if args.scratch else []
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(table(rows))


if __name__ == "__main__":
    main()
