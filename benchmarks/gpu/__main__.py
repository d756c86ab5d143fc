"""`python -m benchmarks.gpu`; on a bare machine it says first what is missing."""

from __future__ import annotations

import importlib.util

NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "filelock",
    "numpy",
    "pydantic",
    "safetensors",
    "scipy",
    "tqdm",
)


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"benchmarks.gpu needs {', '.join(missing)}: python -m pip install {' '.join(missing)}")
    from benchmarks.gpu.command import main as measure_cells

    measure_cells()


if __name__ == "__main__":
    main()
