"""Figures of a denoiser, and what is said of when and by what they were made."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import PROMPTS, SAMPLING
from diffusers import AutoPipelineForImage2Image
from families.steering import picture

from deploy.artifacts.figures import costs, image_macs, made_now, source_commit
from deploy.cli.console import figures
from exporters.graphs.pipeline import example_call
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.trajectory import record_calls
from slimdiff.groups import find_sites
from slimdiff.planning.costs import count_macs, mac_costs, shallow_share
from slimdiff.schedule import make_schedule


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


def test_an_image_is_counted_by_the_calls_that_make_it(pipeline):
    """Image to image begins in the middle: what it leaves out costs neither side anything."""
    scheduled: Any = schedule_pipeline(pipeline, make_schedule(3, 6, guidance_interval=(0, 0.5), deep_every=3))
    from_image: Any = AutoPipelineForImage2Image.from_pipe(scheduled)
    asked = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent"}
    call = example_call(pipeline, guidance=3.0)
    one, share = count_macs(pipeline.unet, call), shallow_share(pipeline.unet, "up_blocks.2", call)
    from_image(PROMPTS[:2], image=[picture(0)] * 2, strength=0.5, **asked)
    macs = image_macs(pipeline.unet, pipeline.unet, call, scheduled.unet, 1)
    assert macs["dense"] == 3 * one and macs["slim"] == round(one * (1 + 2 * share) / 2)
    scheduled.unet.ran.clear()
    for prompt in PROMPTS[:2]:
        scheduled(prompt, **asked)
    macs = image_macs(pipeline.unet, pipeline.unet, call, scheduled.unet, 2)
    assert macs["dense"] == 6 * one and macs["saved"] == pytest.approx(1 - scheduled.unet.schedule.cost(share))
