"""Every number that a command, a recipe or a setting takes has a range, and what is outside it is one line."""

from __future__ import annotations

import sys
from typing import Any, get_args

import pytest
from command_line import actions_of, refused
from pydantic import BaseModel, ValidationError

from deploy.cli.app import COMMANDS
from deploy.recipe.recipe import Recipe, make_recipe
from deploy.triton.settings import TritonSettings
from exporters.latency.decision import Gate
from exporters.settings import BenchSettings, EngineSettings, TableSettings
from slimdiff.budget import Budget
from slimdiff.errors import InputError
from slimdiff.settings import CalibrationSettings, PlanSettings

ODD = ("nan", "inf", "-inf", "-1", str(2**64), "1e400", "9" * 5000, "", "1,5", "true")
EXPORTERS = (BenchSettings, EngineSettings, TableSettings)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_for_a_number_refuses_what_is_out_of_its_range(command, capsys):
    flags = [a for a in actions_of(command) if a.metavar in ("N", "X", "AMOUNT")]
    capsys.readouterr()
    for flag in flags:
        for value in ODD:
            name = flag.option_strings[0]
            if (name, value) in (("--reduce", "-1"), ("--macs", "-1")):  # a leading minus says that it is taken out
                continue
            assert name in refused([command, f"{name}={value}"], capsys), f"{name} {value}"
    assert flags or command in ("demo", "build", "inspect", "bundle", "doctor")


def test_a_tolerance_and_a_gate_have_ranges_too(capsys):
    for value in ODD:
        assert "--tolerance" in refused(["bench", "demo", "demo", f"--tolerance={value}"], capsys)
        with pytest.raises(InputError, match="a gate is like"):
            Gate.parse(f"speedup>={value}")


def numbers_of(settings: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where settings, and settings in them, have numbers."""
    found = []
    for name, field in settings.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        here = (*path, field.alias or name)
        found += numbers_of(inner, here) if inner else [here] if kinds & {int, float} else []
    return found


@pytest.mark.parametrize(
    "settings",
    [Recipe, CalibrationSettings, PlanSettings, *EXPORTERS, TritonSettings],
)
def test_every_number_of_settings_has_a_range(settings):
    places = numbers_of(settings)
    assert places
    for place in places:
        for value in (float("nan"), float("inf"), -1, -0.5, 2**64, "1e400", True, [1]):
            content: Any = value
            for key in reversed(place):
                content = {key: content}
            with pytest.raises(ValidationError) as caught:
                settings(**({"model": "demo"} if settings is Recipe else {}), **content)
            assert place[0] in str(caught.value)


def test_a_recipe_says_where_a_number_is_out_of_its_range(tmp_path):
    content = {"model": "demo", "calibration": {"sampling": {"guidance": float("inf")}}}
    with pytest.raises(InputError, match="r.yaml: calibration.sampling.guidance: input should be a finite number"):
        make_recipe(content, "r.yaml", tmp_path)


@pytest.mark.parametrize(
    ("value", "right"),
    [("0.12", "12%"), (0.5, "50%"), ("-0.25", "25%"), ("150%", "25%"), ("0%", "25%"), (0, "25%"), ("100%", "25%")],
)
@pytest.mark.parametrize("kind", ["parameters", "macs"])
def test_a_budget_that_cannot_be_says_what_would_be_right(kind, value, right):
    with pytest.raises(InputError, match=f"write .*{right}"):
        Budget(**{kind: value})


def test_ranges_are_held_before_torch_is_loaded():
    import subprocess

    script = (
        "import sys; from deploy.cli.app import main; code = main(sys.argv[1:]); "
        "sys.exit('torch was loaded' if 'torch' in sys.modules else code)"
    )
    argv = [sys.executable, "-c", script, "generate", "demo", "--prompt", "x", "--out", "x.png", "--guidance", "inf"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--guidance: input should be a finite number, not 'inf'" in done.stderr
