"""Statistics: what is summed, kept, selected, merged, dealt out, interrupted."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, SAMPLING
from diffusers import FlowMatchEulerDiscreteScheduler

from slimdiff import Budget, CalibrationSettings, InputError, PlanSettings, Statistics, calibrate, slim_denoiser
from slimdiff.calibration import calibrate as calibration_module
from slimdiff.calibration import turns as turns_module
from slimdiff.calibration.calibrate import calibrate_on_calls
from slimdiff.calibration.turns import split_into_turns
from slimdiff.compression import Compressor
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.groups import GROUPS, find_sites
from slimdiff.planning.planner import Planner
from slimdiff.settings import TRANSFORMER_GROUPS, StatisticsSettings
from slimdiff.statistics import STRIP, triangle_size

SPREAD = CalibrationSettings(samples=4, sampling=SAMPLING, tokens_per_dimension=2)


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def whole(pipeline, calibration) -> Statistics:
    return calibrate(pipeline, PROMPTS, calibration)


def assert_same(one: Statistics, other: Statistics, rtol: float = 1e-5) -> None:
    assert (
        one.tokens == other.tokens and set(one.moments) == set(other.moments) and set(one.firsts) == set(other.firsts)
    )
    for name in one.moments:
        scale = float(one.mean(name).abs().max())
        torch.testing.assert_close(other.mean(name), one.mean(name), atol=rtol * scale, rtol=0)
    for name in one.firsts:
        scale = float(one.mean(name).abs().max()) ** 0.5
        torch.testing.assert_close(other.first(name), one.first(name), atol=rtol * scale, rtol=0)


@pytest.mark.parametrize("width", [8, STRIP, 2 * STRIP + 40])
def test_a_triangle_is_the_whole_moment_in_about_half_the_memory(width):
    rows = torch.randn(3, 50, width, generator=torch.Generator().manual_seed(0)) + 0.5
    statistics = Statistics("")
    for part, weight in zip(rows, (1.0, 2.0, 0.5), strict=True):
        statistics.add_rows("site", part, weight)
    wide = rows.double() * torch.tensor([1.0, 2.0, 0.5]).double()[:, None, None]
    expected = torch.einsum("btn,btm->nm", wide, rows.double()) / (3.5 * 50)
    found = statistics.mean("site")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, found.T) and found.dtype == torch.float64
    torch.testing.assert_close(statistics.first("site"), wide.sum((0, 1)) / (3.5 * 50), atol=1e-6, rtol=1e-5)
    assert len(statistics.moments["site"]) == triangle_size(width) <= (width + STRIP) * width / 2 + width


def test_first_moments_belong_to_the_second_moments(whole):
    """A covariance has no negative variances."""
    for name in whole.firsts:
        variances = whole.mean(name).diagonal() - whole.first(name).square()
        assert float(variances.min()) > -1e-6 * float(variances.max())


def test_a_file_is_read_by_name_and_equal(whole, tmp_path):
    whole.sensitivities, whole.macs = {"a": 0.5}, {"": 3.0}
    whole.save(tmp_path / "s.safetensors")
    whole.sensitivities, whole.macs = {}, {}
    again = Statistics.load(tmp_path / "s.safetensors")
    assert_same(whole, again, 0.0)
    assert again.sensitivities == {"a": 0.5} and again.macs == {"": 3.0} and again.made_from == whole.made_from
    assert not isinstance(again.moments, dict)
    with pytest.raises(InputError, match="hold nothing for elsewhere"):
        again.mean("elsewhere")
    whole.save(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="was written anew while it was read"):
        again.mean(next(iter(again.firsts)))
    (tmp_path / "s.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="not a statistics file"):
        Statistics.load(tmp_path / "s.safetensors")


def test_parts_merge_to_the_whole(pipeline, calibration, whole, tmp_path):
    parts = []
    for start in (0, 2):
        sampling = SAMPLING.model_copy(update={"seed": SAMPLING.seed + start})
        settings = calibration.model_copy(update={"sampling": sampling})
        parts.append(calibrate(pipeline, PROMPTS[start : start + 2], settings))
    merged = parts[0].merge(parts[1])
    assert_same(whole, merged)
    assert merged.made_from["prompts"] == 4
    merged.save(tmp_path / "merged.safetensors")
    assert_same(merged, Statistics.load(tmp_path / "merged.safetensors"), 0.0)
    with pytest.raises(InputError, match="different models"):
        whole.merge(Statistics("another"))
    with pytest.raises(InputError, match="different ways"):
        weighted = CalibrationSettings(timestep_weights="min_snr", sampling=SAMPLING)
        whole.merge(calibrate(pipeline, PROMPTS[:1], weighted))


def test_a_selection_of_tokens_weighs_what_it_was_selected_from(pipeline, whole):
    """One prompt and three take about as many tokens each, and yet count one to three."""

    def part(start: int, stop: int, tokens_per_dimension: int | None = 2) -> Statistics:
        sampling = SAMPLING.model_copy(update={"seed": SAMPLING.seed + start})
        settings = CalibrationSettings(samples=4, sampling=sampling, tokens_per_dimension=tokens_per_dimension)
        return calibrate(pipeline, PROMPTS[start:stop], settings)

    one, three = part(0, 1), part(1, 4)
    merged = one.merge(three)
    for name in merged.moments:
        torch.testing.assert_close(merged.mean(name), 0.25 * one.mean(name) + 0.75 * three.mean(name))
        assert merged.population[name] == whole.weights[name]
    for name in merged.firsts:
        torch.testing.assert_close(merged.first(name), 0.25 * one.first(name) + 0.75 * three.first(name))
    selected = [name for name in one.tokens if one.tokens[name] > 0.4 * three.tokens[name]]
    assert len(selected) > len(one.tokens) / 2
    assert_same(merged.merge(one), one.merge(three, one))
    assert_same(whole, part(0, 1, None).merge(part(1, 4, None)))


def test_selected_tokens_do_not_depend_on_the_batch_and_stand_for_all(pipeline, whole):
    selected = calibrate(pipeline, PROMPTS, SPREAD)
    one = SPREAD.model_copy(update={"sampling": SAMPLING.model_copy(update={"batch": 1})})
    assert_same(selected, calibrate(pipeline, PROMPTS, one), 1e-4)
    fewer = [name for name in whole.tokens if selected.tokens[name] < whole.tokens[name]]
    assert len(fewer) > len(whole.tokens) / 2
    for site in find_sites(pipeline.unet)[0]:
        if site.group == "query_key":
            continue
        width, seen = site.heads * site.dense_rank, whole.tokens[site.name]
        # The selection is rounded up to a whole token per sample and call: 4 images, 4 steps, 2 branches.
        assert min(2 * width, seen) <= selected.tokens[site.name] <= min(2 * width + 4 * 4 * 2, seen)
        full, part = whole.mean(site.name), selected.mean(site.name)
        # Neighbouring pixels tell the same, so that as many of them tell less.
        most, most_energy = (0.8, 0.3) if site.group == "resnet" else (0.6, 0.1)
        assert float((full - part).norm() / full.norm()) < most
        assert float((full.trace() - part.trace()).abs() / full.trace()) < most_energy


def test_sites_take_turns_within_the_memory_limit_and_every_call_runs_once(pipeline, calls):
    sites, _ = find_sites(pipeline.unet)
    need = sum(GROUPS[site.group].moment_bytes(site) for site in sites)
    settings = StatisticsSettings(memory_limit=0.6 * need / 2**30)
    groups = split_into_turns(sites, settings)
    assert len(groups) == 2 and [s for group in groups for s in group] == sites
    assert all(sum(GROUPS[s.group].moment_bytes(s) for s in group) <= 0.6 * need for group in groups)
    ran = []
    handle = pipeline.unet.register_forward_hook(lambda *_: ran.append(1))
    found = calibrate_on_calls(pipeline.unet, calls, settings)
    handle.remove()
    assert len(ran) == len(calls)
    for number, group in enumerate(groups):
        alone = calibrate_on_calls(pipeline.unet, calls[number::2], StatisticsSettings(tokens_per_dimension=None))
        for site in group:
            names = [site.name] if site.group != "query_key" else [f"{site.name}.query", f"{site.name}.key"]
            for name in names:
                torch.testing.assert_close(found.mean(name), alone.mean(name))
    with pytest.raises(InputError, match="raise memory_limit"):
        calibrate_on_calls(pipeline.unet, calls[:1], settings)


def test_timestep_weights_weigh_calls(pipeline, calls):
    scheduler = pipeline.scheduler
    chosen = calls[:2]
    assert chosen[0].timestep > chosen[1].timestep
    settings = StatisticsSettings(timestep_weights="inverse_snr", tokens_per_dimension=None)
    found = calibrate_on_calls(pipeline.unet, chosen, settings, scheduler=scheduler)
    alone = [calibrate_on_calls(pipeline.unet, [call]) for call in chosen]
    alphas = scheduler.alphas_cumprod.double()
    one, other = (float((1 - a) / a) for a in (alphas[call.timestep] for call in chosen))
    for name in found.moments:
        expected = (one * alone[0].mean(name) + other * alone[1].mean(name)) / (one + other)
        torch.testing.assert_close(found.mean(name), expected, atol=1e-5, rtol=1e-4)
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="min_snr needs a scheduler whose timesteps are those of its alphas_cumprod"):
        calibrate_on_calls(pipeline.unet, chosen, StatisticsSettings(timestep_weights="min_snr"), scheduler=flow)


def test_value_moments_are_of_the_projections_own_output(pipeline, calls):
    site = next(s for s in find_sites(pipeline.unet)[0] if s.group == "value_output")
    seen = []
    linear = pipeline.unet.get_submodule(site.path).to_v
    handle = linear.register_forward_hook(lambda _m, _a, output: seen.append(output))
    found = calibrate_on_calls(pipeline.unet, calls[:1], StatisticsSettings())
    handle.remove()
    x = seen[0].double().reshape(-1, site.heads, site.dense_rank)
    torch.testing.assert_close(
        found.mean(f"{site.name}.value"), torch.einsum("rhd,rhe->hde", x, x) / len(x), atol=1e-6, rtol=1e-4
    )


def test_masked_keys_are_not_counted(pipeline, calls):
    """A masked text is a shorter text."""
    call = copy.deepcopy(calls[0])
    text = call.arguments["encoder_hidden_states"]
    mask = torch.ones(text.shape[:2])
    mask[:, 10:] = 0
    call.arguments["encoder_attention_mask"] = mask
    shorter = copy.deepcopy(calls[0])
    shorter.arguments["encoder_hidden_states"] = text[:, :10]
    assert_same(calibrate_on_calls(pipeline.unet, [shorter]), calibrate_on_calls(pipeline.unet, [call]), 1e-4)


def test_too_few_tokens_are_warned_of(pipeline, calls, caplog):
    calibrate_on_calls(pipeline.unet, calls[:1])
    assert "11 sites saw fewer tokens than they have dimensions (down_blocks.1.attentions.0" in caplog.text
    caplog.clear()
    larger = copy.deepcopy(calls[0])
    larger.arguments["sample"] = larger.arguments["sample"].repeat(1, 1, 4, 4)
    calibrate_on_calls(pipeline.unet, [larger])
    assert not caplog.records


def test_an_overflow_is_told_at_once_with_its_site(fresh_pipeline, calibration):
    site = next(s for s in find_sites(fresh_pipeline.unet)[0] if s.group == "feed_forward")
    fresh_pipeline.unet.get_submodule(site.path).net[0].proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=f"{site.name} are not finite"):
        calibrate(fresh_pipeline, PROMPTS, calibration)


def test_a_site_that_never_ran_stays_dense_with_its_reason(pipeline, whole):
    site = next(s for s in find_sites(pipeline.unet)[0] if s.group == "feed_forward")
    without = copy.copy(whole)
    without.tokens = {name: count for name, count in whole.tokens.items() if name != site.name}
    planner = Planner(pipeline.unet, without, PlanSettings(allocation="uniform", align=4))
    plan = planner.plan(Budget("5%"))
    assert plan.sites[site.name].rank == site.dense_rank
    assert {"site": site.path, "reason": "it never ran in calibration"} in plan.left_dense
    plan.sites[site.name].rank //= 2
    with pytest.raises(InputError, match="never ran in calibration"):
        slim_denoiser(pipeline.unet, without, plan)


def test_another_budget_needs_no_forward_pass(pipeline, whole, calls):
    planner = Planner(pipeline.unet, whole, PlanSettings(align=4), calls=calls[:1])
    first = planner.plan(Budget("8%"))
    known = copy.copy(whole)
    planner.remember(known)
    ran = []
    handle = pipeline.unet.register_forward_hook(lambda *_: ran.append(1))
    again = Planner(pipeline.unet, known, PlanSettings(align=4))
    plans = [again.plan(Budget("8%")), again.plan(Budget(macs="8%"))]
    handle.remove()
    assert not ran
    assert plans[0] == first and plans[1].costs["macs"]["dense"] == first.costs["macs"]["dense"]


def test_releasing_the_dense_weights_makes_the_same_slim_model(fresh_pipeline, compression, calibration, calls):
    statistics, dense = compression.statistics, fresh_pipeline.unet
    expected = predict(compression.pipeline.unet, calls[0])
    before = sum(p.numel() for p in dense.parameters())
    fitted_on = Calls(fresh_pipeline, PROMPTS, calibration).fitting
    slim = slim_denoiser(dense, statistics, compression.plan, fitting_calls=fitted_on, release_dense=True)
    torch.testing.assert_close(predict(slim, calls[0]), expected)
    held = {p.data_ptr(): p.numel() for m in (dense, slim) for p in m.parameters() if p.numel()}
    assert sum(held.values()) == compression.plan.parameters["slim"] < before


def test_an_interrupted_calibration_goes_on(pipeline, calibration, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(turns_module, "RECORD_EVERY", 0.0)
    monkeypatch.setattr(turns_module, "RECORD_SHARE", 0)
    settings = calibration.model_copy(update={"sampling": SAMPLING.model_copy(update={"batch": 1})})
    expected = calibrate(pipeline, PROMPTS, settings)
    original, made = calibration_module.sample_batch, []

    def interrupted(pipeline, prompts, numbers, sampling):
        made.extend(numbers)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(pipeline, prompts, numbers, sampling)

    monkeypatch.setattr(calibration_module, "sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipeline, PROMPTS, settings, unfinished=tmp_path)
    found = calibrate(pipeline, PROMPTS, settings, unfinished=tmp_path)
    assert made == [0, 1, 2, 2, 3]
    assert_same(expected, found, 0.0)
    made.clear()
    other = settings.model_copy(update={"timestep_weights": "min_snr"})
    monkeypatch.setattr(calibration_module, "sample_batch", original)
    assert calibrate(pipeline, PROMPTS, other, unfinished=tmp_path).made_from["prompts"] == 4


WORKER = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from conftest import PROMPTS, SAMPLING, tiny_pipeline
from slimdiff import CalibrationSettings, PlanSettings, calibrate
from slimdiff.calibration import distributed
from slimdiff.compression import Compressor
pipeline = tiny_pipeline()
ran = []
pipeline.unet.register_forward_hook(lambda *_: ran.append(1))
for name, limit in (("one", 2.0), ("turns", {limit!r})):
    settings = CalibrationSettings(samples=3, sampling=SAMPLING, memory_limit=limit)
    found = calibrate(pipeline, PROMPTS, settings)
    if name == "one":
        ran.clear()
        work = Compressor(pipeline, PROMPTS, settings, PlanSettings(groups={groups!r}))
        work.statistics = found
        work.measure()
        found.made_from["forward_passes"] = len(ran)
    found.save(Path({folder!r}) / f"{{name}}-{{distributed.world()[0]}}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_make_the_statistics_and_sensitivities_of_one(pipeline, tmp_path, request):
    """As a launcher starts them. Three prompts: unequal shards, and batches are not what they are in one process."""
    groups = (*TRANSFORMER_GROUPS, "resnet")
    need = sum(GROUPS[site.group].moment_bytes(site) for site in find_sites(pipeline.unet)[0])
    limit = 0.6 * need / 2**30
    tests = Path(__file__).parents[2]
    script = tmp_path / "worker.py"
    script.write_text(
        WORKER.format(paths=[str(tests), str(tests.parent)], folder=str(tmp_path), limit=limit, groups=groups)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, told = worker.communicate(timeout=200)
            assert worker.returncode == 0, told[-2000:]
    finally:
        for worker in workers:
            worker.kill()
    ran: list[int] = []
    request.addfinalizer(pipeline.unet.register_forward_hook(lambda *_: ran.append(1)).remove)
    for name, memory in (("one", 2.0), ("turns", limit)):
        settings = CalibrationSettings(samples=3, sampling=SAMPLING, memory_limit=memory)
        expected = calibrate(pipeline, PROMPTS, settings)
        found = [Statistics.load(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2)]
        assert_same(found[0], found[1], 0.0)
        assert_same(expected, found[0], 1e-6)
        if name == "one":
            alone = Statistics.load(tmp_path / f"{name}-0.safetensors")
            alone.sensitivities = {}
            ran.clear()
            work = Compressor(pipeline, PROMPTS, settings, PlanSettings(groups=groups))
            work.statistics = alone
            work.measure()
            assert len(alone.sensitivities) == len(find_sites(pipeline.unet)[0])
            # Rounding of the prediction (float32, other thread counts) against changes as small as 3e-4 of it.
            for part in found:
                assert part.sensitivities == pytest.approx(alone.sensitivities, rel=0.02)
            assert found[0].sensitivities == found[1].sensitivities
            # Each process records the calls; the sites are shared out.
            assert all(part.made_from.pop("forward_passes") < 0.7 * len(ran) for part in found)
        assert found[0].made_from == expected.made_from
