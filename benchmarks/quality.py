"""The README's table: quality and speed of the slim embedded model, against pruning without activations.

`python -m benchmarks.quality [--cuts 25,10,50] [--captions 500] [--methods ...]` or `make bench`. What was measured
before, with the same model and settings, is read from `runs/bench`; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import benchmarks
import exporters
import slimdiff
from benchmarks.baselines import magnitude_pruning, plain_svd
from deploy.workshop import source_hash
from exporters.latency import LatencySettings, machine_name, paired_latency
from exporters.onnx_export import ExportSettings, export_unet
from exporters.onnx_runtime import OnnxUNet
from slimdiff import Budget, CalibrationSettings, Plan, PlanSettings, artifacts, embedded, slim_denoiser
from slimdiff.calibration import calibrate
from slimdiff.compression import sensitivity_calls, with_denoiser
from slimdiff.costs import count_macs, count_parameters
from slimdiff.embedded import evaluator, scenes
from slimdiff.embedded.card import EVALUATION, EVALUATION_SCENES, transformer_parameters
from slimdiff.fidelity import image_fidelity, noise_error
from slimdiff.pipelines import load_pipeline
from slimdiff.planning import Planner
from slimdiff.sites import find_sites
from slimdiff.slimming import factorise
from slimdiff.trajectory import Sampling, predict, record_calls, sample_images

CALIBRATION = CalibrationSettings(samples=64, sampling=Sampling(steps=20, batch=16, seed=0))
ERROR_SAMPLING = Sampling(steps=20, batch=16, seed=50_000)


class Bench:
    """The dense model, what calibration saw of it, and what it is compared on."""

    def __init__(self, captions: int) -> None:
        self.pipeline = load_pipeline("demo")
        self.unet = self.pipeline.unet
        self.prompts = embedded.captions(CALIBRATION.samples, 1)
        self.statistics = calibrate(self.pipeline, self.prompts, CALIBRATION)
        self.factors = factorise(self.unet, self.statistics, find_sites(self.unet)[0], "factorise")
        calls = sensitivity_calls(self.pipeline, self.prompts, CALIBRATION.sampling, PlanSettings())
        self.planners = {
            name: Planner(self.unet, self.statistics, PlanSettings(allocation=name), calls=calls, factors=self.factors)
            for name in ("global", "uniform")
        }
        self.calls = record_calls(
            self.pipeline, embedded.captions(32, 2, held_out=True), ERROR_SAMPLING, every=2, progress="record"
        )
        # One image's call, both branches of guidance together: what MACs and latency are told of.
        self.one_call = record_calls(self.pipeline, self.prompts[:1], Sampling(steps=1, batch=1))[0]
        self.scenes = scenes.sample_scenes(captions, EVALUATION_SCENES, held_out=True)
        self.judge = evaluator.load()
        self.rendered = scenes.render(self.scenes, 1)

    def plan(self, cut: float, allocation: str) -> Plan:
        return self.planners[allocation].plan(Budget(round(cut / 100 * transformer_parameters(self.unet))))

    def images(self, unet: nn.Module, name: str) -> list[Any]:
        pipeline = with_denoiser(self.pipeline, unet)
        return sample_images(pipeline, [s.caption() for s in self.scenes], EVALUATION, progress=name)

    def hits(self, images: list[Any]) -> np.ndarray:
        """Right and told attributes per caption, `[N, 2]`."""
        rows = evaluator.attribute_hits(self.judge, evaluator.to_tensor(images), self.scenes)
        flat = [[h for hits in row.values() for h in hits] for row in rows]
        return np.array([[sum(f), len(f)] for f in flat])


def points_lost(dense: np.ndarray, slim: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Caption accuracy lost, in points, with a 95 % interval of a paired bootstrap over captions."""
    draw = np.random.default_rng(seed).integers(len(dense), size=(4000, len(dense)))
    told = dense[:, 1][draw].sum(1)
    lost = 100 * (dense[:, 0] - slim[:, 0])[draw].sum(1) / told
    total = 100 * float((dense[:, 0] - slim[:, 0]).sum() / dense[:, 1].sum())
    return {"points": total, "low": float(np.quantile(lost, 0.025)), "high": float(np.quantile(lost, 0.975))}


METHODS = {
    "global": "slimdiff, global",
    "svd": "plain SVD",
    "magnitude": "magnitude pruning",
    "uniform": "slimdiff, uniform",
}


def make_slim(bench: Bench, method: str, cut: float) -> nn.Module:
    plan = bench.plan(cut, "global" if method.endswith("global") else "uniform")
    if method == "magnitude pruning":
        return magnitude_pruning(bench.unet, plan)
    if method == "plain SVD":
        return plain_svd(bench.unet, plan)
    return slim_denoiser(bench.unet, bench.statistics, plan, bench.factors, progress=None)


def measure_quality(bench: Bench, dense: dict[str, Any], method: str, cut: float) -> dict[str, Any]:
    unet = make_slim(bench, method, cut)
    images = bench.images(unet, f"{method} {cut:g} %")
    hits = bench.hits(images)
    return {
        "parameters": count_parameters(unet),
        "macs": count_macs(unet, bench.one_call),
        "noise_error": noise_error(lambda c: predict(bench.unet, c), lambda c: predict(unet, c), bench.calls)[
            "relative_mse"
        ],
        "psnr_db": image_fidelity(dense["images"], images)["psnr_db"],
        "caption_accuracy": float(hits[:, 0].sum() / hits[:, 1].sum()),
        "points_lost": points_lost(dense["hits"], hits),
        "frechet_distance": evaluator.frechet_distance(bench.judge, evaluator.to_tensor(images), bench.rendered),
    }


def dense_images(bench: Bench, file: Path) -> list[Any]:
    """The dense model's images, made once."""
    if not file.is_file():
        images = np.stack([np.asarray(image) for image in bench.images(bench.unet, "dense")])
        with artifacts.replacing(file, is_file=True) as temporary, temporary.open("wb") as stream:
            np.save(stream, images)
    return list(np.load(file))


def onnx_speedup(bench: Bench, method: str, cut: float, folder: Path) -> dict[str, float]:
    """Dense over slim, median of pairs in ONNX Runtime on the CPU, one guided call for one image."""
    call = bench.one_call
    runners = []
    for name in ("dense", f"{method.rpartition(' ')[2]}-{cut:g}"):
        if not (folder / name / "model.onnx").is_file():
            module = bench.unet if name == "dense" else make_slim(bench, method, cut)
            with artifacts.replacing(folder / name) as temporary:
                export_unet(module, temporary, call, ExportSettings())
        runners.append(OnnxUNet(folder / name))
    result = paired_latency(
        lambda: runners[0].predict(call),
        lambda: runners[1].predict(call),
        LatencySettings(rounds=1000),
        progress=f"bench {method} {cut:g} %",
    )
    return result["speedup"]


def table(dense: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | transformer-block parameters | UNet parameters | MACs of a guided call | noise-prediction error "
        "| PSNR to dense | caption accuracy | points lost (95 %) | Fréchet | ONNX Runtime speedup (95 %) |",
        "| --- " * 10 + "|",
        f"| dense | 100 % | {dense['parameters'] / 1e6:.2f} M | {dense['macs'] / 1e6:.0f} M | 0 | - "
        f"| {dense['caption_accuracy']:.1%} | 0 | {dense['frechet_distance']:.3f} | 1 |",
    ]
    for row in rows:
        lost, speed = row["points_lost"], row.get("speedup")
        lines.append(
            f"| {row['method']} | -{row['cut']:g} % | {row['parameters'] / 1e6:.2f} M | {row['macs'] / 1e6:.0f} M "
            f"| {row['noise_error']:.1e} | {row['psnr_db']:.1f} dB | {row['caption_accuracy']:.1%} "
            f"| {lost['points']:+.1f} ({lost['low']:+.1f} to {lost['high']:+.1f}) | {row['frechet_distance']:.3f} "
            + (f"| {speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}) |" if speed else "| - |")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", default="25,10,50", help="percent of the transformer-block parameters")
    parser.add_argument("--methods", default=",".join(METHODS), help="which of global, svd, magnitude, uniform")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args()
    cuts, methods = [float(c) for c in arguments.cuts.split(",")], arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods knows {', '.join(METHODS)}, not {', '.join(sorted(unknown))}")
    bench = Bench(arguments.captions)
    settings = {
        "model": bench.statistics.model_hash,
        # What older code measured must not stand in a table of this one's.
        "code": [source_hash(Path(module.__path__[0])) for module in (slimdiff, exporters, benchmarks)],
        "captions": arguments.captions,
        "calibration": CALIBRATION.model_dump(),
        "evaluation": EVALUATION.model_dump(),
    }
    folder = arguments.out / artifacts.fingerprint(settings)[:12]
    file = folder / "quality.json"
    known = {(r["method"], r["cut"]): r for r in json.loads(file.read_text())["rows"]} if file.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)

    def keep(key: tuple[str, float], found: dict[str, Any]) -> None:
        known[key] = {"method": key[0], "cut": key[1], **known.get(key, {}), **found}
        artifacts.write_json(file, {"settings": settings, "machine": machine_name(), "rows": list(known.values())})

    wanted = [(METHODS[name], cut) for cut in cuts for name in methods]
    # Timings first and together: whoever measures can leave the machine alone for these minutes.
    for method, cut in wanted:
        if method.startswith("slimdiff") and "speedup" not in known.get((method, cut), {}):
            speedup = onnx_speedup(bench, method, cut, folder)
            keep((method, cut), {"speedup": speedup})
    images = dense_images(bench, folder / "dense.npy")
    hits = bench.hits(images)
    dense = {
        "images": images,
        "hits": hits,
        "parameters": count_parameters(bench.unet),
        "macs": count_macs(bench.unet, bench.one_call),
        "caption_accuracy": float(hits[:, 0].sum() / hits[:, 1].sum()),
        "frechet_distance": evaluator.frechet_distance(bench.judge, evaluator.to_tensor(images), bench.rendered),
    }
    for method, cut in wanted:
        if "caption_accuracy" not in known.get((method, cut), {}):
            keep((method, cut), measure_quality(bench, dense, method, cut))
    print(table(dense, [known[key] for key in sorted(wanted, key=lambda key: key[1])]))
    print(f"\n{arguments.captions} captions; {machine_name()}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
