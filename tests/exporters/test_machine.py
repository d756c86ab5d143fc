"""Whether machines are told apart, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import exporters
from exporters import machine
from slimdiff.storage import manifest

ROOT = Path(exporters.__file__).parents[1]


def test_the_machine_has_a_name():
    assert "core" in machine.machine_name() and "\n" not in machine.machine_name()


def test_the_fingerprint_is_json_and_repeats():
    found = machine.fingerprint()
    assert found == machine.fingerprint()
    assert {"id", "cpu", "cores", "memory_gib", "kernel", "governor", "gpus", "versions"} <= set(found)
    assert found["versions"]["numpy"] and json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("part", ["cpu", "memory_gib", "gpus"])
def test_other_hardware_is_another_machine(monkeypatch, part):
    here = machine.fingerprint()["id"]
    monkeypatch.setattr(machine, f"_{part}", lambda: ["another"] if part == "gpus" else 7)
    assert machine.fingerprint()["id"] != here


def test_other_versions_are_the_same_machine(monkeypatch):
    here = machine.fingerprint()
    monkeypatch.setattr(manifest, "versions", lambda _: {"torch": "1.0"})
    assert machine.fingerprint()["id"] == here["id"] and machine.fingerprint() != here


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be kept on cores here")
def test_fewer_usable_cores_are_the_same_machine():
    script = (
        "import os; from exporters.machine import fingerprint, usable_cores; "
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); assert usable_cores() == 1; "
        "print(fingerprint()['id'])"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == machine.fingerprint()["id"]


def test_a_timed_process_needs_no_torch():
    script = (
        "import sys, exporters.latency.worker, exporters.runtimes.ort_session, "
        "exporters.runtimes.openvino_session; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers', 'scipy')))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
