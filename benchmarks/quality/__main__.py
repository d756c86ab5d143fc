"""Quality and speed of slim models: tables of RESULTS.md, and the ablation.

`make bench`, or `python -m benchmarks.quality [--cuts 25,10,50] [--unet-cuts 30] [--captions 500] [--methods ...]`:
ours against pruning that looks at no activation, on the embedded model. `--ablation`: from the papers to ours, one part
at a time, at shares of the transformer blocks' parameters; and with resnets, at shares of the whole UNet's.
`--model things`: the harder model of named things against the papers' recipe, OBS-Diff and pruning; without speed, on
the CPU or with `--device cuda`.

Each cell is a JSON file below `--work`, in a folder for the model, the settings and the code: what is there is not
measured again, and a run that was interrupted, or stopped by `--minutes`, goes on. `--show` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import benchmarks
import exporters
import slimdiff
from benchmarks.quality.bench import CALIBRATION, Bench
from benchmarks.quality.methods import ABLATION, METHODS, README, TELLING, THINGS, THINGS_WHOLE, WHOLE, Cut
from benchmarks.quality.tables import ablation_tables, accuracy_table, quality_table
from benchmarks.quality.worlds import WORLDS
from deploy.artifacts.hashes import source_hash
from exporters.machine import machine_name
from slimdiff.errors import InputError, MissingPackageError, SlimdiffError
from slimdiff.storage import manifest


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=list(WORLDS), default="demo", help="which trained model")
    made.add_argument("--ablation", action="store_true", help="the ablation instead of the first table of RESULTS.md")
    made.add_argument("--cuts", help="percent of the transformer-block parameters")
    made.add_argument("--unet-cuts", help="percent of the whole UNet's parameters, for methods that say so")
    made.add_argument("--methods", help=f"which of the methods, with commas: {', '.join(METHODS)}")
    made.add_argument("--captions", type=int, help="how many images per row")
    made.add_argument("--samples", type=int, default=CALIBRATION.samples, help="how many calibration prompts")
    made.add_argument("--steps", type=int, default=CALIBRATION.sampling.steps, help="of each of their images")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--minutes", type=float, default=float("inf"), help="after which no further cell begins")
    made.add_argument("--work", type=Path, default=Path("runs/bench"))
    made.add_argument("--show", action="store_true", help="print the tables of every folder below --work")
    return made


def parse_cuts(text: str | None, usual: str, whole: bool = False) -> list[Cut]:
    """Cuts from percents with commas between them; none from an empty text."""
    percents = usual if text is None else text
    return [Cut(float(percent), whole) for percent in percents.split(",") if percent]


def cells_of(arguments: argparse.Namespace) -> list[tuple[str, Cut]]:
    """What is measured, the most telling first."""
    ablation, things = arguments.ablation, arguments.model == "things"
    asked = arguments.methods.split(",") if arguments.methods else None
    if unknown := set(asked or ()) - set(METHODS):
        parser().error(f"--methods knows {', '.join(METHODS)}, not {', '.join(sorted(unknown))}")
    usual, whole_usual = ("10,20,30,40,50", "12,20,30") if ablation else ("25,10,50", "30")
    methods: Iterable[str] = [*ABLATION, *WHOLE] if ablation else README
    if things and not ablation:
        usual, whole_usual, methods = "30,50,20,10,40", "30,20,12", THINGS
    cuts = parse_cuts(arguments.cuts, usual)
    unet_cuts = parse_cuts(arguments.unet_cuts, whole_usual, whole=True)
    if things:
        whole = asked or (WHOLE if ablation else THINGS_WHOLE)
        every = [(name, cut) for cut in cuts for name in asked or methods if "resnet" not in name]
        every += [(name, cut) for cut in unet_cuts for name in whole]
        return [cell for cell in TELLING if cell in every] + [cell for cell in every if cell not in TELLING]
    # With resnets, shares are of the whole UNet; in the ablation, our default without them stands beside.
    both = () if ablation else ("global",)
    chosen = [(name, cut) for cut in cuts for name in asked or methods if name in both or name not in WHOLE]
    chosen += [(n, cut) for cut in unet_cuts for n in asked or methods if n in WHOLE and n not in both]
    return chosen


class Cells:
    """Measured cells of one model, its settings and the code, each a file that is written in one step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = {file.stem: json.loads(file.read_text()) for file in sorted((folder / "cells").glob("*.json"))}

    @staticmethod
    def key(name: str, cut: Cut) -> str:
        return f"{name}@{cut.slug}"

    def keep(self, key: str, **figures: Any) -> None:
        self.rows[key] = {**self.rows.get(key, {}), **figures}
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        manifest.write_json(self.folder / "cells" / f"{key}.json", self.rows[key])

    def show(self) -> None:
        """Print the tables."""
        settings = json.loads((self.folder / "settings.json").read_text())
        dense = self.rows.get("dense", {})
        for whole in (False, True):
            rows = [r for r in self.rows.values() if r.get("whole") is whole and "noise_error" in r]
            rows.sort(key=lambda row: (row["percent"], list(METHODS).index(row["method"])))
            if not rows or not dense:
                continue
            if settings["ablation"]:
                print(ablation_tables(dense, rows), end="\n\n")
            else:
                print(quality_table(dense, rows), end="\n\n")
                print(accuracy_table(dense, rows, WORLDS[settings["world"]].sharpest), end="\n\n")
        print(f"{settings['captions']} captions; {settings['machine']}")


def main() -> int:
    arguments = parser().parse_args()
    try:
        run(arguments)
    except SlimdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    began, chosen = time.monotonic(), cells_of(arguments)
    if arguments.show:
        for file in sorted(arguments.work.glob("*/settings.json")):
            Cells(file.parent).show()
        return
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {arguments.device}: torch sees no GPU here; leave it out for the CPU")
    captions = arguments.captions or (1000 if arguments.model == "things" else 100 if arguments.ablation else 500)
    sampling = CALIBRATION.sampling.model_copy(update={"steps": arguments.steps})
    calibration = CALIBRATION.model_copy(update={"samples": arguments.samples, "sampling": sampling})
    world = WORLDS[arguments.model]()
    bench = Bench(world, captions, arguments.device, calibration)
    settings = {
        "world": arguments.model,
        "model": bench.model_hash,
        # What older code measured must not stand in a table of this one's.
        "code": [source_hash(Path(module.__path__[0])) for module in (slimdiff, exporters, benchmarks)],
        "captions": captions,
        "calibration": bench.calibration.model_dump(),
        "evaluation": bench.evaluation.model_dump(),
        "ablation": arguments.ablation,
        "machine": machine(arguments.device),
    }
    folder = bench.work = arguments.work / manifest.fingerprint(settings)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write_json(folder / "settings.json", settings)
    cells = Cells(folder)
    if arguments.model == "demo" and not arguments.ablation:
        time_cells(bench, cells, chosen)
    if "dense" not in cells.rows:
        cells.keep("dense", **bench.dense())
    for name, cut in chosen:
        key = cells.key(name, cut)
        if "noise_error" in cells.rows.get(key, {}):
            continue
        if (seconds := time.monotonic() - began) > 60 * arguments.minutes:
            print(f"stopped after {seconds:.0f} s: give the same command again to go on", file=sys.stderr)
            break
        try:
            figures = bench.measure(METHODS[name], cut)
        except (InputError, MissingPackageError) as reason:
            print(f"{METHODS[name].label}, {cut}: left out: {reason}", file=sys.stderr)
            continue
        cells.keep(key, method=name, cut=str(cut), whole=cut.whole, percent=cut.percent, **figures)
        print(f"[{time.monotonic() - began:.0f} s] {METHODS[name].label}, {cut}", file=sys.stderr, flush=True)
    cells.show()


def time_cells(bench: Bench, cells: Cells, chosen: list[tuple[str, Cut]]) -> None:
    """Timings first and together: whoever measures can leave the machine alone for these minutes."""
    from benchmarks.quality.speed import onnx_speedup

    for name, cut in chosen:
        method, key = METHODS[name], cells.key(name, cut)
        if method.baseline is None and "speedup" not in cells.rows.get(key, {}):
            about = {"method": name, "cut": str(cut), "whole": cut.whole, "percent": cut.percent}
            cells.keep(key, **about, speedup=onnx_speedup(bench, method, cut, cells.folder))


def machine(device: str) -> str:
    """What it runs on, and the versions that figures depend on."""
    import diffusers
    import transformers

    name = torch.cuda.get_device_name() if device != "cpu" else machine_name()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    versions |= {"transformers": transformers.__version__, "Python": platform.python_version()}
    return f"{name}; " + ", ".join(f"{package} {version}" for package, version in versions.items())


if __name__ == "__main__":
    sys.exit(main())
