"""Calibrate, plan, slim on a real tiny pipeline: what must hold whatever the figures are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import PROMPTS, SAMPLING, tiny_unet
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors import safe_open

from slimdiff import Budget, InputError, Plan, PlanSettings, Statistics, compress, make_plan, slim_denoiser
from slimdiff.calibration.calibrate import calibrate
from slimdiff.denoising.modules import exchanged
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Evidence
from slimdiff.planning.costs import count_macs, count_parameters
from slimdiff.planning.sensitivity import measure_sensitivities
from slimdiff.settings import PAPERS, TRANSFORMER_GROUPS, Forms
from slimdiff.slimming.slim import factorise


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def statistics(compression):
    return compression.statistics


def error(dense, slim, calls) -> float:
    return noise_error(lambda c: predict(dense, c), lambda c: predict(slim, c), calls)["relative_mse"]


def with_rank(plan: Plan, share: float) -> Plan:
    """Every site of a transformer block at a share of its dense rank."""
    plan = plan.model_copy(deep=True)
    for site in plan.sites.values():
        if site.group in TRANSFORMER_GROUPS:
            site.rank = max(1, round(site.dense_rank * share))
    return plan


def test_dense_model_scores_zero_against_itself(pipeline, calls):
    assert error(pipeline.unet, pipeline.unet, calls) == 0


def test_full_rank_reproduces_the_dense_model(pipeline, compression, statistics, calls):
    slim = slim_denoiser(pipeline.unet, statistics, with_rank(compression.plan, 1.0))
    for call in calls:
        torch.testing.assert_close(predict(slim, call), predict(pipeline.unet, call), atol=1e-5, rtol=1e-5)


def test_error_falls_as_rank_rises(pipeline, compression, statistics, calls):
    errors = [
        error(
            pipeline.unet,
            slim_denoiser(pipeline.unet, statistics, with_rank(compression.plan, s), fitting_calls=calls),
            calls,
        )
        for s in (0.25, 0.5, 0.75, 0.97)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("forms", [Forms().local(), PAPERS], ids=["ours", "papers"])
@pytest.mark.parametrize("group", ["query_key", "value_output", "feed_forward"])
def test_slim_weights_compute_what_the_emulation_measured(pipeline, compression, statistics, calls, group, forms):
    """One site alone in dense shapes, and the same site in a slim model whose other half is exact, must agree."""
    sites, _ = find_sites(pipeline.unet)
    site = next(s for s in sites if s.group == group and "attn2" not in s.path)
    rank = site.dense_rank // 2
    factors = factorise(pipeline.unet, statistics, sites, forms=forms)
    plan = with_rank(compression.plan, 1.0).model_copy(update={"forms": forms})
    for other in plan.sites.values():
        if other.path == site.path:
            other.rank = rank
    slim = slim_denoiser(pipeline.unet, statistics, plan, factors)
    module = pipeline.unet.get_submodule(site.path)
    partners = [s for s in sites if s.path == site.path]
    emulated = copy.deepcopy(pipeline.unet)
    for partner in partners:
        weights = GROUPS[partner.group].emulate(
            Evidence(module, partner, statistics, forms), rank, factors[partner.name]
        )
        for name, tensor in weights.items():
            parameter = emulated.get_parameter(f"{site.path}.{name}")
            parameter.data = tensor.to(parameter)
    for call in calls[:2]:
        torch.testing.assert_close(predict(slim, call), predict(emulated, call), atol=2e-5, rtol=1e-4)


def test_global_allocation_beats_uniform(pipeline, statistics, calls):
    errors = {}
    for allocation in ("uniform", "global"):
        settings = PlanSettings(allocation=allocation, align=4)
        plan = make_plan(pipeline.unet, statistics, Budget("10%"), settings, calls=calls[:4])
        slim = slim_denoiser(pipeline.unet, statistics, plan, fitting_calls=calls)
        errors[allocation] = error(pipeline.unet, slim, calls)
    assert errors["global"] < errors["uniform"]


@pytest.mark.parametrize("budget", ["5%", "-150k", "20%"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_budget_is_met_and_the_prediction_is_the_files(pipeline, statistics, calls, tmp_path, budget, allocation):
    settings = PlanSettings(allocation=allocation, align=4)
    plan = make_plan(pipeline.unet, statistics, Budget(budget), settings, calls=calls[:1])
    slim = slim_denoiser(pipeline.unet, statistics, plan, fitting_calls=calls[:2])
    dense = count_parameters(pipeline.unet)
    wanted = Budget(budget).removed(dense)
    assert wanted <= dense - plan.parameters["slim"] <= 1.005 * wanted
    assert all(s.rank % 4 == 0 for s in plan.sites.values())
    slim.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(k).numel() for k in file.keys())  # noqa: SIM118
    assert stored == plan.parameters["slim"] == count_parameters(slim)


def test_dense_model_is_left_as_it_was(pipeline, calibration, calls):
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    compress(pipeline, PROMPTS, Budget("5%"), calibration=calibration, planning=PlanSettings(align=4))
    after = pipeline.unet.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not pipeline.unet._forward_hooks and type(pipeline.unet).__name__ == "UNet2DConditionModel"


def test_slim_pipeline_saves_loads_and_makes_the_same_image(compression, slim_directory):
    index = json.loads((slim_directory / "model_index.json").read_text())
    assert index["unet"] == ["slimdiff.models", "SlimUNet2DConditionModel"]
    assert not [p for p in slim_directory.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".py")]
    loaded = DiffusionPipeline.from_pretrained(slim_directory)
    assert type(loaded.unet).__name__ == "SlimUNet2DConditionModel"
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": 2, "output_type": "pt"}
    images = [p(**arguments, generator=torch.Generator().manual_seed(3)).images for p in (compression.pipeline, loaded)]
    torch.testing.assert_close(images[0], images[1])
    assert loaded.unet.config["slim_plan"]["sites"].keys() == compression.plan.sites.keys()


def test_every_stock_processor_agrees(compression, calls):
    slim = copy.deepcopy(compression.pipeline.unet)
    slim.set_attn_processor(AttnProcessor2_0())
    expected = predict(slim, calls[0])
    slim.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(predict(slim, calls[0]), expected, atol=1e-5, rtol=1e-4)
    slim.set_attention_slice("max")
    torch.testing.assert_close(predict(slim, calls[0]), expected, atol=1e-5, rtol=1e-4)
    slim.set_attn_processor(AttnProcessor2_0())
    slim.fuse_qkv_projections()
    torch.testing.assert_close(predict(slim, calls[0]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(compression, calls, dtype):
    expected = predict(compression.pipeline.unet, calls[0])
    half = copy.deepcopy(compression.pipeline.unet).to(dtype)
    result = predict(half, calls[0])
    assert float((result - expected).norm() / expected.norm()) < (0.005 if dtype == torch.float16 else 0.04)


def test_compiles_without_a_graph_break(compression, calls):
    # The eager backend runs what the tracer saw: whether code can be generated from it is torch's business, not ours.
    slim = compression.pipeline.unet
    compiled = torch.compile(slim, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(predict(compiled, calls[0]), predict(slim, calls[0]), atol=1e-5, rtol=1e-4)


def test_fewer_parameters_are_fewer_macs(pipeline, compression, calls):
    assert count_macs(compression.pipeline.unet, calls[0]) < count_macs(pipeline.unet, calls[0])


def test_sensitivity_sees_what_a_site_does(pipeline, statistics, calls):
    """A site whose output is multiplied by zero cannot matter."""
    unet = copy.deepcopy(pipeline.unet)
    sites, _ = find_sites(unet)
    site = next(s for s in sites if s.group == "feed_forward")
    down = unet.get_submodule(site.path).net[2]
    torch.nn.init.zeros_(down.weight)
    factors = factorise(pipeline.unet, statistics, [site])
    found = measure_sensitivities(pipeline.unet, statistics, [site], factors, calls[:2])
    assert found[site.name] > 0
    with exchanged(pipeline.unet.get_submodule(site.path), {"net.2.weight": torch.zeros_like(down.weight)}):
        silent = measure_sensitivities(pipeline.unet, statistics, [site], factors, calls[:2])
    assert found[site.name] != silent[site.name]


def test_statistics_survive_a_file_and_a_plan_survives_an_edit(pipeline, compression, statistics, tmp_path, calls):
    statistics.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    compression.plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    name = next(n for n, s in content["sites"].items() if s["group"] == "feed_forward")
    content["sites"][name]["rank"] -= 4
    (tmp_path / "plan.json").write_text(json.dumps(content))
    edited = Plan.load(tmp_path / "plan.json")
    slim = slim_denoiser(pipeline.unet, again, edited, fitting_calls=calls[:2])
    assert count_parameters(slim) == compression.plan.parameters["slim"] - 4 * edited.sites[name].cost
    assert count_parameters(slim) == slim.config["slim_plan"]["parameters"]["slim"]


def edit(plan: Plan, **changes) -> dict:
    content = plan.model_dump(mode="json")
    next(iter(content["sites"].values())).update(changes)
    return content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 999}, "keeps rank 999, but the dense model has"),
        ({"rank": 1}, "must keep the same rank"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"path": "nowhere"}, "must be named"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_an_edited_plan_that_is_wrong_is_refused(compression, changes, message):
    with pytest.raises(InputError, match=message):
        Plan.parse(edit(compression.plan, **changes), "plan.json")


@pytest.mark.parametrize("text", ["0", "100%", "10M", "lots", "-0%", "5 apples", ""])
def test_an_impossible_budget_is_refused(pipeline, statistics, calls, text):
    with pytest.raises(InputError, match="budget"):
        make_plan(pipeline.unet, statistics, Budget(text), PlanSettings(align=4), calls=calls[:1])


def test_more_than_the_sites_hold_is_refused_with_what_they_hold(pipeline, statistics, calls):
    with pytest.raises(InputError, match="at most"):
        make_plan(pipeline.unet, statistics, Budget("90%"), PlanSettings(align=4), calls=calls[:1])


def test_statistics_of_other_weights_are_refused(fresh_pipeline, statistics, compression):
    fresh_pipeline.unet.conv_in.weight.data *= 1.01
    with pytest.raises(InputError, match="another model"):
        slim_denoiser(fresh_pipeline.unet, statistics, compression.plan)


def test_slimming_twice_is_refused(compression, calibration):
    with pytest.raises(InputError, match="slim already"):
        compress(compression.pipeline, PROMPTS, Budget("5%"), calibration=calibration)


def test_no_prompts(pipeline, calibration):
    with pytest.raises(InputError, match="no prompt"):
        calibrate(pipeline, [], calibration)


def test_nothing_to_slim(fresh_pipeline, calibration):
    plain = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3, "mid_block_type": None}
    fresh_pipeline.unet = tiny_unet(**plain)
    with pytest.raises(InputError, match="nothing to slim in query_key.*: this model has sites in resnet"):
        compress(fresh_pipeline, PROMPTS, Budget("5%"), calibration=calibration)
    fresh_pipeline.unet = tiny_unet(**plain, block_out_channels=(32, 32, 32), norm_num_groups=32)
    with pytest.raises(InputError, match="nothing to slim"):
        calibrate(fresh_pipeline, PROMPTS, calibration)


def test_calibration_does_not_depend_on_the_batch_size(pipeline, calibration, statistics):
    other = calibration.model_copy(update={"sampling": SAMPLING.model_copy(update={"batch": 4})})
    again = calibrate(pipeline, PROMPTS, other)
    for name in statistics.moments:
        torch.testing.assert_close(again.mean(name), statistics.mean(name), atol=1e-4, rtol=1e-3)


def test_moments_that_are_not_finite_are_named(statistics):
    name = next(iter(statistics.moments))
    nothing = torch.full_like(statistics.moments[name], torch.nan)
    broken = Statistics("", {name: nothing}, statistics.firsts, tokens=statistics.tokens, weights=statistics.weights)
    with pytest.raises(InputError, match="not finite"):
        broken.mean(name)
