"""No command ends in a traceback, whatever file or folder it is given."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import refused

ODD: dict[str, bytes] = {
    "empty": b"",
    "empty.json": b"",
    "empty.safetensors": b"",
    "empty.onnx": b"",
    "empty.yaml": b"",
    "empty.tar.zst": b"",
    "text.txt": b"a red circle\n",
    "text.onnx": b"a red circle\n",
    "text.safetensors": b"a red circle, a blue star\n",
    "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
    "broken.json": b"{",
    "list.json": b"[]",
    "null.json": b"null",
    "number.json": b"7",
    "deep.json": b"[" * 100_000,
    "object.json": b"{}",
    "plan.json": b'{"sites": null}',
    "binary.json": b"\xff\xfe\0",
    "long.safetensors": b"\xff" * 8 + b"{",
    "none.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "null.safetensors": b"\x04\0\0\0\0\0\0\0null",
    "archive.tar.zst": b"\x28\xb5\x2f\xfd\0\0",
    "zeros": bytes(4096),
}
MARKS = ("build.json", "unet/model.onnx", "model.onnx", "engine.json", "model_index.json", "statistics.safetensors")
MARKS += ("plan.json", "manifest.json")


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Odd files, and folders that look like each kind but hold odd files."""
    folder = tmp_path_factory.mktemp("odd")
    for name, content in ODD.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    for mark in MARKS:
        for word, content in (("empty", b""), ("list", b"[]"), ("object", b"{}"), ("text", b"x")):
            file = folder / f"{word}-{mark.replace('/', '-')}" / mark
            file.parent.mkdir(parents=True)
            file.write_bytes(content)
    for kind in ("slim-model", "onnx", "engine", "engines", "engine-pipeline", "bundle", "sweep", "build", "else"):
        (folder / f"manifest-{kind}").mkdir()
        manifest = {"schema": 1, "kind": kind, "made_from": {}, "runs_on": {}, "versions": {}, "files": {}}
        (folder / f"manifest-{kind}" / "manifest.json").write_text(json.dumps(manifest))
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2, np.float32)}, folder / "weights.safetensors")
    os.symlink("loop", folder / "loop")
    os.symlink("nowhere", folder / "dangling")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "inspect {}",
        "compress {} --out out --reduce 8%",
        "compress demo --out out --plan {}",
        "compress demo --out out --reduce 8% --statistics {}",
        "calibrate --merge {} --out out",
        "export {} --out out",
        "engine {} --out out",
        "compare {} demo",
        pytest.param("validate {} demo", marks=pytest.mark.slow),
        pytest.param("bench {} {}", marks=pytest.mark.slow),
        pytest.param("bench --history {}", marks=pytest.mark.slow),
        pytest.param("bundle {} --target edge --out out", marks=pytest.mark.slow),
        pytest.param("generate {} --prompt x --out out.png", marks=pytest.mark.slow),
        pytest.param("generate demo --pipeline {} --runtime openvino --prompt x --out out.png", marks=pytest.mark.slow),
        pytest.param("build {}", marks=pytest.mark.slow),
        pytest.param("sweep {} --out out", marks=pytest.mark.slow),
        pytest.param("prompts select {} --count 9 --model demo --out out", marks=pytest.mark.slow),
    ],
)
def test_odd_files_and_folders_are_refused_in_one_line(command, odd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in sorted(odd.iterdir()):
        line = refused([word.replace("{}", str(path)) for word in command.split()], capsys)
        assert len(line) < 1000, line
    assert {p.name for p in tmp_path.iterdir()} <= ({"out"} if command.startswith("sweep") else set())
