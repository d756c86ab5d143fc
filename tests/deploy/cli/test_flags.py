"""Flags say of a settings' field what the field says, and give its value back."""

from __future__ import annotations

import argparse

import pytest
from command_line import actions_of, refused

from deploy.cli import flags
from deploy.cli.app import COMMANDS, make_parser
from deploy.recipe import recipe as of_recipes
from exporters import settings as of_exporters
from exporters.settings import BenchSettings, EngineSettings
from slimdiff import schedule as of_schedules
from slimdiff import settings as of_slimdiff
from slimdiff.budget import Budget
from slimdiff.settings import CalibrationSettings, PlanSettings, Sampling


def test_the_help_of_a_field_is_its_docstring():
    found = set()
    for command in COMMANDS:
        for action in actions_of(command):
            kind, dot, name = action.dest.partition(".")
            if not dot or kind == "Budget" or action.const is False:  # a `--no-` says what its absence means
                continue
            settings = next(
                s for of in (of_slimdiff, of_schedules, of_exporters, of_recipes) if (s := getattr(of, kind, None))
            )
            said = " ".join(settings.model_fields[name].description.replace("`", "").split()).rstrip(".")
            assert action.help.replace("%%", "%").lower().startswith(said.lower()) and len(said) > 10, action.dest
            found.add(kind)
    assert found >= {"Sampling", "CalibrationSettings", "PlanSettings", "EngineSettings", "BenchSettings", "SweepStage"}


def parsed(*argv: str) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def test_what_is_not_given_keeps_its_default():
    args = parsed("compress", "demo", "--out", "x", "--reduce", "5%")
    assert flags.read_calibration(args) == CalibrationSettings() and flags.read(args, PlanSettings) == PlanSettings()


def test_values_come_back_as_settings():
    argv = "compress demo --out x --max-error 1e-3 --samples 3 --steps 4 --guidance 1.5 --groups query_key,value_output"
    args = parsed(*argv.split(), "--allocation", "local")
    sampling = Sampling(steps=4, guidance=1.5)
    assert flags.read_calibration(args) == CalibrationSettings(samples=3, sampling=sampling)
    assert flags.read(args, PlanSettings) == PlanSettings(groups=("query_key", "value_output"), allocation="local")
    assert flags.read_budget(args) == Budget(max_error=1e-3)
    assert flags.read(parsed("bench", "a", "b", "--max-seconds", "1"), BenchSettings) == BenchSettings(max_seconds=1)
    args = parsed("engine", "x", "--out", "y", "--target", "sm89", "--target", "sm120", "--tf32")
    assert flags.read(args, EngineSettings) == EngineSettings(targets=["sm89", "sm120"], tf32=True)


def test_a_command_may_have_another_default():
    arguments = parsed("compare", "a", "b")
    assert flags.read(arguments, Sampling) == Sampling(seed=10_000)
    assert flags.read_usage(arguments, "a", steps=25) == Sampling(steps=25, seed=10_000)
    helps = {action.dest: action.help for action in actions_of("compare")}
    assert helps["Sampling.seed"].endswith("(default: 10000)")
    assert helps["Sampling.steps"].endswith("(default: what it was calibrated with, else 25)")


@pytest.mark.parametrize("kind", flags.BUDGETS)
def test_every_kind_of_budget_has_a_flag(kind):
    flag, value = {"parameters": "--reduce"}.get(kind, f"--{kind.replace('_', '-')}"), "2"
    args = parsed("compress", "demo", "--out", "x", flag, value)
    assert flags.read_budget(args) == Budget(**{kind: value})


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("compress demo --out x --reduce 5% --steps 0", "--steps: input should be greater than or equal to 1, not '0'"),
        ("compress demo --out x --reduce 5% --steps many", "--steps: input should be a valid integer"),
        ("compress demo --out x --reduce 5% --groups keys", "--groups: there is no group 'keys'"),
        ("compress demo --out x --reduce 5% --allocation best", "--allocation: invalid choice: 'best'"),
        ("compress demo --out x --reduce 5x", "--reduce: budget '5x': write a count such as 100M"),
        ("compress demo --out x --reduce 100%", "--reduce: budget '100%' must lie between nothing and all"),
        ("compress demo --out x --speedup 0.5", "--speedup: a speedup is dense latency over slim latency"),
        ("engine x --out y --target ampere", "--targets: a target is named like sm89"),
        ("compare demo demo --images 0", "--images: must be a whole number of at least 1"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_flag(argv, says, capsys):
    assert says in refused(argv.split(), capsys)
