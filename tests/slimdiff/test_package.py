"""The public names of the package, and what its import costs."""

from __future__ import annotations

import subprocess
import sys

import slimdiff


def test_every_public_name_is_there_and_importing_the_package_loads_no_torch():
    script = (
        "import sys, slimdiff\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(slimdiff.__all__) <= set(dir(slimdiff))\n"
        "slimdiff.PAPERS, slimdiff.show_progress\n"  # the settings page needs no torch either
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert {"Compressor", "Forms", "PAPERS", "compare", "load_pipeline", "show_progress"} <= set(slimdiff.__all__)
    assert all(getattr(slimdiff, name) is not None for name in slimdiff.__all__)
