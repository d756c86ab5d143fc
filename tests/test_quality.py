"""The benchmark of quality: what it compares with, how it counts, and that it goes on where it stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import PROMPTS, SAMPLING

from benchmarks.baselines import magnitude_pruning
from benchmarks.obs_diff import DAMPING, HEADS, amounts, eliminate, obs_diff, step_weights
from benchmarks.quality.__main__ import Cells, cells_of, parser
from benchmarks.quality.bench import points_lost
from benchmarks.quality.methods import TELLING, Cut
from benchmarks.quality.worlds import Things, _counted
from benchmarks.things import world
from slimdiff import Budget, PlanSettings, make_plan
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.planning.costs import count_parameters


@pytest.mark.parametrize("block", [1, 4])
def test_what_stays_is_what_least_squares_would_make_of_it(block):
    torch.manual_seed(0)
    x, weight = torch.randn(64, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64), torch.randn(3, 16)
    hessian = x.T @ x
    kept, updated = eliminate(hessian, weight, 8 // block, block)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(16)
    expected = weight.double() @ damped[:, kept] @ torch.linalg.inv(damped[kept[:, None], kept])
    torch.testing.assert_close(updated[:, kept], expected)
    assert len(kept) == 8 and not updated[:, [i for i in range(16) if i not in kept]].any()


def test_what_nothing_reads_goes_first():
    weight = torch.ones(2, 6)
    weight[:, [1, 4]] = 0
    kept, _ = eliminate(torch.eye(6, dtype=torch.float64), weight, 2, 1)
    assert kept.tolist() == [0, 2, 3, 5]


def test_early_steps_weigh_more():
    weights = step_weights(25)
    assert weights[0] == pytest.approx(1.2) and weights[-1] == pytest.approx(0.8)
    assert all(before > after for before, after in zip(weights, weights[1:], strict=False))


def test_obs_diff_has_the_plans_size_and_beats_magnitude(pipeline, compression):
    calls = record_calls(pipeline, PROMPTS, SAMPLING)
    plan = make_plan(pipeline.unet, compression.statistics, Budget("15%"), PlanSettings(allocation="uniform", align=4))
    before = predict(pipeline.unet, calls[0])
    slim = obs_diff(pipeline, plan, PROMPTS, SAMPLING, calls)
    removed, asked = (plan.parameters["dense"] - size for size in (count_parameters(slim), plan.parameters["slim"]))
    assert asked <= removed <= 1.02 * asked
    assert torch.equal(predict(pipeline.unet, calls[0]), before)
    errors = [
        noise_error(lambda c: predict(pipeline.unet, c), lambda c, m=model: predict(m, c), calls)["relative_mse"]
        for model in (slim, magnitude_pruning(pipeline.unet, plan))
    ]
    assert errors[0] < errors[1]
    half = {name: count for name, count in amounts(plan, HEADS[2]).items() if name.endswith("value_output")}
    assert set(half.values()) <= {0, 1} and set(amounts(plan, HEADS[0]).values()) != {0}


def test_hits_are_counted_by_caption():
    scenes = world.sample_scenes(20, 0, held=True)
    things = (world.things(scenes)[..., 0] >= 0).sum(1)
    whose = torch.arange(20).repeat_interleave(things)
    of_things = _counted(torch.ones(len(whose), dtype=torch.bool), whose)
    assert np.array_equal(of_things[:, 0], things) and np.array_equal(of_things[:, 1], things)
    of_pictures = _counted(torch.arange(20) % 2 == 0, whose)
    assert of_pictures[:, 0].tolist() == [1, 0] * 10 and of_pictures[:, 1].tolist() == [1] * 20


def test_rendered_scenes_would_be_read_right_and_others_not():
    things = Things()
    captions = things.choose(6, "cpu")
    assert captions == world.captions(things.scenes) and len(set(captions)) == 6
    hits = things.hits(np.full((6, 64, 64, 3), 127, dtype=np.uint8))
    assert hits["concept"][:, 1].sum() == (world.things(things.scenes)[..., 0] >= 0).sum()
    assert hits["concept"][:, 0].sum() == 0


def test_points_are_lost_where_hits_are():
    dense = np.array([[4.0, 4.0]] * 50)
    slim = dense.copy()
    assert points_lost(dense, slim) == {"points": 0, "low": 0, "high": 0}
    slim[:10, 0] = 2
    lost = points_lost(dense, slim)
    assert lost["points"] == pytest.approx(10) and 0 < lost["low"] < 10 < lost["high"] < 25


def test_cells_are_kept_one_by_one_and_read_again(tmp_path):
    cells = Cells(tmp_path)
    cells.keep("global@blocks-30", noise_error=1e-5)
    cells.keep("global@blocks-30", psnr_db=50.0)
    cells.keep("svd@blocks-30", noise_error=1e-3)
    assert Cells(tmp_path).rows == {
        "global@blocks-30": {"noise_error": 1e-5, "psnr_db": 50.0},
        "svd@blocks-30": {"noise_error": 1e-3},
    }


def test_the_most_telling_cells_come_first():
    def cells(*arguments: str) -> list[tuple[str, Cut]]:
        return cells_of(parser().parse_args(["--model", "things", *arguments]))

    every = cells()
    assert every[: len(TELLING)] == TELLING and len(set(every)) == len(every)
    assert cells("--methods", "svd,global", "--cuts", "30", "--unet-cuts", "") == [
        ("global", Cut(30)),
        ("svd", Cut(30)),
    ]
    with pytest.raises(SystemExit):
        cells("--methods", "nothing")
