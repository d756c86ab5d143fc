"""What tests of faults look at: contents apart from times, leftovers, whole stages; and every stop of a writer."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forks import Forks

from deploy.artifacts import build_folder
from slimdiff.storage import atomic, manifest

TIMED = ("calibrate.json", "slim.json", "export.json", "bench.json", "build.json", "report.html", "manifest.json")
"""Files that hold how long something took, and their hashes."""


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
