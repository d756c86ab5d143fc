"""Every family of denoisers: tiny random members through calibration, plan, slim model, files and graph."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
    UNet1DModel,
)
from families import FAMILIES
from families.family import SAMPLING, TWO_LEVELS, Family, picture, quiet
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import slimdiff.models
from slimdiff import (
    Budget,
    CalibrationSettings,
    InputError,
    Plan,
    PlanSettings,
    Statistics,
    calibrate,
    compress,
    make_plan,
    slim_denoiser,
)
from slimdiff.calibration.calibrate import calibrate_on_calls, weights_hash
from slimdiff.compression import with_denoiser
from slimdiff.denoising.modules import exchanged
from slimdiff.denoising.replay import Replay
from slimdiff.denoising.trajectory import Call, denoiser_name, predict, record_calls, sample_images
from slimdiff.fidelity import noise_error
from slimdiff.groups import find_sites
from slimdiff.planning.costs import count_macs, count_parameters
from slimdiff.settings import TRANSFORMER_GROUPS
from slimdiff.slimming.slim import factorise


@dataclass
class Case:
    """One family's member with its statistics, recorded calls, and the plan and model of half rank everywhere."""

    family: Family
    pipeline: DiffusionPipeline | None
    dense: nn.Module
    calls: list[Call]
    statistics: Statistics
    plan: Plan
    slim: nn.Module


def with_rank(plan: Plan, share: float) -> Plan:
    plan = plan.model_copy(deep=True)
    for site in plan.sites.values():
        site.rank = max(1, round(site.dense_rank * share / site.multiple)) * site.multiple
    return plan.recount()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Case:
    return make_case(request.param)


@functools.cache
def make_case(name: str) -> Case:
    family = FAMILIES[name]
    torch.manual_seed(0)
    made = family.make()
    if family.calls:
        pipeline, dense, calls = None, made, family.calls()
        statistics = calibrate_on_calls(dense, calls)
    else:
        pipeline, dense = made, getattr(made, denoiser_name(made))
        calls = record_calls(pipeline, family.inputs, family.sampling)
        settings = CalibrationSettings(samples=2, sampling=family.sampling)
        statistics = calibrate(pipeline, family.inputs, settings)
    factors = factorise(dense, statistics, find_sites(dense)[0])
    uniform = PlanSettings(allocation="uniform", align=4)
    plan = with_rank(make_plan(dense, statistics, Budget("1%"), uniform), 0.5)
    slim = slim_denoiser(dense, statistics, plan, factors, fitting_calls=calls)
    return Case(family, pipeline, dense, calls, statistics, plan, slim)


class OfTensors(nn.Module):
    """A denoiser with tensors only, in and out: what a graph can have."""

    def __init__(self, denoiser: nn.Module, arguments: dict[str, Any]):
        super().__init__()
        self.denoiser = denoiser
        leaves, self.spec = tree_flatten(arguments)
        self.fixed = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.varying = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.inputs = tuple(leaves[i] for i in self.varying)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        leaves = list(self.fixed)
        for i, tensor in zip(self.varying, tensors, strict=True):
            leaves[i] = tensor
        return self.denoiser(**tree_unflatten(leaves, self.spec), return_dict=False)[0]


def test_sites_are_found_and_the_rest_has_reasons(case):
    sites, left_dense = find_sites(case.dense)
    assert Counter(s.group for s in sites) == case.family.sites
    assert Counter(d["reason"] for d in left_dense) == case.family.left_dense
    assert case.plan.left_dense == left_dense


def test_full_rank_reproduces_the_dense_model(case):
    slim = slim_denoiser(case.dense, case.statistics, with_rank(case.plan, 1.0))
    for call in case.calls:
        torch.testing.assert_close(predict(slim, call), predict(case.dense, call), atol=1e-5, rtol=1e-5)


def test_what_comes_before_a_change_need_not_run_again(case):
    paths = sorted({site.path for site in find_sites(case.dense)[0]})
    replay = Replay(case.dense, case.calls[0], paths)
    assert torch.equal(replay.output, predict(case.dense, case.calls[0]))
    moved = 0
    for path in (paths[0], paths[len(paths) // 2], paths[-1]):
        weights = {n: p * 0.5 for n, p in case.dense.get_submodule(path).named_parameters()}
        with exchanged(case.dense.get_submodule(path), weights):
            changed = predict(case.dense, case.calls[0])
            assert torch.equal(replay.predict(path), changed)
            moved += not torch.equal(changed, replay.output)
    assert moved >= 2  # what Qwen-Image's last block does to text reaches nothing
    assert any(replay.before(path) for path in paths)
    assert torch.equal(replay.output, predict(case.dense, case.calls[0]))


def test_half_rank_runs_and_costs_what_the_plan_says(case):
    assert case.plan.parameters["slim"] == count_parameters(case.slim) < count_parameters(case.dense)
    assert count_macs(case.slim, case.calls[0]) < count_macs(case.dense, case.calls[0])
    error = noise_error(lambda c: predict(case.dense, c), lambda c: predict(case.slim, c), case.calls)
    slims_resnets = any(s.group == "resnet" and s.rank < s.dense_rank for s in case.plan.sites.values())
    # Random resnets have no channels to spare, and a few calls do not show how to do without: the bound is loose there.
    assert 0 < error["relative_mse"] < (0.4 if slims_resnets else 0.1)
    assert [t for t, _ in error["by_timestep"]] == sorted({c.timestep for c in case.calls}, reverse=True)
    assert weights_hash(case.slim) != weights_hash(case.dense) == case.plan.model_hash


def test_slim_model_saves_and_loads_exactly(case, tmp_path):
    if case.pipeline is None:
        case.slim.save_pretrained(tmp_path)
        name = json.loads((tmp_path / "config.json").read_text())["_class_name"]
        loaded = getattr(slimdiff.models, name).from_pretrained(tmp_path)
    else:
        with_denoiser(case.pipeline, case.slim).save_pretrained(tmp_path)
        assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".py")]
        pipeline = DiffusionPipeline.from_pretrained(tmp_path)
        loaded = getattr(pipeline, denoiser_name(pipeline))
    assert type(loaded) is type(case.slim)
    assert loaded.config["slim_plan"]["sites"].keys() == case.plan.sites.keys()
    for call in case.calls:
        # Not bit for bit: which kernel runs depends on where in memory the loaded weights lie.
        torch.testing.assert_close(predict(loaded, call), predict(case.slim, call), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [name if name in ("pixart", "unconditional") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
    indirect=True,
)
def test_slim_model_becomes_a_graph(case, tmp_path):
    """Tracing takes most of it, a quarter to a minute for a UNet: but for two, `make test-slow` does it."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the graph is run in ONNX Runtime")
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    from exporters.graphs.export import export_module
    from exporters.settings import ExportSettings

    module = OfTensors(case.slim, case.calls[0].arguments)
    inputs = {f"input_{i}": tensor for i, tensor in enumerate(module.inputs)}
    file = export_module(module, inputs, ["output"], tmp_path, ExportSettings(), prefix="denoiser.")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    used = {node.name for node in session.get_inputs()}
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in used})[0]
    expected = predict(case.slim, case.calls[0])
    assert float((torch.from_numpy(found) - expected).norm() / expected.norm()) < 1e-5


def controlled() -> StableDiffusionControlNetPipeline:
    base = tiny_pipeline(**TWO_LEVELS)
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32)).eval()
    # A new ControlNet's outputs are zero: nothing of it would reach the UNet.
    for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(convolution.weight, std=0.1)
    pipeline = StableDiffusionControlNetPipeline(
        **base.components, controlnet=controlnet, requires_safety_checker=False
    )
    return quiet(pipeline)


def adapted() -> StableDiffusionAdapterPipeline:
    base = tiny_pipeline(**TWO_LEVELS)
    adapter = T2IAdapter(in_channels=3, channels=[32, 32], num_res_blocks=1, downscale_factor=2).eval()
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    return quiet(StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False))


@pytest.mark.parametrize(
    ("make", "residuals"),
    [(controlled, "down_block_additional_residuals"), (adapted, "down_intrablock_additional_residuals")],
)
def test_a_slim_unet_takes_what_controlnets_and_adapters_give(make, residuals, tmp_path):
    torch.manual_seed(0)
    pipeline = make()
    inputs = [{"prompt": p, "image": picture(i)} for i, p in enumerate(PROMPTS[:2])]
    sampling = SAMPLING.model_copy(update={"height": 16, "width": 16})
    made = compress(
        pipeline,
        inputs,
        Budget("5%"),
        calibration=CalibrationSettings(samples=2, sampling=sampling),
        planning=PlanSettings(align=4),
    )
    call = record_calls(pipeline, inputs, sampling)[0]
    assert residuals in call.arguments
    full = slim_denoiser(pipeline.unet, made.statistics, with_rank(made.plan, 1.0))
    torch.testing.assert_close(predict(full, call), predict(pipeline.unet, call), atol=1e-5, rtol=1e-5)
    without = Call(call.step, call.timestep, {k: v for k, v in call.arguments.items() if "residual" not in k})
    assert not torch.allclose(predict(made.pipeline.unet, call), predict(made.pipeline.unet, without), atol=1e-3)
    made.pipeline.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    images = [sample_images(p, inputs, sampling) for p in (made.pipeline, loaded)]
    assert [image.tobytes() for image in images[0]] == [image.tobytes() for image in images[1]]


@pytest.mark.parametrize("name", ["dit", "unconditional", "image-to-video"])
def test_compress_measures_sensitivities_for_every_kind_of_pipeline(name):
    torch.manual_seed(0)
    family = FAMILIES[name]
    pipeline = family.make()
    dense = getattr(pipeline, denoiser_name(pipeline))
    settings = CalibrationSettings(samples=2, sampling=family.sampling)
    planning = PlanSettings(align=4, sensitivity_calls=1, groups=(*TRANSFORMER_GROUPS, "resnet"))
    made = compress(pipeline, family.inputs, Budget("3%"), calibration=settings, planning=planning)
    wanted = Budget("3%").removed(count_parameters(dense))
    assert made.plan.parameters["dense"] - made.plan.parameters["slim"] >= wanted
    assert all(site.sensitivity is not None for site in made.plan.sites.values())
    assert len(sample_images(made.pipeline, family.inputs, family.sampling)) == len(family.inputs)


def test_a_configuration_with_keys_that_the_class_does_not_know():
    """Old checkpoints have some; diffusers keeps them, and the slim model must not choke on them."""
    family = FAMILIES["sd3"]
    dense, calls = family.make(), family.calls()
    dense.register_to_config(left_over=1)
    statistics = calibrate_on_calls(dense, calls)
    plan = make_plan(dense, statistics, Budget("1%"), PlanSettings(allocation="uniform"))
    slim = slim_denoiser(dense, statistics, plan, fitting_calls=calls)
    assert count_parameters(slim) == plan.parameters["slim"]


def test_a_model_without_anything_to_slim_and_code_of_ones_own_are_refused():
    with pytest.raises(InputError, match="UNet1DModel has nothing to slim: it has no attention or feed-forward"):
        calibrate_on_calls(UNet1DModel(sample_size=16), [Call(0, 1, {})])

    class Mine(type(FAMILIES["dit"].make().transformer)):
        """With code that nobody read."""

    mine = Mine(num_attention_heads=2, attention_head_dim=16, num_layers=1, sample_size=8, norm_num_groups=8)
    with pytest.raises(InputError, match="Mine is not a model of diffusers .*: models of its own are slimmed alone"):
        slimdiff.models.slim_class_of(mine)
    with pytest.raises(AttributeError, match="SlimSchedulerMixin"):
        _ = slimdiff.models.SlimSchedulerMixin
