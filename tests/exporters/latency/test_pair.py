"""Whether two fresh processes are timed as they run: real graphs in ONNX Runtime."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import count

import numpy as np
import psutil
import pytest

from exporters.latency.pair import Job, Worker, idle_cores, measure_pair
from exporters.latency.worker import noise, timed, warm
from exporters.settings import BenchSettings
from slimdiff.errors import InputError, MissingPackageError, SlimdiffError

pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
QUICK = BenchSettings(rounds=3, warmup=1)


def job(path, runtime="onnxruntime") -> Job:
    return Job("it", str(path), runtime)


@pytest.fixture(scope="module")
def planted(exported, tmp_path_factory):
    from benchmarks.gate_study import plant

    return plant(exported["dense"], tmp_path_factory.mktemp("planted") / "slower", 400)


def test_planted_work_changes_time_and_nothing_else(exported, planted):
    import onnxruntime

    feed = noise({"sample": ((2, 4, 8, 8), "float32"), "encoder_hidden_states": ((2, 7, 32), "float32")}, 2)
    feed["timestep"] = np.array(5)
    answers = [onnxruntime.InferenceSession(str(path)).run(None, feed)[0] for path in (exported["dense"], planted)]
    assert np.abs(answers[0] - answers[1]).max() < 1e-6
    for first in (0, 1):
        pair = measure_pair(job(exported["dense"]), job(planted), QUICK, first=first)
        assert pair.log_ratio > 0.3 and pair.cpu_log_ratio > 0.3
        assert pair.sides[0].title.startswith("ONNX Runtime ") and pair.sides[0].shapes["sample"] == [2, 4, 8, 8]
        for side in pair.sides:
            assert side.first_run_ms > 0 and side.load_ms > 0 and len(side.wall_ms) >= 3
            assert side.peak_memory_bytes is None or side.peak_memory_bytes > 10e6
        if hasattr(os, "sched_getaffinity"):
            assert pair.cores is not None and len(pair.cores) == 1


def test_other_shapes_are_refused(exported):
    with pytest.raises(InputError, match="--batch"):
        measure_pair(job(exported["dense"]), job(exported["dense-open"]), BenchSettings(batch=3))


def test_what_does_not_run_is_told(exported, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="does not load"):
        measure_pair(job(exported["dense"]), job(tmp_path / "model.onnx"), QUICK)


def test_an_absent_provider_is_told(exported):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU here")
    with pytest.raises(MissingPackageError, match="CUDAExecutionProvider"):
        measure_pair(job(exported["dense"]), job(exported["dense"], "onnxruntime-cuda"), QUICK)


def test_a_process_that_dies_is_told_and_none_is_left(exported):
    with pytest.raises(SlimdiffError, match="died .killed"), Worker(job(exported["dense"]), QUICK) as worker:
        worker._process.kill()
        worker.ask("end")
    assert worker._process.poll() is not None


def test_a_worker_ends_with_whoever_started_it(exported):
    with Worker(job(exported["dense"]), QUICK) as worker:
        worker._process.stdin.close()
        assert worker._process.wait(timeout=30) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_the_side_whose_turn_it_is_not_stands_still(exported):
    with Worker(job(exported["dense"]), BenchSettings(threads=2), pauses=True) as worker:
        worker.answer()
        worker.ask("open", cores=None, warmup=1)
        process = psutil.Process(worker._process.pid)
        for _ in range(2):
            deadline = time.monotonic() + 10
            while process.status() != psutil.STATUS_STOPPED:
                assert time.monotonic() < deadline
            spent = process.cpu_times().user
            time.sleep(0.1)
            assert process.cpu_times().user == spent
            assert len(worker.ask("run", count=2)["wall_ms"]) == 2
    assert worker._process.poll() is not None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be kept on cores here")
def test_cores():
    usable = os.sched_getaffinity(0)
    assert set(idle_cores(1)) < usable or len(usable) == 1
    assert set(idle_cores(len(usable))) == usable
    with pytest.raises(InputError, match="--threads"):
        idle_cores(len(usable) + 1)


def test_runs_are_timed_one_by_one():
    seconds = iter([0.02, 0.001, 0.01])
    told = timed(lambda: time.sleep(next(seconds)), 3)
    assert [round(ms, -1) for ms in told["wall_ms"]] == [20, 0, 10] or told["wall_ms"][0] >= 20
    assert max(told["cpu_ms"]) < 10 and len(told["preempted"]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes cannot be kept on a core")
def test_runs_that_share_their_core_are_told():
    usable = os.sched_getaffinity(0)
    spin = f"import os; os.sched_setaffinity(0, [{min(usable)}]); print(1, flush=True)\nwhile True: pass"

    def busy() -> None:
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass

    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        os.sched_setaffinity(0, [min(usable)])
        try:
            assert sum(timed(busy, 6)["preempted"]) >= 5
        finally:
            os.sched_setaffinity(0, usable)
            other.kill()


def test_warm_up_goes_on_while_runs_get_faster():
    runs = count(1)
    times = warm(lambda: time.sleep(0.02 / next(runs)), 3)
    assert len(times) > 6
    assert len(warm(lambda: time.sleep(0.002), 4)) <= 3 * 8
