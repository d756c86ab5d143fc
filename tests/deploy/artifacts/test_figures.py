"""Figures of a denoiser, and what is said of when and by what they were made."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from conftest import PROMPTS, SAMPLING

from deploy.artifacts.figures import costs, made_now, source_commit
from deploy.cli.console import figures
from exporters.graphs.pipeline import example_call
from slimdiff.denoising.trajectory import record_calls
from slimdiff.groups import find_sites
from slimdiff.planning.costs import count_macs, mac_costs


def test_the_commit_is_that_of_the_package_and_not_of_a_checkout_around_it(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    assert source_commit(tmp_path) is None
    git("init")
    module = tmp_path / "__init__.py"
    module.write_text("")
    assert source_commit(tmp_path) is None  # nothing is committed, and nothing tracked
    git("add", ".")
    git("commit", "-m", "first")
    commit = source_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", commit)
    module.write_text("changed = True\n")
    assert source_commit(tmp_path) == f"{commit}-dirty"
    installed = tmp_path / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert source_commit(installed) is None


def test_the_time_is_in_utc():
    made = made_now()
    assert abs(datetime.now(UTC) - datetime.fromisoformat(made["time"])) < timedelta(minutes=1)
    assert made["versions"]["slimdiff"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_macs_are_of_one_sample_whatever_call_they_are_counted_on(pipeline, guidance):
    call = record_calls(pipeline, PROMPTS[:1], SAMPLING.model_copy(update={"guidance": guidance, "batch": 1}))[0]
    of_one = count_macs(pipeline.unet, example_call(pipeline, batch=1))
    assert costs(pipeline.unet, call)["macs"] == costs(pipeline.unet, example_call(pipeline))["macs"] == of_one
    assert mac_costs(pipeline.unet, find_sites(pipeline.unet)[0], call).dense == of_one


def test_the_label_of_macs_says_that_they_are_of_one_sample():
    (line,) = figures({"macs": {"dense": 4e8, "slim": 3e8}})
    assert line.startswith("MACs/sample ") and "400.00 M" in line
