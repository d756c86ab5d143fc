"""The report, from `build.json` and the results of all other stages."""

from __future__ import annotations

from pathlib import Path

from deploy import report
from deploy.artifacts import build_folder
from deploy.artifacts.hashes import source_hash
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop
from deploy.report.page import write_report


def run(shop: Workshop, folder: Path) -> None:
    write_report(shop.folder, folder / build_folder.REPORT)


STAGE = Stage(
    "report",
    run,
    needs=None,
    settings=lambda shop: shop.recipe.gates.model_dump(),
    inputs=lambda _: {"report": source_hash(Path(report.__file__).parent, "**/*.py", "**/*.j2")},
    kind="report",
)
