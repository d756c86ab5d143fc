"""Killed at any moment (SIGKILL): nothing half-written is taken for whole, and the next run ends."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import every_stop, finish, leftovers, whole_stages
from forks import until

from deploy.artifacts import build_folder
from slimdiff.errors import InputError
from slimdiff.storage import atomic, manifest

# --- every file operation of small writers ------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "old"])
def test_a_build_killed_at_every_file_operation(forks, tmp_path, old):
    template, out = tmp_path / "template", tmp_path / "build"
    template.mkdir()
    if old is not None:
        assert forks.run("quick_build:build", template, old).code == 0

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(template, out)

    forks.run("quick_build:build", tmp_path / "reference", "new")
    wanted = {name: (tmp_path / "reference" / name).read_bytes() for name in ("first/deep/text.txt", "second/copy.txt")}
    for number in every_stop(forks, out, "quick_build:build", out, "new", before=before):
        keys = whole_stages(out)
        if old is not None:
            assert set(keys) == {"first", "second", "aside"}, "one was gone for a moment"
            assert {(out / n).read_text()[:3] for n in wanted} <= {"old", "new"}
        again = forks.run("quick_build:build", out, "new")
        assert again.code == 0, (number, again.said)
        assert {name: (out / name).read_bytes() for name in wanted} == wanted, number
        assert leftovers(out) == [] and build_folder.read_verdict(out), number


@pytest.mark.parametrize("how", ["replace_folder", "replace_folder_in_two_renames"])
def test_a_folder_replaced_while_killed_is_the_old_or_the_new(forks, tmp_path, how):
    place = tmp_path / "place"
    out = place / "out"

    def before() -> None:
        shutil.rmtree(place, ignore_errors=True)
        assert forks.run("quick_build:replace_folder", out, "old").code == 0

    seen = set()
    for number in every_stop(forks, place, f"quick_build:{how}", out, "new", before=before):
        if how == "replace_folder_in_two_renames":
            atomic.clear_leftovers(place)  # puts it back, if it was killed between the two
            assert leftovers(place) == []
        texts = {(out / name).read_text() for name in ("a.txt", "b.txt")}
        assert len(texts) == 1, number
        seen |= texts
        with atomic.replacing(out) as temporary:
            (temporary / "c.txt").write_text("newer")
        assert [p.name for p in out.iterdir()] == ["c.txt"] and leftovers(place) == []
    assert seen == {"old", "new"}


def test_an_archive_killed_at_every_file_operation(forks, tmp_path):
    place = tmp_path / "place"
    bundle, file, unpacked = tmp_path / "bundle", place / "bundle.tar.zst", place / "unpacked"
    texts = {}
    for text in ("new", "old"):
        forks.run("quick_build:write_bundle", bundle / text, text)
        assert forks.run("quick_build:pack_bundle", bundle / text, tmp_path / text).code == 0
        texts[(tmp_path / text).read_bytes()] = text

    def before() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        shutil.copyfile(tmp_path / "old", file)

    for number in every_stop(forks, place, "quick_build:pack_bundle", bundle / "new", file, before=before):
        assert texts[file.read_bytes()] in ("old", "new"), number
    assert forks.run("quick_build:pack_bundle", bundle / "new", file).code == 0
    assert texts[file.read_bytes()] == "new" and leftovers(place) == []
    for number in every_stop(forks, place, "quick_build:unpack_bundle", tmp_path / "new", unpacked, before=before):
        assert not unpacked.exists() or manifest.verify_manifest(unpacked, exact=True), number
        if not unpacked.exists():
            assert forks.run("quick_build:unpack_bundle", tmp_path / "new", unpacked).code == 0
            assert manifest.verify_manifest(unpacked, exact=True) and leftovers(place) == []


# --- whole builds of a real model ---------------------------------------------------------------------------------


def test_a_build_killed_again_and_again(forks, workshop, undisturbed, tmp_path):
    out = tmp_path / "build"
    shutil.copytree(workshop / "build" / "export", out / "export")  # which takes longest, and is killed below
    (out / ".lock").touch()
    moments = [  # before the statistics have their name, a model is whole, an image is there, the verdict
        ("os.rename", "/calibrate"),
        ("open", "/unet/config.json"),
        ("open", "/00-slim.png"),
        ("os.rename", "/build.json"),
    ]
    seen: list[set[str]] = []
    for event, ends in moments:
        stop = {"below": str(out), "event": event, "ends": ends}
        killed = forks.command(["build", workshop / "recipe.yaml", "--out", out], stop=stop).wait()
        assert killed.code == -signal.SIGKILL, (event, ends, killed.said)
        seen.append(set(whole_stages(out)))
        assert leftovers(out)
    assert seen == [{"export", *build_folder.STAGES[:n]} for n in (0, 3, 7, 9)]
    finish(forks, workshop, out, undisturbed)


def test_a_build_stopped_halfway_has_no_verdict(forks, workshop, undisturbed, tmp_path):
    out = tmp_path / "build"
    shutil.copytree(workshop / "build", out)
    argv = ["build", workshop / "other.yaml", "--out", out]
    stop = {"below": str(out), "event": "os.mkdir", "ends": "/export"}
    assert forks.command(argv, stop=stop).wait().code == -signal.SIGKILL
    before, after = whole_stages(workshop / "build"), whole_stages(out)
    assert {name for name in build_folder.STAGES if before[name] != after[name]} == {"plan", "slim"}
    for command in (["inspect", out], ["bundle", out, "--target", "edge", "--out", tmp_path / "bundle"]):
        refused = forks.command(command).wait()
        assert refused.code == 2 and "is not a finished build: plan was made again" in refused.error, refused.said
    finish(forks, workshop, out, undisturbed)
    assert forks.command(["inspect", out]).wait().code == 0


def test_compress_killed_while_it_writes(forks, workshop, undisturbed, tmp_path):
    out = tmp_path / "slim"
    argv = ["compress", workshop / "tiny", "--out", out, "--prompts", workshop / "prompts.txt"]
    argv += [
        "--statistics",
        workshop / "build" / build_folder.STATISTICS,
        "--plan",
        workshop / "build" / build_folder.PLAN,
    ]
    argv += ["--samples", "2", "--steps", "1"]
    for event, ends in (("open", "/unet/config.json"), ("", "")):
        stop = {"below": str(tmp_path), "event": event, "ends": ends} if event else None
        ended = forks.command(argv, stop=stop).wait()
        assert ended.code == (-signal.SIGKILL if event else 0), ended.said
        assert out.exists() is not bool(event)
    assert manifest.verify_manifest(out) and [p.name for p in tmp_path.iterdir()] == ["slim"]


# --- children -----------------------------------------------------------------------------------------------------

WORKER = """
from exporters.latency.pair import Job, Worker
from exporters.settings import BenchSettings
with Worker(Job("x", {path!r}, "onnxruntime"), BenchSettings()) as worker:
    worker.answer()
    print(worker._process.pid, flush=True)
    worker.ask("open", cores=None, warmup=10**9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes outlive their parents")
def test_a_worker_of_bench_dies_with_its_parent(workshop, undisturbed):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = WORKER.format(path=str(workshop / "build" / "export" / "slim" / "model.onnx"))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    with parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)  # it warms up for ever, and does not look at its stdin
        assert worker.is_running()
        parent.kill()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes outlive their parents")
def test_a_builder_of_engines_dies_with_its_parent():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = "import os, time; from exporters.process import end_with; end_with(os.getppid()); print(1); time.sleep(600)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-uc', {child!r}], stdout=-1); "
    code += "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    with parent:
        builder = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    until(lambda: not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE)


# --- and at random ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_a_build_killed_at_50_random_moments(forks, workshop, undisturbed, tmp_path):
    """Other moments with another seed in SLIMDIFF_FAULTS_SEED."""
    seed = int(os.environ.get("SLIMDIFF_FAULTS_SEED", "0"))
    chance = random.Random(seed)
    other = tmp_path / "other"
    assert forks.command(["build", workshop / "other.yaml", "--out", other]).wait().code == 0
    lasted = [manifest.read_manifest(other / name)["made_from"]["seconds"] for name in build_folder.STAGES]
    found: list[str] = []
    for point in range(50):
        out = tmp_path / f"build-{point}"
        over = point % 2 == 1  # every other one replaces an older build
        if over:
            shutil.copytree(other, out)
        # By the clock alone, most would fall into the one long stage: take every stage in turn, and the end.
        stage = point // 2 % (len(build_folder.STAGES) + 1)
        delay = chance.uniform(0, [*lasted, 0.05][stage])
        name = [*build_folder.STAGES, "the end"][stage]
        where = f"seed {seed}, point {point}, {delay:.3f} s into {name}, over an old build: {over}"
        killed = forks.command(["build", workshop / "recipe.yaml", "--out", out])
        until(lambda out=out, stage=stage: _made(out, undisturbed) >= stage)
        time.sleep(delay)
        code = killed.kill().code
        try:
            kept = whole_stages(out)
            if over:
                assert set(kept) == set(build_folder.STAGES)
            finish(forks, workshop, out, undisturbed)
        except (AssertionError, InputError) as error:
            raise AssertionError(f"{where}: {error}") from error
        new = sum(undisturbed[f"{name}/manifest.json"][0]["key"] == key for name, key in kept.items())
        found.append(f"{where}: exit {code}, {new} of {len(build_folder.STAGES)} stages kept")
        print(found[-1], flush=True)
        shutil.rmtree(out)
    assert len(found) == 50


def _made(build: Path, undisturbed: dict[str, Any]) -> int:
    """How many stages of a running build are those of the undisturbed one, one after another."""
    for count, name in enumerate(build_folder.STAGES):
        try:
            key = manifest.read_manifest(build / name)["made_from"]["key"]
        except (InputError, OSError):  # not there yet
            return count
        if key != undisturbed[f"{name}/manifest.json"][0]["key"]:
            return count
    return len(build_folder.STAGES)
