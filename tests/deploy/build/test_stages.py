"""The stage engine: nothing done twice, nothing half-written, one build at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deploy.build.stages import Stage, keys, run_stages
from slimdiff.errors import InputError
from slimdiff.storage.lock import locked
from slimdiff.storage.manifest import LOCK


class Chain:
    """Two stages that count how often they run: `first` writes a number, `second` copies it."""

    def __init__(self, folder: Path, number: int = 1):
        self.folder, self.ran = folder, []
        self.number, self.fault = number, None

    def stages(self) -> list[Stage]:
        return [
            Stage("first", Chain.first, settings=lambda chain: {"number": chain.number}),
            Stage("second", Chain.second, needs=("first",)),
            Stage("aside", Chain.aside),
        ]

    def first(self, into: Path) -> None:
        self.ran.append("first")
        (into / "number.txt").write_text(str(self.number))

    def second(self, into: Path) -> None:
        self.ran.append("second")
        (into / "copy.txt").write_text((self.folder / "first" / "number.txt").read_text())
        if self.fault is not None:
            raise self.fault

    def aside(self, into: Path) -> None:
        self.ran.append("aside")
        (into / "aside.txt").write_text("x")

    def run(self, *force: str) -> list[str]:
        self.ran = []
        list(run_stages(self, self.stages(), force))
        return self.ran


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "build")


def test_finished_stages_are_skipped(chain):
    assert chain.run() == ["first", "second", "aside"]
    assert chain.run() == []
    done = list(run_stages(chain, chain.stages()))
    assert all(stage.reused for stage in done)


def test_a_changed_setting_redoes_the_stage_and_what_depends_on_it(chain):
    chain.run()
    chain.number = 2
    assert chain.run() == ["first", "second"]
    assert (chain.folder / "second" / "copy.txt").read_text() == "2"


def test_a_changed_input_changes_the_key():
    one, other = (keys(None, [Stage("a", Chain.first).also_decided_by(file=text)])["a"] for text in ("1", "2"))
    assert one != other and len(one) == 64


def test_a_stage_may_need_all_that_come_before_it(chain):
    def last(_: Chain, into: Path) -> None:
        (into / "last.txt").write_text("x")

    stages = [*chain.stages(), Stage("last", last, needs=None)]
    list(run_stages(chain, stages))
    chain.number = 2
    made = [done.name for done in run_stages(chain, stages, ["aside"]) if not done.reused]
    assert made == ["first", "second", "aside", "last"]


def test_force_redoes_the_stage_and_what_depends_on_it(chain):
    chain.run()
    assert chain.run("first") == ["first", "second"]
    assert chain.run("second") == ["second"]


def test_forcing_an_unknown_stage_names_the_known_ones(chain):
    with pytest.raises(InputError, match="first, second, aside"):
        chain.run("third")


@pytest.mark.parametrize("fault", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failed_stage_leaves_nothing_and_the_next_run_resumes(chain, fault):
    chain.fault = fault
    with pytest.raises(type(fault)):
        chain.run()
    assert sorted(p.name for p in chain.folder.iterdir()) == ["first"]
    chain.fault = None
    assert chain.run() == ["second", "aside"]


def test_a_stage_that_fails_again_keeps_its_old_result(chain):
    chain.run()
    chain.number, chain.fault = 2, ValueError("broken")
    with pytest.raises(ValueError):
        chain.run()
    assert (chain.folder / "second" / "copy.txt").read_text() == "1"


@pytest.mark.parametrize("damage", ["change", "remove", "manifest"])
def test_a_damaged_result_is_made_again(chain, damage):
    chain.run()
    file = chain.folder / "first" / ("manifest.json" if damage == "manifest" else "number.txt")
    file.unlink() if damage == "remove" else file.write_text("damaged")
    assert chain.run() == ["first"]
    assert (chain.folder / "first" / "number.txt").read_text() == "1"


def test_two_builds_in_one_folder_are_refused_naming_the_process(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()}"), locked(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    script = f"""
        import os, sys
        from pathlib import Path
        from slimdiff.storage.lock import locked
        with locked(Path({str(tmp_path)!r})):
            (Path({str(tmp_path)!r}) / ".plan.0123abcd.partial").mkdir()
            os.kill(os.getpid(), 9)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / LOCK).read_text().strip().isdigit()
    (tmp_path / ".kept").write_text("a user's own hidden file")
    with locked(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".kept", LOCK]
