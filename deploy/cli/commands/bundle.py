"""`slimdiff bundle`: what a machine needs to make images, in one folder or file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.artifacts.numbers import size
from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import artifact_folder, check_artifact, check_new_file, check_runnable
from exporters.registry import names
from exporters.settings import ExportSettings, parse_sizes
from slimdiff.errors import InputError, require
from slimdiff.settings import SteeringSettings
from slimdiff.storage import manifest

DESCRIPTION = """Write a folder with graphs or engines, tokenizer, scheduler, licences, a README with the command that
runs it, and a manifest of hashes, provenance and requirements; on request one file of it. A model is exported to ONNX
for that."""
EXAMPLE = """examples:
  slimdiff bundle demo --target edge --out circles
  slimdiff generate circles --prompt "a large red circle top left, on a gray background" --out circle.png

  slimdiff bundle my-build --target server --out my-server
  slimdiff bundle slim-onnx --target edge --out device --archive tar.zst
  slimdiff bundle slim-engines --pipeline slim --target edge --capability sm89 --out box
  slimdiff bundle slim-onnx --target server --triton --out my-server

edge    one denoiser for one runtime: the graph for OpenVINO, or what --runtime, --capability, --precision and
        --shape name; the VAE's decoder alone, unless images are made from images; no plans, no layers of engines, no
        settings of builds
server  every graph and engine of the source (or those that --precision, --shape and --capability name), each for all
        runtimes that may be there; the VAE's encoder too, for image to image; the source's whole provenance"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    source = "a model, an ONNX folder, an engine or several, or the folder of a finished build"
    flags.text(parser, "source", "ARTIFACT", source)
    parser.add_argument("--target", required=True, choices=("edge", "server"), help="the kind of machine; see below")
    flags.text(parser, "--out", "DIR", "where the bundle goes", required=True)
    parser.add_argument("--archive", choices=("tar.zst",), help="write DIR.tar.zst, too")
    parser.add_argument(
        "--triton", action="store_true", help="for servers: a Triton model repository, compose file and client, too"
    )
    flags.text(parser, "--pipeline", "MODEL", "whose other components go with a denoiser alone")
    flags.add_variant(parser)
    flags.add_steering(parser)
    flags.add_usage(parser, "guidance")
    flags.several(parser, "--shape", "BxHxW", "samples in a call (with guidance two per image), and pixels")
    flags.several(parser, "--precision", None, "of denoisers", choices=("fp32", "fp16", "int8"))
    flags.add(parser, ExportSettings, "keep_fp32", nargs="+", metavar="PATH")
    flags.add(parser, ExportSettings, "split")
    flags.several(parser, "--capability", "SM", "of engines, such as sm89")
    runs_in = "what the denoiser runs in (default for edge: OpenVINO, which computes in bf16 where the CPU does)"
    parser.add_argument("--runtime", choices=names()[1:], help=runs_in)
    unchecked = "leave the safety checker out, where the pipeline has one: no image is checked"
    parser.add_argument("--no-safety-checker", dest="safety_checker", action="store_false", help=unchecked)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if args.triton and args.target != "server":
        raise InputError("--triton is for servers: say --target server")
    steering = flags.read(args, SteeringSettings)
    if args.triton and steering:
        raise InputError("--triton serves text to image: leave out --controlnet, --adapter and --ip-adapter")
    check_artifact(out, "bundle")
    if args.archive:
        check_new_file(_archive(out), "archive of a bundle")
    shapes = [_shape(spec) for spec in args.shape]
    check_runnable(args.source, args.pipeline)
    variants = flags.read_variants(args, args.source, args.pipeline)
    require("onnx", "onnx")
    if args.archive:
        require("zstandard", "bundle")
    if args.triton:
        require("tritonclient", "triton")

    calm_libraries()
    from deploy.bundle.archive import pack
    from deploy.bundle.contents import choose, material_flags, write_bundle
    from deploy.bundle.sources import Selection, open_source

    denoisers = (shapes, args.precision, args.capability, args.runtime)
    used = flags.read_usage(args, args.source, args.pipeline)
    exports = flags.read(args, ExportSettings)
    how: Any = {"keep_fp32": exports.keep_fp32, "split": exports.split, "steering": steering}
    selection = Selection(args.target, *denoisers, args.safety_checker, used.guidance, variants, **how)
    source = open_source(args.source, args.pipeline, selection)
    taken, left = choose(source, selection)
    log.info("bundle: %s for %s", ", ".join(c.name for c in taken), args.target)
    if left:
        log.info("bundle: left out are %s", ", ".join(c.name for c in left))
    with artifact_folder(out, "bundle") as temporary:
        description = write_bundle(source, taken, temporary, selection, triton=args.triton)
        files = manifest.read_manifest(temporary)["files"]
    archive = _archive(out) if args.archive else None
    if archive:
        pack(out, archive)
    value = {
        "out": str(out),
        "archive": archive and str(archive),
        "triton": "triton" if args.triton else None,
        "source": source.kind,
        **description.model_dump(),
        "left_out": [c.name for c in left],
        "files": len(files),
        "bytes": sum(entry["bytes"] for entry in files.values()),
    }
    return result(args, value, _text(value, description, material_flags(source.rest, "TEXT")))


def _archive(out: Path) -> Path:
    from deploy.bundle.archive import SUFFIX

    return out.parent / f"{out.resolve().name}{SUFFIX}"


def _shape(spec: str) -> tuple[int, int, int]:
    sizes = parse_sizes(spec)
    if sizes is None or len(sizes) != 3 or 0 in sizes:
        raise InputError(f"--shape is samples, height and width in pixels, such as 2x512x512, not {spec!r}")
    batch, height, width = sizes
    return batch, height, width


def _text(value: dict[str, Any], description: Any, material: str) -> str:
    lines = [f"{value['out']}: {value['target']}, {value['files']} files, {size(value['bytes'])}"]
    lines += [f"  {denoiser}, runs in {', '.join(denoiser.runtimes)}" for denoiser in description.denoisers]
    lines += [f"Triton: docker compose up --build, in {value['out']}/{value['triton']}"] * bool(value["triton"])
    lines += [f"archive: {value['archive']}"] * bool(value["archive"])
    needs = " ".join(f"'{name}{version}'" for name, version in value["packages"].items())
    command = " ".join(filter(None, ["slimdiff generate", value["out"], material, "--out image.png"]))
    return "\n".join([*lines, f"needs {needs}", f"try: {command}"])
