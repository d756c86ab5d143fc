"""`slimdiff prompts`: a compact calibration set out of a large file of prompts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import check_new_file
from deploy.recipe.prompts import all_prompts
from slimdiff.errors import InputError
from slimdiff.loading.naming import find_model
from slimdiff.storage import manifest

DESCRIPTION = """Select prompts out of a large file so that their embeddings, by the model's own text encoders, have
the moments of all of it. The same input gives the same output, in the order of the file."""
EXAMPLE = """examples:
  slimdiff prompts select many.txt --count 500 --model my-checkpoint --out prompts.txt
  slimdiff compress my-checkpoint --out slim --reduce 100M --prompts prompts.txt --samples 500"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="select", choices=("select",), help="what to do with the file")
    flags.text(parser, "file", "FILE", "prompts, one a line; what is there twice counts once")
    flags.whole(parser, "--count", "how many to select", required=True)
    flags.text(parser, "--out", "FILE", "the text file to write, one prompt a line", required=True)
    flags.text(
        parser, "--model", "MODEL", "whose text encoders: 'demo', a directory, a file or a hub id", required=True
    )
    flags.add_variant(parser)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_new_file(out, "text file")
    prompts = list(dict.fromkeys(all_prompts(args.file)))
    if args.count > len(prompts):
        raise InputError(f"--count {args.count}: {args.file} holds {len(prompts)} different prompts, ask for 1 to that")
    find_model(args.model)
    variant = flags.read_variants(args, args.model)[args.model]

    calm_libraries()
    import torch

    from slimdiff.loading.pipelines import load_pipeline
    from slimdiff.prompts.selection import embed, moment_error, select

    start = time.perf_counter()
    pipeline = load_pipeline(args.model, "fp32", variant=variant, without=("unet", "transformer", "vae"))
    embeddings = embed(pipeline, prompts)
    log.info("prompts: selecting %d of %d", args.count, len(prompts))
    chosen = sorted(select(embeddings, args.count))
    by_chance = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))[: args.count].tolist()
    with manifest.replacing(out.absolute(), is_file=True) as temporary:
        temporary.write_text("".join(f"{prompts[i]}\n" for i in chosen), encoding="utf-8")
    error = {"selected": moment_error(embeddings, chosen), "random": moment_error(embeddings, by_chance)}
    seconds = round(time.perf_counter() - start, 3)
    value = {"out": str(out), "selected": len(chosen), "of": len(prompts), "moment_error": error, "seconds": seconds}
    text = (
        f"{out}: {len(chosen)} of {len(prompts)} prompts in {seconds:.1f} s\n"
        f"their embeddings' moments are off by {error['selected']:.1%} (a random pick's by {error['random']:.1%})"
    )
    return result(args, value, text)
