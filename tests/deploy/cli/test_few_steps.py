"""Models that are distilled for few steps: calibrated, exported and run as they are used, without a second half."""

from __future__ import annotations

import json

import pytest
from command_line import call, refused
from conftest import tiny_pipeline
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler

from deploy.artifacts.usage import said_of, usage_of, use
from deploy.bundle.rest import TorchRest
from deploy.cli.app import main
from deploy.opening.distilled import sign_of_distillation
from deploy.recipe.recipe import make_recipe
from exporters.graphs.pipeline import example_call
from exporters.graphs.reading import inputs_of, read_graph
from slimdiff.errors import InputError
from slimdiff.planning.costs import batch_of
from slimdiff.settings import Sampling

FEW = ["--steps", 1, "--guidance", 0]
CALIBRATION = ["--reduce", "5%", "--samples", 2, "--prompts"]


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-turbo"
    pipeline = tiny_pipeline()
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.save_pretrained(folder)
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue star\na green ring\n")
    return folder, prompts


@pytest.mark.parametrize(("guidance", "samples"), [(0, 1), (1, 1), (1.5, 2), (5, 2)])
def test_a_call_has_the_second_half_where_guidance_is_above_one(guidance, samples):
    assert batch_of(example_call(tiny_pipeline(), guidance=guidance)) == samples


def test_what_is_made_of_a_few_step_model_is_run_as_it_was_calibrated(turbo, tmp_path, capsys):
    model, prompts = turbo
    slim, onnx, edge = tmp_path / "slim", tmp_path / "onnx", tmp_path / "edge"
    call(["compress", model, "--out", slim, *CALIBRATION, prompts, *FEW], capsys)
    assert usage_of(str(slim)) == {"steps": 1, "guidance": 0.0}
    call(["export", slim, "--out", onnx], capsys)
    assert inputs_of(read_graph(onnx / "unet" / "model.onnx"))["sample"].shape[0] == 1
    assert call(["validate", slim, onnx, "--no-image"], capsys)["timesteps"] == [999]
    call(["bundle", onnx, "--target", "edge", "--out", edge], capsys)
    pictures = {}
    for name in (slim, onnx, edge):
        image = call(["generate", name, "--prompt", "a red circle", "--out", tmp_path / f"{name.name}.png"], capsys)
        pictures[name.name] = {key: image[key] for key in ("steps", "guidance")}
    assert pictures == dict.fromkeys(("slim", "onnx", "edge"), {"steps": 1, "guidance": 0.0})
    other = ["--steps", 2, "--guidance", 1]  # what is said counts
    image = call(["generate", onnx, "--prompt", "a red circle", "--out", tmp_path / "other.png", *other], capsys)
    assert (image["steps"], image["guidance"]) == (2, 1.0)
    compared = call(["compare", model, slim, "--prompts", prompts, "--images", 1], capsys)
    assert [t for t, _ in compared["noise_error"]["by_timestep"]] == [999]


@pytest.mark.slow
def test_a_dense_models_graph_keeps_the_guidance_that_it_was_exported_for(turbo, tmp_path, capsys):
    onnx = tmp_path / "onnx"
    call(["export", turbo[0], "--out", onnx, "--guidance", 0], capsys)
    image = call(["generate", onnx, "--prompt", "a red circle", "--out", tmp_path / "a.png", "--steps", 1], capsys)
    assert image["guidance"] == 0


@pytest.mark.slow
def test_a_bundle_of_a_dense_model_is_for_one_samples_calls_without_guidance(turbo, tmp_path, capsys):
    found = call(["bundle", turbo[0], "--target", "edge", "--out", tmp_path / "edge", "--guidance", 1], capsys)
    assert [denoiser["batch"] for denoiser in found["denoisers"]] == [1]


def test_a_model_calibrated_at_defaults_says_nothing_of_its_use():
    assert said_of(Sampling()) == {}
    assert said_of(Sampling(seed=1, steps=3), Sampling(steps=9, guidance=2)) == {
        "sampling": {"steps": 3, "guidance": 2}
    }
    assert use(Sampling(steps=2), {"steps": 1, "guidance": 0}) == Sampling(steps=2, guidance=0)


@pytest.mark.parametrize(
    "made_from",
    [
        {"sampling": {"guidance": 0.0}},
        {"settings": {"sampling": {"guidance": 0.0}}},
        {"onnx": {"sampling": {"guidance": 0.0}}},
        {"made_from": {"settings": {"sampling": {"guidance": 0.0}}}},
    ],
)
def test_use_is_found_in_every_kind_of_manifest(made_from, tmp_path):
    content = {"schema": 1, "kind": "onnx", "files": {}, "versions": {}, "runs_on": {}, "made_from": made_from}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert usage_of(None, "no-such-folder", str(tmp_path)) == {"guidance": 0.0}


@pytest.mark.slow
def test_a_scheduler_that_was_said_goes_along(turbo, tmp_path, capsys):
    model, prompts = turbo
    slim = tmp_path / "slim"
    call(["compress", model, "--out", slim, *CALIBRATION, prompts, *FEW, "--scheduler", "lcm"], capsys)
    assert usage_of(str(slim)) == {"steps": 1, "guidance": 0.0, "scheduler": "lcm"}
    flags = ["generate", slim, "--prompt", "a red circle", "--out", tmp_path / "image.png"]
    assert call(flags, capsys)["scheduler"] == "lcm"
    assert call([*flags, "--scheduler", "ddim"], capsys)["scheduler"] == "ddim"
    rest = TorchRest(str(slim))
    assert type(rest.pipeline.scheduler) is LCMScheduler
    assert rest.pipeline.config["scheduler"] == ("diffusers", "LCMScheduler")


def test_a_recipe_compares_as_it_calibrates_unless_it_says_otherwise(tmp_path):
    def compared(**content):
        return make_recipe({"model": "demo", **content}, "recipe.yaml", tmp_path).compare.sampling

    few = {"sampling": {"steps": 1, "guidance": 0}}
    assert (compared().steps, compared().guidance, compared().seed) == (25, 5.0, 10_000)
    few_step = compared(calibration=few)
    assert (few_step.steps, few_step.guidance, few_step.seed) == (1, 0.0, 10_000)
    other = compared(calibration=few, compare={"sampling": {"steps": 2}})
    assert (other.steps, other.guidance) == (2, 0.0)


def test_a_distilled_model_is_known_by_its_unet_scheduler_or_name():
    pipeline = tiny_pipeline()
    assert sign_of_distillation(pipeline, "my/hyperrealistic-model") is None
    for name in ("sd-turbo", "stabilityai/sdxl-turbo", "SDXL-Lightning-4step", "Hyper-SD15", "lcm_dreamshaper"):
        assert "its name" in str(sign_of_distillation(pipeline, name))
    pipeline.scheduler = LCMScheduler()
    assert "LCMScheduler" in str(sign_of_distillation(pipeline, "model"))
    embedded = tiny_pipeline()
    embedded.unet.register_to_config(time_cond_proj_dim=16)
    assert "time_cond_proj_dim" in str(sign_of_distillation(embedded, "model"))


def test_a_distilled_model_at_default_steps_is_a_warning(turbo, tmp_path, capsys):
    model, prompts = turbo
    arguments = ["calibrate", model, "--out", tmp_path / "s.safetensors", "--samples", 2, "--prompts", prompts]
    said = []
    for more in (["--steps", 1], FEW):
        assert main([*map(str, [*arguments, *more]), "--quiet"]) == 0
        said.append(capsys.readouterr().err)
    assert "looks distilled for few steps (its name says turbo), and is calibrated with guidance 5, the def" in said[0]
    assert "distilled" not in said[1]


@pytest.mark.parametrize(("flags", "samples"), [([], 2), (["--guidance", 0], 1), (["--guidance", 0, "--batch", 4], 4)])
def test_a_latency_is_of_one_image_at_the_guidance_it_is_used_with(flags, samples, turbo, monkeypatch, capsys):
    seen = []

    def bench(base, candidate, settings, **_):
        seen.append(settings.batch)
        raise InputError("seen")

    monkeypatch.setattr("exporters.latency.measure.bench", bench)
    refused(["bench", turbo[0], turbo[0], "--runtime", "torch", *flags], capsys)
    assert seen == [samples]
