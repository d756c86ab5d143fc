"""Two processes at once: one waits or is refused, and takes over when the other is killed."""

from __future__ import annotations

import json
import signal

from faults import leftovers
from forks import until

from deploy.history import results
from slimdiff.storage import atomic


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


def test_a_history_with_four_writers_of_whom_two_are_killed(forks, tmp_path):
    file = tmp_path / "h.jsonl"
    writers = [forks.start("quick_build:append", file, n, 10_000 if n < 2 else 60) for n in range(4)]
    until(lambda: file.exists() and all(file.read_text().count(f'"writer": {n},') > 100 for n in (0, 1)))
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


def test_two_builds_at_once(undisturbed):
    assert undisturbed["build.json"][0] == "pass"  # the fixture has started them


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
