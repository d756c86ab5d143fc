"""Quality and speed of the slim embedded model: the first table of RESULTS.md, and the ablation.

`make bench`, or `python -m benchmarks.quality [--cuts 25,10,50] [--unet-cuts 30] [--captions 500] [--methods ...]`:
ours against pruning that looks at no activation. `python -m benchmarks.quality --ablation`: from the papers to ours,
one part at a time, at shares of the transformer blocks' parameters; and with resnets, at shares of the whole UNet's.
What was measured before, with the same model, settings and code, is read from `runs/bench`; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import benchmarks
import exporters
import slimdiff
from benchmarks.baselines import magnitude_pruning, plain_svd, random_channels, torch_pruning
from benchmarks.embedded.card import EVALUATION, EVALUATION_SCENES, transformer_parameters
from deploy.artifacts.hashes import source_hash
from exporters.graphs.export import export_unet
from exporters.latency.decision import LOOKS
from exporters.latency.measure import bench as bench_pairs
from exporters.latency.pair import Job
from exporters.machine import machine_name
from exporters.settings import BenchSettings, ExportSettings
from slimdiff import Budget, CalibrationSettings, PlanSettings, embedded
from slimdiff.calibration.calibrate import calibrate
from slimdiff.compression import with_denoiser
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.trajectory import predict, record_calls, sample_images
from slimdiff.embedded import evaluator, scenes
from slimdiff.fidelity import image_fidelity, noise_error
from slimdiff.groups import find_sites
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.costs import batch_of, count_macs, count_parameters
from slimdiff.planning.planner import Planner
from slimdiff.settings import PAPERS, TRANSFORMER_GROUPS, Allocation, Forms, Sampling
from slimdiff.slimming.slim import Factors, factorise
from slimdiff.storage import manifest

CALIBRATION = CalibrationSettings(samples=64, sampling=Sampling(steps=20, batch=16, seed=0), tokens_per_dimension=None)
ERROR_SAMPLING = Sampling(steps=20, batch=16, seed=50_000)


@dataclass(frozen=True)
class Method:
    """A way to make a slim model of a given size.

    Attributes:
        label: in the tables.
        forms, allocation, groups: of our own; baselines take the ranks of the uniform allocation.
        baseline: what is done instead of ours.
    """

    label: str
    forms: Forms = Forms()
    allocation: Allocation = "global"
    baseline: Literal["svd", "magnitude", "random", "torch-pruning"] | None = None
    groups: tuple[str, ...] = TRANSFORMER_GROUPS


@dataclass(frozen=True)
class Cut:
    """How much goes: percent of the transformer blocks' parameters, or of the whole UNet's."""

    percent: float
    whole: bool = False

    def __str__(self) -> str:
        return f"-{self.percent:g} %" + (" of the UNet" if self.whole else "")

    def budget(self, unet: nn.Module) -> Budget:
        return Budget(round(self.percent / 100 * (count_parameters if self.whole else transformer_parameters)(unet)))


ATTENDED = PAPERS.model_copy(update={"value_moments": "attended"})
JOINT = ATTENDED.model_copy(update={"joint_output": True})
CENTRED = JOINT.model_copy(update={"centre_keys": True})
ELIMINATION = Forms(constant=False, compensate="none")

METHODS = {
    "global": Method("slimdiff, global"),
    "svd": Method("plain SVD", allocation="uniform", baseline="svd"),
    "magnitude": Method("magnitude pruning", allocation="uniform", baseline="magnitude"),
    "uniform": Method("slimdiff, uniform", allocation="uniform"),
    "torch-pruning": Method("Torch-Pruning, group magnitude", allocation="uniform", baseline="torch-pruning"),
    "random": Method("random channels", allocation="uniform", baseline="random"),
    "papers-softmax": Method("papers' forms, softmax of block influence", PAPERS, "softmax"),
    "papers": Method("papers' forms, uniform", PAPERS, "uniform"),
    "attended": Method("+ value_output from what `to_out` receives", ATTENDED, "uniform"),
    "joint": Method("+ output solved over all heads", JOINT, "uniform"),
    "centred": Method("+ centred keys", CENTRED, "uniform"),
    "elimination": Method("+ elimination on the output error", ELIMINATION, "uniform"),
    "local": Method("+ knapsack on local errors", ELIMINATION, "local"),
    "sensitivity": Method("+ measured sensitivities", ELIMINATION),
    "constant": Method("+ constant column", Forms().local()),
    "compensated": Method("+ projections solved again (the default)"),
    "sequential": Method("default, last linears too, in order", Forms(compensate="sequential")),
    "joint-resnet": Method("default + resnets, one knapsack", groups=(*TRANSFORMER_GROUPS, "resnet")),
    "resnet": Method("resnets alone", groups=("resnet",)),
    "magnitude-resnet": Method(
        "magnitude pruning, resnets too",
        allocation="uniform",
        baseline="magnitude",
        groups=(*TRANSFORMER_GROUPS, "resnet"),
    ),
    "torch-pruning-resnet": Method(
        "Torch-Pruning, resnets too",
        allocation="uniform",
        baseline="torch-pruning",
        groups=(*TRANSFORMER_GROUPS, "resnet"),
    ),
}
BASELINES = {
    "svd": plain_svd,
    "magnitude": magnitude_pruning,
    "random": random_channels,
    "torch-pruning": torch_pruning,
}
README = ("global", "svd", "magnitude", "uniform", "joint-resnet")
WHOLE = ("global", "joint-resnet", "resnet", "magnitude-resnet", "torch-pruning-resnet")
ABLATION = tuple(name for name in METHODS if name not in ("uniform", *WHOLE))


class Bench:
    """The dense model, what calibration saw of it, and what it is compared on."""

    def __init__(self, captions: int) -> None:
        self.pipeline = load_pipeline("demo")
        self.unet = self.pipeline.unet
        self.prompts = embedded.captions(CALIBRATION.samples, 1)
        self.statistics = calibrate(self.pipeline, self.prompts, CALIBRATION)
        self.recorded = Calls(self.pipeline, self.prompts, CALIBRATION)
        self.calls = record_calls(self.pipeline, embedded.captions(32, 2, held_out=True), ERROR_SAMPLING, every=2)
        # One image's call, both branches of guidance together: latency is its time, MACs are of one of its samples.
        self.one_call = record_calls(self.pipeline, self.prompts[:1], Sampling(steps=1, batch=1))[0]
        self.scenes = scenes.sample_scenes(captions, EVALUATION_SCENES, held_out=True)
        self.judge = evaluator.load()
        self.rendered = scenes.render(self.scenes, 1)

    @cache  # noqa: B019 (there is one bench)
    def factors(self, forms: Forms) -> Factors:
        return factorise(self.unet, self.statistics, find_sites(self.unet)[0], forms)

    @cache  # noqa: B019
    def planner(self, forms: Forms, allocation: Allocation, groups: tuple[str, ...]) -> Planner:
        """One planner per way to plan; sensitivities of the usual forms are measured once."""
        settings = PlanSettings(forms=forms, allocation=allocation, groups=groups)
        planner = Planner(self.unet, self.statistics, settings, calls=self.recorded)
        planner.factors = self.factors(forms.local())
        if allocation == "global":
            planner.remember(self.statistics)
        return planner

    def make(self, method: Method, cut: Cut) -> nn.Module:
        """The slim model, or the baseline's of the same size."""
        planner = self.planner(method.forms, method.allocation, method.groups)
        plan = planner.plan(cut.budget(self.unet))
        return planner.slim(plan) if method.baseline is None else BASELINES[method.baseline](self.unet, plan)

    def images(self, unet: nn.Module) -> list[Any]:
        pipeline = with_denoiser(self.pipeline, unet)
        return sample_images(pipeline, [s.caption() for s in self.scenes], EVALUATION)

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


def measure_quality(bench: Bench, dense: dict[str, Any], method: Method, cut: Cut) -> dict[str, Any]:
    start = time.perf_counter()
    unet = bench.make(method, cut)
    seconds = time.perf_counter() - start
    images = bench.images(unet)
    hits = bench.hits(images)
    return {
        "parameters": count_parameters(unet),
        "macs": count_macs(unet, bench.one_call) // batch_of(bench.one_call),
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
        images = np.stack([np.asarray(image) for image in bench.images(bench.unet)])
        with manifest.replacing(file, is_file=True) as temporary, temporary.open("wb") as stream:
            np.save(stream, images)
    return list(np.load(file))


def onnx_speedup(bench: Bench, method: Method, cut: Cut, folder: Path) -> dict[str, float]:
    """Dense over slim, median of process pairs in ONNX Runtime on the CPU, one guided call for one image."""
    call = bench.one_call
    jobs = []
    for name in ("dense", f"{method.label.rpartition(' ')[2]}-{cut.percent:g}"):
        if not (folder / name / "model.onnx").is_file():
            module = bench.unet if name == "dense" else bench.make(method, cut)
            with manifest.replacing(folder / name) as temporary:
                export_unet(module, temporary, call, ExportSettings())
        jobs.append(Job(name, str(folder / name / "model.onnx"), "onnxruntime"))
    settings = BenchSettings(processes=LOOKS[-1].pairs, threads=0)
    return bench_pairs(jobs[0], jobs[1], settings)["speedup"]


def readme_table(dense: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One line per method and cut, with speed."""
    lines = [
        "| method | transformer-block parameters | UNet parameters | MACs per sample | noise-prediction error "
        "| PSNR to dense | caption accuracy | points lost (95 %) | Fréchet | ONNX Runtime speedup (95 %) |",
        "| --- " * 10 + "|",
        f"| dense | 100 % | {dense['parameters'] / 1e6:.2f} M | {dense['macs'] / 1e6:.0f} M | 0 | - "
        f"| {dense['caption_accuracy']:.1%} | 0 | {dense['frechet_distance']:.3f} | 1 |",
    ]
    for row in rows:
        lost, speed = row["points_lost"], row.get("speedup")
        lines.append(
            f"| {METHODS[row['method']].label} | {row['cut']} | {row['parameters'] / 1e6:.2f} M "
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
    cuts = list(dict.fromkeys(row["cut"] for row in rows))
    cells = {(row["method"], row["cut"]): row for row in rows}
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    tables = []
    for title, show in CELLS.items():
        lines = [
            f"| {title.format(**dense)} | " + " | ".join(cuts) + " |",
            "| --- " * (len(cuts) + 1) + "|",
        ]
        for name in methods:
            lines.append(f"| {METHODS[name].label} | " + " | ".join(show(cells[name, cut]) for cut in cuts) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ablation", action="store_true", help="the ablation instead of the first table of RESULTS.md")
    made.add_argument("--cuts", help="percent of the transformer-block parameters")
    made.add_argument("--unet-cuts", help=f"percent of the whole UNet's parameters, for {', '.join(WHOLE)}")
    made.add_argument("--methods", help=f"which of {', '.join(METHODS)}")
    made.add_argument("--captions", type=int, help="how many images per row")
    made.add_argument("--out", type=Path, default=Path("runs/bench"))
    return made


def parse_cuts(text: str | None, usual: str, whole: bool = False) -> list[Cut]:
    """Cuts from percents with commas between them; none from an empty text."""
    percents = usual if text is None else text
    return [Cut(float(percent), whole) for percent in percents.split(",") if percent]


def main() -> None:
    arguments = parser().parse_args()
    ablation = arguments.ablation
    cuts = parse_cuts(arguments.cuts, "10,20,30,40,50" if ablation else "25,10,50")
    unet_cuts = parse_cuts(arguments.unet_cuts, "12,20,30" if ablation else "30", whole=True)
    methods = arguments.methods.split(",") if arguments.methods else [*ABLATION, *WHOLE] if ablation else list(README)
    captions = arguments.captions or (100 if ablation else 500)
    if unknown := set(methods) - set(METHODS):
        parser().error(f"--methods knows {', '.join(METHODS)}, not {', '.join(sorted(unknown))}")
    bench = Bench(captions)
    settings = {
        "model": bench.statistics.model_hash,
        # What older code measured must not stand in a table of this one's.
        "code": [source_hash(Path(module.__path__[0])) for module in (slimdiff, exporters, benchmarks)],
        "captions": captions,
        "calibration": CALIBRATION.model_dump(),
        "evaluation": EVALUATION.model_dump(),
    }
    folder = arguments.out / manifest.fingerprint(settings)[:12]
    file = folder / "quality.json"
    known = {(r["method"], r["cut"]): r for r in json.loads(file.read_text())["rows"]} if file.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)

    def keep(key: tuple[str, str], found: dict[str, Any]) -> None:
        known[key] = {"method": key[0], "cut": key[1], **known.get(key, {}), **found}
        manifest.write_json(file, {"settings": settings, "machine": machine_name(), "rows": list(known.values())})

    # With resnets, shares are of the whole UNet; in the ablation, our default without them stands beside.
    both = () if ablation else ("global",)
    chosen = [(name, cut) for cut in cuts for name in methods if name in both or name not in WHOLE]
    chosen += [(name, cut) for cut in unet_cuts for name in methods if name in WHOLE and name not in both]
    # Timings first and together: whoever measures can leave the machine alone for these minutes.
    for name, cut in chosen:
        method = METHODS[name]
        timed = method.baseline is None and not ablation
        if timed and "speedup" not in known.get((name, str(cut)), {}):
            keep((name, str(cut)), {"speedup": onnx_speedup(bench, method, cut, folder)})
    images = dense_images(bench, folder / "dense.npy")
    hits = bench.hits(images)
    dense = {
        "images": images,
        "hits": hits,
        "parameters": count_parameters(bench.unet),
        "macs": count_macs(bench.unet, bench.one_call) // batch_of(bench.one_call),
        "caption_accuracy": float(hits[:, 0].sum() / hits[:, 1].sum()),
        "frechet_distance": evaluator.frechet_distance(bench.judge, evaluator.to_tensor(images), bench.rendered),
    }
    for name, cut in chosen:
        if "caption_accuracy" not in known.get((name, str(cut)), {}):
            keep((name, str(cut)), measure_quality(bench, dense, METHODS[name], cut))
    for whole in (False, True):
        keys = sorted((key for key in chosen if key[1].whole == whole), key=lambda key: key[1].percent)
        rows = [known[name, str(cut)] for name, cut in keys]
        if rows:
            print(ablation_tables(dense, rows) if ablation else readme_table(dense, rows), end="\n\n")
    print(f"{captions} captions; {machine_name()}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
