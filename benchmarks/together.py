"""What ranks, int8 and a schedule are worth for the whole picture, alone and together.

`python -m benchmarks.together [--model things|demo] [--runtime onnxruntime,openvino] [--macs 30%]` prints a Markdown
table. Every artifact is made by the commands that a user gives, and is an ONNX folder. "Speedup" is of the whole
picture (text encoder, all steps by its schedule, VAE) against the dense model with its full schedule, as
`slimdiff bench --of image` has it; accuracy is what the world's judge reads back from pictures of held-out captions
that the artifact itself made, in the first runtime. With `--speedup S`, what is slim and has a schedule is made by
`slimdiff compress --speedup S --of image`, for the first runtime: both are then chosen, and the settings by hand are of
the other artifacts. What is there below `--work` is not made again.
"""

from __future__ import annotations

import argparse
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.worlds import WORLDS, World
from deploy.artifacts.schedules import find_schedule
from deploy.cli.app import main as slimdiff
from deploy.opening.openers import open_denoiser, whole_pipeline
from deploy.opening.schedules import with_schedule
from exporters.machine import machine_name
from slimdiff.denoising.trajectory import sample_images
from slimdiff.errors import SlimdiffError
from slimdiff.fidelity import image_fidelity
from slimdiff.schedule import FILE
from slimdiff.settings import Sampling
from slimdiff.storage import manifest

GROUPS = "query_key,value_output,feed_forward,resnet"


class Together:
    """The artifacts of one model."""

    def __init__(self, name: str, asked: argparse.Namespace) -> None:
        self.world: World = WORLDS[name]()
        self.asked, self.work = asked, asked.work / name
        self.work.mkdir(parents=True, exist_ok=True)
        self.captions = self.world.choose(asked.captions, "cpu")
        (self.work / "prompts.txt").write_text("\n".join(self.world.captions(asked.samples + 16, 0)) + "\n")
        self.sampling: Sampling = self.world.evaluation

    def command(self, *words: object) -> dict[str, Any]:
        """Run a command of slimdiff; gives its result.

        Raises:
            SlimdiffError: if it fails.
        """
        with redirect_stdout(StringIO()) as said:
            code = slimdiff([*map(str, words), "--json"])
        if code:
            raise SlimdiffError(f"slimdiff {' '.join(map(str, words))} ended with {code}")
        return json.loads(said.getvalue())

    def make(self, name: str) -> Path:
        """The ONNX folder of this name: words joined by +, of `dense`, `slim`, `int8` and `schedule`."""
        out, what = self.work / name, name.split("+")
        if out.is_dir():
            return out
        model, prompts = self.world.model, ["--prompts", self.work / "prompts.txt"]
        usage = ["--steps", self.sampling.steps, "--guidance", self.world.guidance]
        by: list[object] = []
        chosen = self.asked.speedup is not None and {"slim", "schedule"} <= {*what}
        if "schedule" in what and not chosen:
            file = self.work / FILE
            if not file.is_file():
                how = ["--guidance-interval", self.asked.guidance_interval, "--deep-every", self.asked.deep_every]
                self.command("schedule", model, *how, *usage, "--out", file)
            by = ["--schedule", file]
        if "slim" in what:
            slim = self.work / f"{name}-model"
            if not slim.is_dir():
                how = ["--macs", self.asked.macs, "--groups", GROUPS, "--samples", self.asked.samples, *usage, *by]
                if chosen:
                    where = ["--of", "image", "--runtime", self.asked.runtime.partition(",")[0], "--threads", 1]
                    how[:2] = ["--speedup", self.asked.speedup, *where]
                precision = ["--precision", "int8", "--int8-error", self.asked.int8_error] if "int8" in what else []
                said = self.command("compress", model, "--out", slim, *how, *precision, *prompts)
                manifest.write_json(self.work / f"{name}.json", said)
            model, by = str(slim), []
        rounded = ["--precision", "int8", "--int8-error", self.asked.int8_error] if "int8" in what else []
        self.command("export", model, "--out", out, *rounded, *(prompts if rounded else []), *by, *usage[2:])
        return out

    def bench(self, name: str, runtime: str) -> dict[str, float]:
        """Speedup of a whole picture."""
        paths = self.make("dense"), self.make(name)
        how = ["--of", "image", "--steps", self.sampling.steps, "--guidance", self.world.guidance]
        return self.command("bench", *paths, "--runtime", runtime, *how)["speedup"]

    def images(self, name: str, runtime: str) -> list[Any]:
        """What the artifact makes of the held-out captions."""
        place = str(self.make(name))
        opened = open_denoiser(place, runtime)
        pipeline = opened.pipeline or whole_pipeline(opened, place, None, None)
        sampling = opened.sampling(self.sampling, pipeline)
        pipeline, _ = with_schedule(pipeline, opened, find_schedule(place, None), None)
        short = -len(self.captions) % sampling.batch
        return sample_images(pipeline, self.captions + self.captions[:short], sampling)[: len(self.captions)]

    def accuracy(self, images: list[Any]) -> float:
        """Share of everything that captions name and pictures show, in percent."""
        hits = self.world.hits(np.stack([np.asarray(image) for image in images]))
        shown, named = np.concatenate(list(hits.values())).sum(0)
        return 100 * float(shown / named)


NAMES = ("slim", "int8", "schedule", "slim+schedule", "slim+int8", "slim+int8+schedule")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(WORLDS), default="things")
    parser.add_argument("--runtime", default="onnxruntime,openvino", help="one or several, with commas between")
    parser.add_argument("--macs", default="30%", help="that slim models lose")
    parser.add_argument("--speedup", type=float, help="of the image, that ranks and schedule are chosen for together")
    parser.add_argument("--guidance-interval", default="0.0:0.5", help="the guided part of a trajectory")
    parser.add_argument("--deep-every", type=int, default=3, help="how often the whole UNet runs")
    parser.add_argument("--int8-error", type=float, default=1e-3)
    parser.add_argument("--captions", type=int, default=200, help="pictures that are judged")
    parser.add_argument("--samples", type=int, default=64, help="prompts of the calibration")
    parser.add_argument("--only", default=",".join(NAMES), help="artifacts")
    parser.add_argument("--work", type=Path, default=Path("runs/together"))
    asked = parser.parse_args()
    work, runtimes = Together(asked.model, asked), asked.runtime.split(",")
    file = work.work / "rows.json"
    rows: dict[str, Any] = manifest.read_json(file) if file.is_file() else {}
    dense: list[Any] = []
    for name in ("dense", *asked.only.split(",")):
        row = rows.setdefault(name, {})
        if "accuracy" not in row:
            dense = dense or work.images("dense", runtimes[0])
            images = dense if name == "dense" else work.images(name, runtimes[0])
            psnr = None if name == "dense" else image_fidelity(dense, images)["psnr_db"]
            row |= {"accuracy": work.accuracy(images), "psnr_db": psnr}
            manifest.write_json(file, rows)
        for runtime in runtimes if name != "dense" else ():
            if runtime not in row:
                row[runtime] = work.bench(name, runtime)
                manifest.write_json(file, rows)
    print(f"\n{asked.model}, {work.sampling.steps} steps, {asked.captions} captions, one thread, {machine_name()}\n")
    print("\n".join(_table(rows, runtimes)))


def _table(rows: dict[str, Any], runtimes: list[str]) -> list[str]:
    lines = [f"| artifact | PSNR to dense | accuracy | points lost | {' | '.join(runtimes)} |"]
    lines += ["| --- " * (4 + len(runtimes)) + "|"]
    for name, row in rows.items():
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        lost = rows["dense"]["accuracy"] - row["accuracy"]
        took = ["{median:.3f} ({low:.3f} to {high:.3f})".format(**row[r]) if r in row else "1" for r in runtimes]
        lines.append(f"| {name} | {psnr} | {row['accuracy']:.1f} % | {lost:+.1f} | {' | '.join(took)} |")
    return lines


if __name__ == "__main__":
    main()
