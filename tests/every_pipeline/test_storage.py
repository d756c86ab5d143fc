"""Every way of storing a pipeline: each component comes back whole, in the dtype of its files."""

from __future__ import annotations

import json

import pytest
import torch

from deploy.cli.app import main
from every_pipeline.members import CannotBeMadeError, make_member, pipeline_names
from every_pipeline.test_every_pipeline import assert_same, state_of
from slimdiff import load_pipeline
from slimdiff.denoising.trajectory import denoiser_name

QUICK = {"StableDiffusionPipeline", "StableDiffusion3Pipeline"}
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in pipeline_names()]


def whole(pipeline, folder, **how):
    pipeline.save_pretrained(folder, **how)
    return folder


def both_variants(pipeline, folder):
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    return whole(pipeline.to(torch.float32), folder)


def in_hub_cache(pipeline, folder):
    """As the hub's library lays it: `snapshots/<revision>` of links into `blobs`."""
    repository, revision = folder / "hub" / "models--org--name", "0" * 40
    snapshot = repository / "snapshots" / revision
    pipeline.save_pretrained(folder / "saved")
    for number, file in enumerate(sorted(p for p in (folder / "saved").rglob("*") if p.is_file())):
        link, blob = snapshot / file.relative_to(folder / "saved"), repository / "blobs" / f"{number:040}"
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(blob)
    return snapshot


def in_dtype(dtype):
    return lambda pipeline, folder: whole(pipeline.to(dtype), folder)


def mixed(pipeline, folder):
    for part in ("vae", "text_encoder"):
        if isinstance(getattr(pipeline, part, None), torch.nn.Module):
            getattr(pipeline, part).to(torch.float16)
    return whole(pipeline, folder)


FORMATS = {
    "fp32": whole,
    "fp16": in_dtype(torch.float16),
    "bf16": in_dtype(torch.bfloat16),
    "mixed": mixed,
    "variant": lambda pipeline, folder: whole(pipeline.to(torch.float16), folder, variant="fp16"),
    "both variants": both_variants,
    "shards": lambda pipeline, folder: whole(pipeline, folder, max_shard_size="20KB"),
    "hub cache": in_hub_cache,
}


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("name", EVERY)
def test_every_component_comes_back_whole(name, how, tmp_path):
    try:
        member = make_member(name)
    except CannotBeMadeError as error:
        pytest.skip(str(error))
    if name == "KarrasVePipeline":
        pytest.skip("diffusers saves the place of its scheduler so that nothing finds it")
    folder = FORMATS[how](member, tmp_path)
    loaded = load_pipeline(folder)
    parts = {part: module for part, module in member.components.items() if isinstance(module, torch.nn.Module)}
    assert_same({part: state_of(module) for part, module in parts.items()}, loaded)
    assert type(loaded) is type(member)


# T5, which Stable Diffusion 3 has, computes with some weights in float32 whatever its files hold.
SLOWLY = {"fp32", "bf16", "mixed", "both variants"}
HELD = [
    *(pytest.param("StableDiffusionPipeline", how, marks=pytest.mark.slow if how in SLOWLY else ()) for how in FORMATS),
    ("StableDiffusion3Pipeline", "fp16"),
]


@pytest.mark.parametrize(("name", "how"), HELD)
def test_a_slim_model_keeps_what_its_files_held(name, how, tmp_path, capsys):
    member = make_member(name)
    model, slim, image = FORMATS[how](member, tmp_path / "in"), tmp_path / "slim", tmp_path / "image.png"
    run = ["compress", model, "--out", slim, "--reduce", "5%", "--samples", 2, "--steps", 2, "--json"]
    assert main([str(one) for one in run]) == 0
    figures = json.loads(capsys.readouterr().out)["bytes"]
    own = denoiser_name(member)
    denoiser, loaded = member.components[own], load_pipeline(slim)
    assert {p.dtype for p in loaded.components[own].parameters()} == {p.dtype for p in denoiser.parameters()}
    held = sum(p.stat().st_size for p in (slim / own).glob("*.safetensors"))
    assert 0.9 * held < figures["slim"] <= held
    assert figures["dense"] == sum(t.nbytes for t in denoiser.state_dict().values())
    others = {n: part for n, part in member.components.items() if isinstance(part, torch.nn.Module) and n != own}
    assert_same({name: state_of(part) for name, part in others.items()}, loaded)
    assert main(["generate", str(slim), "--prompt", "a circle", "--steps", "2", "--out", str(image), "-q"]) == 0
