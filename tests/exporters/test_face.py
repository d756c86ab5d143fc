"""The public names of `exporters`: each is there, and none is loaded before it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import exporters


@pytest.mark.parametrize("name", exporters.__all__)
def test_every_public_name_is_what_it_is_called(name):
    found = getattr(exporters, name)
    assert found.__name__ == name and found.__module__.startswith("exporters.") and name in dir(exporters)


def test_no_other_name_is_there():
    with pytest.raises(AttributeError, match="module 'exporters' has no attribute 'train'"):
        exporters.train  # noqa: B018


def test_the_package_and_its_settings_load_no_torch():
    script = (
        "import sys, exporters; exporters.ExportSettings, exporters.EngineSettings, exporters.BenchSettings; "
        "exporters.Runtime, exporters.register; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime')))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(exporters.__file__).parents[1], check=True, timeout=120)
