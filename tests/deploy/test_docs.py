"""Every command of the task pages does what it says, one page after the other, in the order of the page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from deploy.cli import main

DOCS = Path(__file__).parents[2] / "docs"
TINY = {
    # Sizes of a checkpoint, for a model that has none of them.
    "100M": "8%",
    "50M": "4%",
    "--samples 64": "--samples 4 --steps 2",
    "{samples: 64}": "{samples: 4, sampling: {steps: 2, batch: 2}}",
}
PAGES = {"slim-a-checkpoint.md": "my-checkpoint", "build-engines.md": "slim"}
"""A page, and the model that it takes for granted."""
ELSEWHERE = {"bundles.md": "test_bundle", "gate-latency-in-ci.md": "test_bench", "serve-with-triton.md": "test_triton"}
"""Pages whose commands the tests of their own matter run."""


def blocks(page: str) -> list[tuple[str, str]]:
    """The page's fenced blocks: language and text."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for said, meant in TINY.items():
        text = text.replace(said, meant)
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_page_is_tried():
    assert {file.name for file in DOCS.glob("*.md")} == {*PAGES, *ELSEWHERE}
    for page, tests in ELSEWHERE.items():
        assert page in (Path(__file__).parent / f"{tests}.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page, workspace, tmp_path, monkeypatch, slim_directory):
    for module in ("onnxscript", "onnxruntime", "tensorrt_rtx", "polygraphy"):
        pytest.importorskip(module, reason="needs the extras onnx and tensorrt-rtx")
    monkeypatch.chdir(tmp_path)
    (tmp_path / PAGES[page]).symlink_to(slim_directory if PAGES[page] == "slim" else workspace / "tiny")
    (tmp_path / "prompts.txt").write_text((workspace / "prompts.txt").read_text())
    ran = 0
    for language, text in blocks(page):
        if language == "yaml":
            name = re.match(r"# (\S+)\n", text)
            assert name is not None, "a YAML block begins with the name of its file"
            (tmp_path / name[1]).write_text(text)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            command, *arguments = shlex.split(line)
            assert command == "slimdiff", line
            assert main(arguments) == 0, line
            ran += 1
    assert ran >= 5
