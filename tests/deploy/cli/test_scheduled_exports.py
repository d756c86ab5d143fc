"""Exports by a schedule from the command line: SDXL, and a graph in int8; their images are torch's by the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call
from conftest import BOTH, PROMPTS
from families.images import xl
from PIL import Image

from exporters.graphs.int8_layers import int8_layers
from exporters.graphs.reading import read_graph
from exporters.validation.parity import image_psnr

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

USE = ["--prompt", PROMPTS[0], "--steps", 6, "--guidance", 3]


def image(artifact: Path, out: Path, capsys, *more: Any) -> np.ndarray:
    found = call(["generate", artifact, *USE, "--out", out, *more], capsys)
    assert ("none" in more) == (found["schedule"] is None)
    return np.asarray(Image.open(out).convert("RGB")) / 255


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sdxl_is_exported_by_a_schedule(tmp_path, capsys):
    xl().save_pretrained(tmp_path / "xl")
    BOTH.save(tmp_path / "both.json")
    schedule = ["--schedule", tmp_path / "both.json"]
    found = call(["export", tmp_path / "xl", "--out", tmp_path / "onnx", *schedule], capsys)
    assert "unet/shallow.onnx" in found["graphs"] and found["dynamic"] == "batch"
    full = image(tmp_path / "xl", tmp_path / "a.png", capsys, "--schedule", "none")
    expected = image(tmp_path / "xl", tmp_path / "b.png", capsys, *schedule)
    near = image_psnr(expected, image(tmp_path / "onnx", tmp_path / "c.png", capsys))
    assert near > 45 and image_psnr(full, expected) < near - 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_graph_in_int8_follows_a_schedule(workspace, tmp_path, capsys):
    pytest.importorskip("nncf", reason="int8 needs the extra int8")
    BOTH.save(tmp_path / "both.json")
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n")
    schedule = ["--schedule", tmp_path / "both.json"]
    int8 = ["--precision", "int8", "--int8-error", 0.01, "--prompts", tmp_path / "prompts.txt"]
    found = call(["export", workspace / "tiny", "--out", tmp_path / "onnx", *schedule, *int8], capsys)
    assert found["precision"] == "int8" and "unet/shallow.onnx" in found["graphs"]
    folder = tmp_path / "onnx" / "unet"
    whole, shallow = (set(int8_layers(read_graph(folder / name))) for name in ("model.onnx", "shallow.onnx"))
    assert shallow and shallow < whole
    expected = image(workspace / "tiny", tmp_path / "a.png", capsys, *schedule)
    assert 20 < image_psnr(expected, image(tmp_path / "onnx", tmp_path / "b.png", capsys)) < 90
