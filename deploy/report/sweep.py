"""The page of a sweep: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.report.frontier import frontier_charts
from deploy.report.page import environment
from slimdiff.storage.manifest import replacing


def write_page(value: Mapping[str, Any], file: Path) -> None:
    """Write the page of a sweep (the content of `sweep.json`)."""
    page = environment().get_template("sweep.html.j2").render(sweep=value, charts=frontier_charts(value))
    with replacing(file, is_file=True) as temporary:
        temporary.write_text(page, encoding="utf-8")
