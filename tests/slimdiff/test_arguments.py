"""Arguments that Python lets through: taken for what they mean, or refused in one line before the work."""

from __future__ import annotations

import pytest
from conftest import PROMPTS, tiny_pipeline
from families.family import SAMPLING, TWO_LEVELS

from slimdiff import Budget, CalibrationSettings, InputError, PlanSettings, calibrate, compress
from slimdiff.denoising.trajectory import record_calls

UNIFORM = PlanSettings(align=4, allocation="uniform")


def settings(**arguments) -> CalibrationSettings:
    sampling = SAMPLING.model_copy(update={"steps": 1, "arguments": arguments})
    return CalibrationSettings(samples=2, sampling=sampling)


def test_a_text_of_the_pipelines_arguments_goes_to_every_prompt():
    pipeline = tiny_pipeline(**TWO_LEVELS)
    plain, guided = (
        record_calls(pipeline, PROMPTS[:2], settings(**a).sampling) for a in ({}, {"negative_prompt": "red"})
    )
    states = [calls[0].arguments["encoder_hidden_states"] for calls in (plain, guided)]
    assert (states[0][2:] == states[1][2:]).all() and not (states[0][:2] == states[1][:2]).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_images_per_prompt": 2}, "a prompt several times"),
        ({"generator": None}, "the sampling has a seed"),
        ({"negative_promt": "red"}, "takes no negative_promt"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"guidance_rescale": "much"}, "guidance_rescale|does not run"),
        ({"clip_skip": "two"}, "does not run"),
    ],
)
def test_what_the_pipeline_does_not_take_is_one_line(arguments, says):
    pipeline = tiny_pipeline(**TWO_LEVELS)
    with pytest.raises(InputError, match=says) as caught:
        calibrate(pipeline, PROMPTS[:2], settings(**arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failing", [False, True])
def test_the_pipeline_that_came_in_stays_as_it_was(failing):
    pipeline = tiny_pipeline(**TWO_LEVELS)
    pipeline.set_progress_bar_config(desc="mine")
    before = dict(vars(pipeline)), dict(pipeline._progress_bar_config), dict(vars(pipeline.scheduler))
    if failing:
        with pytest.raises(InputError):
            compress(pipeline, PROMPTS[:2], "10%", calibration=settings(clip_skip="two"), planning=UNIFORM)
    else:
        compress(pipeline, PROMPTS[:2], "10%", calibration=settings(), planning=UNIFORM)
    after = dict(vars(pipeline)), dict(pipeline._progress_bar_config), dict(vars(pipeline.scheduler))
    assert [list(one) for one in after] == [list(one) for one in before]
    assert after[1] == before[1] and all(after[0][name] is value for name, value in before[0].items())


@pytest.mark.parametrize("value", [0.12, 12.5, True, -0.0, "nan", float("nan"), float("inf"), "150%", [], None, {"a": 1}])
def test_a_budget_that_python_lets_through_is_refused(value):
    with pytest.raises(InputError, match="budget") as caught:
        Budget(parameters=value)
    assert "\n" not in str(caught.value)


def test_a_text_is_a_budget_of_parameters_and_a_plan_is_short():
    pipeline = tiny_pipeline(**TWO_LEVELS)
    slim = compress(pipeline, PROMPTS[:2], "10%", calibration=settings(), planning=UNIFORM)
    assert slim.plan.budget == {"parameters": "10%"}
    for thing in (slim, slim.plan, slim.statistics, Budget("10%")):
        assert len(repr(thing)) < 300 and len(str(thing)) < 300, type(thing)
    with pytest.raises(InputError, match="budget"):
        compress(pipeline, PROMPTS[:2], 0.12, calibration=settings())
    for wrong in ({"calibration": {"samples": 2}}, {"planning": "uniform"}, {"statistics": "x"}, {"plan": "12%"}):
        budget = None if "plan" in wrong else "10%"
        with pytest.raises(InputError) as caught:
            compress(pipeline, PROMPTS[:2], budget, **wrong)
        assert "\n" not in str(caught.value)
