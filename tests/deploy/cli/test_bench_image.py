"""`slimdiff bench --of image`: the whole picture is what is timed, in whatever runs it, by its schedule."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import call, refused

from deploy.cli.commands.bench import _carried
from deploy.history.results import Entry
from deploy.opening.picture import Picture, picture_job
from slimdiff import Sampling, Schedule
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.trajectory import sample_images
from slimdiff.schedule import FILE, make_schedule

STEPS = 4
SAMPLING = Sampling(steps=STEPS, guidance=3.0, batch=1)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return make_schedule(3, STEPS, guidance_interval=(0.0, 0.5), deep_every=2)


def opened(job) -> Picture:
    return Picture(job.path, 1, batch=1, **job.options)


def close(one, other, most: int) -> bool:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) <= most


def test_a_run_makes_the_pictures_that_the_pipeline_makes(pipeline, exported, workspace, tmp_path, schedule):
    """By its schedule in torch; and in ONNX Runtime."""
    for name, runtime, followed in ((workspace / "tiny", "torch", schedule), (exported, None, None)):
        job = picture_job(str(name), runtime, SAMPLING, followed, tmp_path)
        assert job.runtime == (runtime or "onnxruntime") and json.loads(json.dumps(job.options)) == job.options
        picture = opened(job)
        expected = pipeline if followed is None else schedule_pipeline(pipeline, followed)
        assert close(picture.run()[0], sample_images(expected, [""], SAMPLING)[0], 1)
        assert picture.shapes == {"images": [1, 16, 16], "steps": [STEPS]}


def test_a_graph_of_one_batch_says_how_many_pictures_there_are(exported, tmp_path):
    several = SAMPLING.model_copy(update={"batch": 3})
    assert opened(picture_job(str(exported), None, several, None, tmp_path)).shapes["images"] == [1, 16, 16]


HEUN = SAMPLING.model_copy(update={"scheduler": "heun"})


@pytest.mark.parametrize(("sampling", "calls"), [(SAMPLING, 4), (HEUN, 7)])
def test_a_run_says_the_schedule_that_it_follows_by_calls_and_not_by_steps(sampling, calls, workspace, tmp_path):
    own = make_schedule(3, 7, guidance_interval=(0.0, 0.5), deep_every=2)
    followed = opened(picture_job(str(workspace / "tiny"), "torch", sampling, own, tmp_path)).schedule
    assert followed["steps"] == calls and followed["whole"] == own.at(calls).whole
    assert followed.get("carried_from") == (7 if calls == 4 else None)
    side = {"name": "tiny", "schedule": followed}
    value = {"baseline": {"name": "tiny", "schedule": None}, "candidate": side}
    line = "the schedule of tiny is for 7 calls of the UNet: it is carried over to 4 by trajectory fraction"
    assert _carried({"base": None, "candidate": own}, value) == ([line] if calls == 4 else [])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_is_exported_with_its_schedule(pipeline, workspace, tmp_path, schedule):
    for followed in (schedule, None):
        picture = opened(picture_job(str(workspace / "tiny"), None, SAMPLING, followed, tmp_path / str(followed)))
        expected = pipeline if followed is None else schedule_pipeline(pipeline, followed)
        assert picture.runtime.startswith("ONNX Runtime")
        assert close(picture.run()[0], sample_images(expected, [""], SAMPLING)[0], 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_pictures_of_both_are_timed_in_turn(workspace, exported, tmp_path, schedule, capsys):
    schedule.save(tmp_path / FILE)
    asked = ["--of", "image", "--steps", STEPS, "--processes", 2, "--rounds", 3, "--warmup", 1]
    history = tmp_path / "h.jsonl"
    found = call(
        ["bench", exported, workspace / "tiny", *asked, "--schedule", tmp_path / FILE, "--history", history], capsys
    )
    assert found["baseline"]["schedule"] is None and found["candidate"]["schedule"]["whole"] == schedule.whole
    assert found["of"] == "image" and found["process_pairs"] == 2 and found["speedup"]["median"] > 0
    assert Entry.model_validate_json(history.read_text()).of == "image"
    line = refused(["bench", exported, workspace / "tiny", *asked, "--batch", 2], capsys)
    assert "make images of different shapes" in line and "say --batch" in line
    line = refused(["bench", exported / "unet" / "model.onnx", exported, *asked], capsys)
    assert "is a denoiser alone: say with --pipeline" in line


def test_calls_and_pictures_are_series_of_their_own(tmp_path):
    from deploy.history.results import all_series

    pytest.importorskip("ruptures", reason="change points need the extra history")
    side = {"name": "a", "median_ms": 1.0}
    line = {
        **{"schema": 1, "time": "2026-01-01T00:00:00Z", "verdict": "pass", "gate": None, "threads": 1, "machine": "m"},
        **{"speedup": {"median": 1, "low": 0.9, "high": 1.1}, "baseline": side, "candidate": side},
        **{"runtimes": {"candidate": "torch", "baseline": "torch"}, "fingerprint": {"id": "1"}},
    }
    entries = [Entry.model_validate(line), Entry.model_validate({**line, "of": "image"})]
    assert [entry.of for entry in entries] == ["call", "image"] and len(all_series(entries)) == 2


def test_a_schedule_of_another_model_shows_before_any_export(workspace, tmp_path, monkeypatch, capsys):
    make_schedule(2, STEPS, deep_every=2).save(tmp_path / "other.json")
    monkeypatch.setattr("deploy.opening.picture._export", lambda *_: pytest.fail("it exports"))
    for flag in ("--schedule", "--base-schedule"):
        tiny = workspace / "tiny"
        said = refused(["bench", tiny, tiny, "--of", "image", flag, tmp_path / "other.json"], capsys)
        assert "is for a UNet of 2 levels, and this one has 3" in said and str(tiny) in said
