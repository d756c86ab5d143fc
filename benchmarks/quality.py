"""Quality and speed of the slim embedded model: the README's table, and the ablation.

`make bench`, or `python -m benchmarks.quality [--cuts 25,10,50] [--captions 500] [--methods ...]`: ours against pruning
that looks at no activation. `python -m benchmarks.quality --ablation`: from the papers' recipe to ours, one part at a
time. What was measured before, with the same model, settings and code, is read from `runs/bench`; an interrupted run
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import benchmarks
import exporters
import slimdiff
from benchmarks.baselines import magnitude_pruning, plain_svd, random_channels
from deploy.workshop import source_hash
from exporters.latency import LatencySettings, machine_name, paired_latency
from exporters.onnx_export import ExportSettings, export_unet
from exporters.onnx_runtime import OnnxUNet
from slimdiff import Budget, CalibrationSettings, Plan, PlanSettings, artifacts, embedded, slim_denoiser
from slimdiff.calibration import calibrate
from slimdiff.closed_forms import PAPERS, Forms
from slimdiff.compensation import compensate
from slimdiff.compression import sensitivity_calls, with_denoiser
from slimdiff.costs import count_macs, count_parameters
from slimdiff.embedded import evaluator, scenes
from slimdiff.embedded.card import EVALUATION, EVALUATION_SCENES, transformer_parameters
from slimdiff.fidelity import image_fidelity, noise_error
from slimdiff.pipelines import load_pipeline
from slimdiff.planning import Allocation, Planner, chosen_sites
from slimdiff.sites import find_sites
from slimdiff.slimming import Factors, factorise
from slimdiff.trajectory import Call, Sampling, predict, record_calls, sample_images

CALIBRATION = CalibrationSettings(samples=64, sampling=Sampling(steps=20, batch=16, seed=0))
ERROR_SAMPLING = Sampling(steps=20, batch=16, seed=50_000)


@dataclass(frozen=True)
class Method:
    """A way to make a slim model of a given size.

    Attributes:
        label: in the tables.
        forms, allocation: of our own; baselines take the ranks of the uniform allocation.
        baseline: what is done instead of ours.
        compensated: whether the last linears are solved again, one after the other, on the slim model's inputs.
    """

    label: str
    forms: Forms = Forms()
    allocation: Allocation = "global"
    baseline: Literal["svd", "magnitude", "random"] | None = None
    compensated: bool = False


ATTENDED = PAPERS.model_copy(update={"value_moments": "attended"})
JOINT = ATTENDED.model_copy(update={"joint_output": True})
CENTRED = JOINT.model_copy(update={"centre_keys": True})

METHODS = {
    "global": Method("slimdiff, global"),
    "svd": Method("plain SVD", allocation="uniform", baseline="svd"),
    "magnitude": Method("magnitude pruning", allocation="uniform", baseline="magnitude"),
    "uniform": Method("slimdiff, uniform", allocation="uniform"),
    "random": Method("random channels", allocation="uniform", baseline="random"),
    "papers-softmax": Method("papers' forms, softmax of block influence", PAPERS, "softmax"),
    "papers": Method("papers' forms, uniform", PAPERS, "uniform"),
    "attended": Method("+ value_output from what `to_out` receives", ATTENDED, "uniform"),
    "joint": Method("+ output solved over all heads", JOINT, "uniform"),
    "centred": Method("+ centred keys", CENTRED, "uniform"),
    "elimination": Method("+ elimination on the output error", Forms(), "uniform"),
    "local": Method("+ knapsack on local errors", Forms(), "local"),
    "sensitivity": Method("+ measured sensitivities (the default)"),
    "constant": Method("+ constant column", Forms(constant=True)),
    "compensated": Method("default + sequential compensation", compensated=True),
}
BASELINES = {"svd": plain_svd, "magnitude": magnitude_pruning, "random": random_channels}
README = ("global", "svd", "magnitude", "uniform")
ABLATION = tuple(name for name in METHODS if name not in ("global", "uniform"))


class Bench:
    """The dense model, what calibration saw of it, and what it is compared on."""

    def __init__(self, captions: int) -> None:
        self.pipeline = load_pipeline("demo")
        self.unet = self.pipeline.unet
        self.prompts = embedded.captions(CALIBRATION.samples, 1)
        self.statistics = calibrate(self.pipeline, self.prompts, CALIBRATION)
        self.sensitive = sensitivity_calls(self.pipeline, self.prompts, CALIBRATION.sampling, PlanSettings())
        self.calls = record_calls(
            self.pipeline, embedded.captions(32, 2, held_out=True), ERROR_SAMPLING, every=2, progress="record"
        )
        # One image's call, both branches of guidance together: what MACs and latency are told of.
        self.one_call = record_calls(self.pipeline, self.prompts[:1], Sampling(steps=1, batch=1))[0]
        self.scenes = scenes.sample_scenes(captions, EVALUATION_SCENES, held_out=True)
        self.judge = evaluator.load()
        self.rendered = scenes.render(self.scenes, 1)

    @cache  # noqa: B019 (there is one bench)
    def factors(self, forms: Forms) -> Factors:
        sites = chosen_sites(find_sites(self.unet)[0], PlanSettings())
        return factorise(self.unet, self.statistics, sites, "factorise", forms)

    @cache  # noqa: B019
    def planner(self, forms: Forms, allocation: Allocation) -> Planner:
        settings, factors = PlanSettings(forms=forms, allocation=allocation), self.factors(forms)
        return Planner(self.unet, self.statistics, settings, calls=self.sensitive, factors=factors)

    @cached_property
    def mending_calls(self) -> list[Call]:
        """What sequential compensation solves on: as many images as calibration saw, every other step of theirs."""
        return record_calls(self.pipeline, self.prompts, CALIBRATION.sampling, every=2, progress="record")

    def plan(self, method: Method, cut: float) -> Plan:
        budget = Budget(round(cut / 100 * transformer_parameters(self.unet)))
        return self.planner(method.forms, method.allocation).plan(budget)

    def make(self, method: Method, cut: float) -> nn.Module:
        """The slim model, or the baseline's of the same size."""
        plan = self.plan(method, cut)
        if method.baseline is not None:
            return BASELINES[method.baseline](self.unet, plan)
        slim = slim_denoiser(self.unet, self.statistics, plan, self.factors(method.forms), progress=None)
        if method.compensated:
            compensate(self.unet, slim, plan, self.mending_calls)
        return slim

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


def measure_quality(bench: Bench, dense: dict[str, Any], method: Method, cut: float) -> dict[str, Any]:
    start = time.perf_counter()
    unet = bench.make(method, cut)
    seconds = time.perf_counter() - start
    images = bench.images(unet, f"{method.label} {cut:g} %")
    hits = bench.hits(images)
    return {
        "parameters": count_parameters(unet),
        "macs": count_macs(unet, bench.one_call),
        "seconds": seconds,
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


def onnx_speedup(bench: Bench, method: Method, cut: float, folder: Path) -> dict[str, float]:
    """Dense over slim, median of pairs in ONNX Runtime on the CPU, one guided call for one image."""
    call = bench.one_call
    runners = []
    for name in ("dense", f"{method.label.rpartition(' ')[2]}-{cut:g}"):
        if not (folder / name / "model.onnx").is_file():
            module = bench.unet if name == "dense" else bench.make(method, cut)
            with artifacts.replacing(folder / name) as temporary:
                export_unet(module, temporary, call, ExportSettings())
        runners.append(OnnxUNet(folder / name))
    result = paired_latency(
        lambda: runners[0].predict(call),
        lambda: runners[1].predict(call),
        LatencySettings(rounds=1000),
        progress=f"bench {method.label} {cut:g} %",
    )
    return result["speedup"]


def readme_table(dense: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One line per method and cut, with speed."""
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
            f"| {METHODS[row['method']].label} | -{row['cut']:g} % | {row['parameters'] / 1e6:.2f} M "
            f"| {row['macs'] / 1e6:.0f} M "
            f"| {row['noise_error']:.1e} | {row['psnr_db']:.1f} dB | {row['caption_accuracy']:.1%} "
            f"| {lost['points']:+.1f} ({lost['low']:+.1f} to {lost['high']:+.1f}) | {row['frechet_distance']:.3f} "
            + (f"| {speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}) |" if speed else "| - |")
        )
    return "\n".join(lines)


CELLS = {
    "noise-prediction error": lambda row: f"{row['noise_error']:.1e}",
    "PSNR to dense, dB": lambda row: f"{row['psnr_db']:.1f}",
    "caption accuracy (dense {caption_accuracy:.1%})": lambda row: f"{row['caption_accuracy']:.1%}",
    "Fréchet distance (dense {frechet_distance:.2f})": lambda row: f"{row['frechet_distance']:.2f}",
    "seconds to slim": lambda row: f"{row['seconds']:.1f}",
}


def ablation_tables(dense: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One table per figure: methods down, cuts across."""
    cuts = sorted({row["cut"] for row in rows})
    cells = {(row["method"], row["cut"]): row for row in rows}
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    tables = []
    for title, show in CELLS.items():
        lines = [
            f"| {title.format(**dense)} | " + " | ".join(f"-{cut:g} %" for cut in cuts) + " |",
            "| --- " * (len(cuts) + 1) + "|",
        ]
        for name in methods:
            lines.append(f"| {METHODS[name].label} | " + " | ".join(show(cells[name, cut]) for cut in cuts) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", action="store_true", help="the ablation instead of the README's table")
    parser.add_argument("--cuts", help="percent of the transformer-block parameters")
    parser.add_argument("--methods", help=f"which of {', '.join(METHODS)}")
    parser.add_argument("--captions", type=int, help="how many images per row")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args()
    cuts = [float(c) for c in (arguments.cuts or ("10,20,30,40,50" if arguments.ablation else "25,10,50")).split(",")]
    methods = arguments.methods.split(",") if arguments.methods else list(ABLATION if arguments.ablation else README)
    captions = arguments.captions or (100 if arguments.ablation else 500)
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods knows {', '.join(METHODS)}, not {', '.join(sorted(unknown))}")
    bench = Bench(captions)
    settings = {
        "model": bench.statistics.model_hash,
        # What older code measured must not stand in a table of this one's.
        "code": [source_hash(Path(module.__path__[0])) for module in (slimdiff, exporters, benchmarks)],
        "captions": captions,
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

    wanted = [(name, cut) for cut in cuts for name in methods]
    # Timings first and together: whoever measures can leave the machine alone for these minutes.
    for name, cut in wanted:
        method = METHODS[name]
        timed = method.baseline is None and not arguments.ablation
        if timed and "speedup" not in known.get((name, cut), {}):
            keep((name, cut), {"speedup": onnx_speedup(bench, method, cut, folder)})
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
    for name, cut in wanted:
        if "caption_accuracy" not in known.get((name, cut), {}):
            keep((name, cut), measure_quality(bench, dense, METHODS[name], cut))
    rows = [known[key] for key in sorted(wanted, key=lambda key: key[1])]
    print(ablation_tables(dense, rows) if arguments.ablation else readme_table(dense, rows))
    print(f"\n{captions} captions; {machine_name()}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
