"""What is said of when and by what figures were made."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime, timedelta

from deploy.artifacts.figures import made_now, source_commit


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
