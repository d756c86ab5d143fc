"""Long work shows itself: none takes over two seconds in silence."""

from __future__ import annotations

import threading
import time

import pytest

from deploy.artifacts import files, hashes
from deploy.bundle import sources
from exporters.graphs import export
from slimdiff import progress
from slimdiff.calibration import calibrate
from slimdiff.loading import pipelines
from slimdiff.planning import costs, knapsack
from slimdiff.storage import manifest


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "_shown", True)
    monkeypatch.setattr(progress, "AFTER", 0.0)
    for module in (calibrate, manifest):
        monkeypatch.setattr(module, "AFTER", 0.0)


def test_work_without_steps_shows_the_time_that_passed_and_clears_it(at_once, capfd):
    with progress.working("save the model"):
        time.sleep(1.2)
    shown = capfd.readouterr().err
    assert "save the model 00:00" in shown and "save the model 00:01" in shown
    assert not shown.rpartition("\r")[0].rpartition("\r")[2].strip()  # wiped at the end


def test_short_work_shows_nothing_and_an_error_passes(monkeypatch, capfd):
    monkeypatch.setattr(progress, "_shown", True)
    with pytest.raises(KeyError), progress.working("short"):
        raise KeyError
    assert capfd.readouterr().err == ""


def test_hashing_shows_its_bytes(at_once, pipeline, tmp_path, capfd):
    calibrate.weights_hash(pipeline.unet)
    (tmp_path / "weights").write_bytes(b"0" * 1000)
    manifest.write_manifest(tmp_path, "onnx", {})
    shown = capfd.readouterr().err
    assert "hash weights" in shown and "hash files" in shown and "/1.00k" in shown


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (costs.count_macs, "count multiply-accumulates"),
        (costs.mac_costs, "count multiply-accumulates by rank"),
        (knapsack.choose, "choose ranks"),
        (export.export_module, "export to ONNX"),
        (pipelines.load_pipeline, "load the model"),
        (files.save_pipeline, "save the model"),
        (hashes.folder_hash, "hash the model's files"),
        (sources._copy, "copy files"),
    ],
)
def test_work_that_counts_no_steps_shows_its_time(work, name, monkeypatch):
    class Late(threading.Event):
        """Of work that has taken long when it is first looked at."""

        def wait(self, timeout=None):
            return super().wait(timeout) and bool(started)

    started = []
    monkeypatch.setattr(progress, "Event", Late)
    monkeypatch.setattr(progress, "AFTER", 0.0)
    monkeypatch.setattr(progress, "bar", lambda **more: started.append(more["name"]) or progress.tqdm(disable=True))
    with pytest.raises(TypeError):
        work()  # whatever it is asked
    assert started == [name]
