"""What a slim model gains in ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.bench import Bench
from benchmarks.quality.methods import Cut, Method
from exporters.graphs.export import export_unet
from exporters.latency.decision import LOOKS
from exporters.latency.measure import bench as bench_pairs
from exporters.latency.pair import Job
from exporters.settings import BenchSettings, ExportSettings
from slimdiff.storage import manifest


def onnx_speedup(bench: Bench, method: Method, cut: Cut, folder: Path) -> dict[str, float]:
    """Dense over slim, median of process pairs in ONNX Runtime on the CPU, one guided call for one image."""
    jobs = []
    for name in ("dense", f"{method.label.rpartition(' ')[2]}-{cut.percent:g}"):
        if not (folder / name / "model.onnx").is_file():
            module = bench.unet if name == "dense" else bench.make(method, cut)[0]
            with manifest.replacing(folder / name) as temporary:
                export_unet(module, temporary, bench.one_call, ExportSettings())
        jobs.append(Job(name, str(folder / name / "model.onnx"), "onnxruntime"))
    settings = BenchSettings(processes=LOOKS[-1].pairs, threads=0)
    return bench_pairs(jobs[0], jobs[1], settings)["speedup"]
