"""Killed at any moment, disk full, read-only, two at once: nothing half-written is taken for whole, the next run ends.

Processes are real and are killed (SIGKILL), file systems are real and are full (tmpfs) or read-only (a bind mount).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PROMPTS, tiny_pipeline
from forks import Forks, until

from deploy.artifacts import build_folder
from deploy.artifacts.files import save_pipeline
from deploy.history import results
from slimdiff.errors import InputError
from slimdiff.storage import atomic, manifest

RECIPE = """
model: tiny
prompts: prompts.txt
calibration: {samples: 2, sampling: {steps: 1, batch: 2}}
budget: {reduce: 8%}
plan: {sensitivity_calls: 1, allocation: local}
engine: {enabled: false}
validate: {calls: 1}
compare: {images: 1, shown: 1, trajectories: 1, sampling: {steps: 1, batch: 1}}
bench: {rounds: 6, warmup: 1}
gates: {parity: true, min_speedup: 0.0001, max_noise_error: 0.9}
"""
SMALLEST = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
    "mid_block_type": None,
}
USED = (  # what the stages import when they run
    "deploy.build.chain",
    "deploy.report.page",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "onnxruntime",
    "onnxscript",
    "exporters.validation.graph",
    "exporters.graphs.precision",
    "exporters.latency.paired",
    "exporters.graphs.export",
    "exporters.validation.parity",
    "exporters.runtimes.unet",
)
TIMED = ("calibrate.json", "slim.json", "export.json", "bench.json", "build.json", "report.html", "manifest.json")
"""Files that hold how long something took, and their hashes."""


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    forks.load("quick_build")
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, forks) -> Path:
    """A folder with the smallest pipeline that can be slimmed and two recipes; everything that a build needs loaded."""
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    folder = tmp_path_factory.mktemp("faults")
    save_pipeline(tiny_pipeline(**SMALLEST), folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    recipe = RECIPE.replace(": tiny", f": {folder / 'tiny'}").replace(": prompts", f": {folder / 'prompts'}")
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "other.yaml").write_text(recipe.replace("8%", "4%"))
    forks.load(*USED)
    return folder


@pytest.fixture(scope="module")
def undisturbed(workshop, forks) -> dict[str, Any]:
    """What a build leaves that nothing happened to, although another one was started beside it."""
    out = workshop / "build"
    first = forks.command(["build", workshop / "recipe.yaml", "--out", out])
    until(lambda: (out / "calibrate").exists())
    second = forks.command(["build", workshop / "recipe.yaml", "--out", out])
    refused, done = second.wait(), first.wait()
    assert refused.code == 2 and f"(process {first.pid}) is at work in {out}" in refused.error, refused.said
    assert done.code == 0, done.said
    return contents(out)


def contents(build: Path) -> dict[str, Any]:
    """What a build holds, apart from times: every file by name, as a hash or as JSON."""
    return {p.relative_to(build).as_posix(): _content(p) for p in sorted(build.rglob("*")) if p.is_file()}


def _content(file: Path) -> Any:
    if file.name not in TIMED:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    if file.name == "report.html":
        return file.read_text().rstrip().endswith("</html>")
    value = json.loads(file.read_text())
    if file.name == "bench.json":
        return sorted(value)
    if file.name == "build.json":
        gates = [(gate["gate"], gate["verdict"]) for gate in value["gates"]]
        sizes = {k: v for k, v in value["figures"].items() if k != "latency_ms"}
        keys = [(stage["name"], stage["key"]) for stage in value["stages"]]
        return [value[k] for k in ("verdict", "exit_code", "made_from", "recipe")] + [gates, sizes, keys]
    if file.name == "manifest.json":
        hashes = {n: None if Path(n).name in TIMED else f["sha256"] for n, f in value["files"].items()}
        return [{k: v for k, v in value["made_from"].items() if k != "seconds"}, value["kind"], hashes]
    return _without_seconds(value)


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if k != "seconds"}
    return value


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if atomic.is_leftover(p.name)]


def whole_stages(build: Path) -> dict[str, str]:
    """The key of every stage that can be seen, each of which is whole."""
    if not build.is_dir():
        return {}
    folders = [p for p in build.iterdir() if p.is_dir() and not p.name.startswith(".")]
    keys = {p.name: manifest.verify_manifest(p)["made_from"]["key"] for p in folders}
    if (build / build_folder.BUILD).exists():
        assert json.loads((build / build_folder.BUILD).read_text())["stages"]
    if (build / build_folder.REPORT).exists():
        assert (build / build_folder.REPORT).read_text().rstrip().endswith("</html>")
    return keys


def finish(forks: Forks, workshop: Path, out: Path, undisturbed: dict[str, Any]) -> None:
    """The next run finishes with the same result, without doing again what was whole."""
    kept = whole_stages(out)
    done = forks.command(["build", workshop / "recipe.yaml", "--out", out, "--json", "--quiet"]).wait()
    assert done.code == 0, done.said
    assert contents(out) == undisturbed
    assert leftovers(out) == []
    stages = json.loads(done.said[done.said.index("\n{\n") if not done.said.startswith("{") else 0 :])["stages"]
    assert {s["name"] for s in stages if s["reused"]} == {s["name"] for s in stages if kept.get(s["name"]) == s["key"]}


# --- every file operation of small writers ------------------------------------------------------------------------


def every_stop(forks: Forks, below: Path, call: str, *args: Any, before: Callable[[], None]) -> Iterator[int]:
    """Kill a function before each of its changes below a folder, one after the other."""
    before()
    counted = forks.run(call, *args, stop={"below": str(below)})
    assert counted.code == 0, counted.said
    changes = int(counted.said.split()[-1])
    assert changes > 3
    for number in range(1, changes + 1):
        before()
        killed = forks.run(call, *args, stop={"below": str(below), "number": number})
        assert killed.code == -signal.SIGKILL, (number, killed.said)
        yield number


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


def test_what_a_living_process_writes_is_left_alone(forks, tmp_path):
    out, go = tmp_path / "out", tmp_path / "go"
    slow = [forks.start("quick_build:replace_folder", out, text, str(go)) for text in ("one", "other")]
    until(lambda: len(list(tmp_path.glob(".out.*/out/b.txt"))) == 2)
    with atomic.replacing(out) as temporary:
        (temporary / "c.txt").write_text("quick")
    assert [p.name for p in out.iterdir()] == ["c.txt"] and len(leftovers(tmp_path)) == 2
    slow[0].kill()
    atomic.clear_leftovers(tmp_path)
    assert len(leftovers(tmp_path)) == 1
    go.touch()
    assert slow[1].wait().code == 0
    assert {p.read_text() for p in out.iterdir()} == {"other"} and leftovers(tmp_path) == []


def test_a_second_build_is_refused_until_the_first_is_killed(forks, tmp_path):
    out, never = tmp_path / "build", tmp_path / "never"
    first = forks.start("quick_build:build", out, "new", str(never))
    until(lambda: (out / ".lock").exists() and leftovers(out))
    second = forks.run("quick_build:build", out, "new")
    assert second.code == 70 and f"another build (process {first.pid}) is at work in {out}" in second.said
    assert leftovers(out)
    first.kill()
    assert forks.run("quick_build:build", out, "new").code == 0 and leftovers(out) == []


@pytest.mark.parametrize("size", [0, 64, 1000])
def test_a_disk_that_takes_no_more_leaves_what_was_there(forks, tmp_path, size):
    out = tmp_path / "build"
    assert forks.run("quick_build:build", out, "old").code == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    failed = forks.run("quick_build:build", out, "new" * 1000, file_size=size)
    assert failed.code == 70 and "File too large" in failed.said
    assert all(p.read_bytes() == content for p, content in before.items()) and leftovers(out) == []
    assert forks.run("quick_build:build", out, "new" * 1000).code == 0


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


# --- the history --------------------------------------------------------------------------------------------------


def test_a_history_with_four_writers_of_whom_two_are_killed(forks, tmp_path):
    file = tmp_path / "h.jsonl"
    writers = [forks.start("quick_build:append", file, n, 10_000 if n < 2 else 60) for n in range(4)]
    until(lambda: file.exists() and file.stat().st_size > 100_000)
    ended = [writer.kill() if n < 2 else writer.wait() for n, writer in enumerate(writers)]
    assert [e.code for e in ended] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    results.append(file, {"writer": 9, "index": 0})
    found, torn = set(), 0
    for line in file.read_text().splitlines():
        try:
            value = json.loads(line)
            found.add((value["writer"], value["index"]))
        except ValueError:
            torn += 1
    told = {tuple(map(int, line.split())) for e in ended for line in e.said.splitlines() if len(line.split()) == 2}
    assert found >= told | {(9, 0)} and torn <= 2
    assert {w for w, _ in found} == {0, 1, 2, 3, 9} and len(told) >= 120


@pytest.mark.parametrize("room", [0, 1, 500, 2999])
def test_a_history_on_a_full_disk_is_as_it_was(forks, tmp_path, room):
    file = tmp_path / "h.jsonl"
    results.append(file, {"index": 0})
    before = file.read_bytes()
    failed = forks.run("quick_build:append", file, 1, 1, file_size=len(before) + room)
    assert failed.code == 70 and "cannot be written (File too large)" in failed.said
    assert file.read_bytes() == before


# --- whole builds of a real model ---------------------------------------------------------------------------------


def test_two_builds_at_once(undisturbed):
    assert undisturbed["build.json"][0] == "pass"  # the fixture has started them


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


@pytest.mark.parametrize("stage", ["calibrate", "slim", pytest.param("export", marks=pytest.mark.slow)])
def test_a_disk_that_is_full(forks, workshop, undisturbed, tmp_path, stage):
    if forks.no_mounts:
        pytest.skip(f"no mounts here: {forks.no_mounts}")
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    build, argv = disk / "build", ["build", workshop / "recipe.yaml", "--out", disk / "build"]
    forks.shell(f"mount -t tmpfs -o size=20m slimdiff-test {disk} && cp -r {workshop}/build {build}")
    forks.shell(f"cat /dev/zero > {disk}/filler 2>/dev/null; truncate -s -200k {disk}/filler")
    failed = forks.command([*argv, "--force", stage]).wait()
    forks.shell(f"cp -r {build} {copy} && rm {disk}/filler")
    assert failed.code == 2 and f"{build}: no space left on the device" in failed.error, failed.said
    assert contents(copy) == undisturbed and leftovers(copy) == []
    done = forks.command(argv).wait()
    assert done.code == 0, done.said
    forks.shell(f"rm -r {copy} && cp -r {build} {copy} && umount {disk}")
    assert contents(copy) == undisturbed


@pytest.mark.parametrize("command", ["build", "finished build", "compress", "calibrate", "bundle", "history"])
def test_a_read_only_folder(forks, workshop, undisturbed, tmp_path, command):
    if forks.no_mounts:
        pytest.skip(f"no mounts here: {forks.no_mounts}")
    folder = tmp_path / "disk"
    shutil.copytree(workshop / "build", folder / "build")
    model, build = workshop / "tiny", folder / "build"
    argv = {
        "build": ["build", workshop / "recipe.yaml", "--out", folder / "new"],
        "finished build": ["build", workshop / "recipe.yaml", "--out", build],
        "compress": ["compress", model, "--reduce", "8%", "--out", folder / "new"],
        "calibrate": ["calibrate", model, "--out", folder / "new.safetensors"],
        "bundle": ["bundle", build, "--target", "edge", "--out", folder / "new"],
        "history": ["bench", model, model, "--history", folder / "new.jsonl"],
    }[command]
    forks.shell(f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")
    failed = forks.command(argv).wait()
    looked = forks.command(["inspect", build]).wait()
    forks.shell(f"umount {folder}")
    assert failed.code == 2 and "cannot be written (it is on a read-only file system)" in failed.error, failed.said
    assert looked.code == 0, looked.said
    assert [p.name for p in folder.iterdir()] == ["build"] and contents(build) == undisturbed


def test_a_calibration_killed_and_two_at_once(forks, workshop, tmp_path):
    out = tmp_path / "s.safetensors"
    argv = ["calibrate", workshop / "tiny", "--prompts", workshop / "prompts.txt", "--samples", "2", "--steps", "1"]
    stop = {"below": str(tmp_path), "event": "os.rename", "ends": "/s.safetensors"}
    killed = forks.command([*argv, "--out", out], stop=stop).wait()
    assert killed.code == -signal.SIGKILL and not out.exists() and leftovers(tmp_path)
    (record,) = (tmp_path / ".s.safetensors.unfinished").glob("*.safetensors")
    record.write_bytes(record.read_bytes()[:100])  # as a power cut may leave it
    first = forks.command([*argv, "--out", out, "--steps", "400"])
    until(lambda: (tmp_path / ".s.safetensors.unfinished" / ".lock").read_text().strip() == str(first.pid))
    second = forks.command([*argv, "--out", out]).wait()
    assert second.code == 2 and f"another calibration (process {first.pid}) is at work in {out}" in second.error
    first.kill()
    assert forks.command([*argv, "--out", out]).wait().code == 0
    assert forks.command([*argv, "--out", tmp_path / "t.safetensors"]).wait().code == 0
    assert out.read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "t.safetensors"]


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
import sys, time
from exporters.latency.pair import Job, Worker
with Worker(Job("x", {path!r}, "onnx", "onnxruntime")) as worker:
    worker.ask("prepare", path={path!r}, kind="onnx", runtime="onnxruntime", batch=2, threads=1)
    worker.send("open", cores=None, warmup=10**9)
    print(worker._process.pid, flush=True)
    time.sleep(600)
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
