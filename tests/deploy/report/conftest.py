"""A build whose report is to be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from reports import fake_build


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return fake_build(tmp_path / "build", pictures=2)
