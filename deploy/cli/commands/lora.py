"""`slimdiff lora`: a LoRA of a dense model converted onto its slim one."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from deploy.artifacts.numbers import size
from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import check_new_file
from slimdiff.errors import InputError, require
from slimdiff.loading.naming import check_lora, find_model
from slimdiff.prompts.material import Material
from slimdiff.settings import CalibrationSettings

DESCRIPTION = """Convert a LoRA of a dense model onto its slim one, in closed form: each update keeps its rank. It needs
the slim model's folder alone, for slim_maps.safetensors in it. The maps were chosen for the dense weights without the
LoRA; with --dense, what that costs is measured against slimming the dense model with the LoRA in it."""
EXAMPLE = """examples:
  slimdiff lora style.safetensors --onto slim --out slim-style.safetensors
  slimdiff generate slim --lora slim-style.safetensors:0.8 --prompt "..." --out styled.png
  slimdiff lora style.safetensors --onto slim --out slim-style.safetensors --dense my-checkpoint --samples 64"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "file", "FILE", "the LoRA: a safetensors file in diffusers', PEFT's or kohya's layout")
    flags.text(parser, "--onto", "DIR", "the slim model, as slimdiff compress or build wrote it", required=True)
    flags.text(parser, "--out", "FILE", "the safetensors file to write", required=True)
    flags.add_variant(parser)
    against = "the dense model: measure errors on its trajectories with the LoRA; it takes about as long as compress"
    flags.text(parser, "--dense", "DENSE", against)
    measured = parser.add_argument_group("what --dense is calibrated with, best as the slim model was")
    flags.add_calibration(measured)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_lora(Path(args.file))
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: name a file that ends in .safetensors")
    check_new_file(out, "LoRA file")
    folder = find_model(args.onto)
    calibration, variants = flags.read_calibration(args), flags.read_variants(args, args.onto, args.dense)
    material = Material()
    if args.dense is not None:
        material = flags.read_material(args, calibration.samples, calibration.sampling.batch, args.dense)[1]
    elif calibration != CalibrationSettings() or args.prompts or args.input_images or args.classes:
        raise InputError("prompts and sampling are those of a measurement: name the model with --dense")
    require("peft", "lora")

    calm_libraries()
    from slimdiff.conversion import conversion_error, convert_lora
    from slimdiff.loading.lora_files import read_lora

    if out.exists() and not read_lora(out).own:
        raise InputError(f"--out {out} is there and slimdiff lora did not write it: name another file")
    start = time.perf_counter()
    converted = convert_lora(args.file, folder or args.onto, variant=variants[args.onto])
    converted.save(out)
    log.info("lora: written to %s", out)
    error = None
    if args.dense is not None:
        error = conversion_error(out, args.file, args.onto, args.dense, material, calibration, variants=variants)
    value = {
        "out": str(out),
        "onto": args.onto,
        "layers": {"converted": len(converted.converted), "unchanged": len(converted.unchanged)},
        "bytes": out.stat().st_size,
        "made_from": converted.made_from,
        "error": error,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return result(args, value, _text(value))


def _text(value: dict[str, Any]) -> str:
    layers = value["layers"]
    counts = f"{layers['converted']} layers converted, {layers['unchanged']} as they were"
    lines = [f"{value['out']}: {counts}, {size(value['bytes'])}"]
    if value["error"]:
        said = {
            "converted": "slim with the converted LoRA, against dense with the LoRA",
            "slim_of_fused": "dense with the LoRA slimmed, against dense with the LoRA",
            "between": "the first against the second",
            "lora": "what the LoRA itself changes in the dense model",
        }
        lines.append("relative mean squared error of the noise prediction:")
        lines += [f"  {value['error'][name]:.3g}  {text}" for name, text in said.items()]
    return "\n".join(lines)
