"""Public names of a package, imported when they are first used; nothing but the standard library is loaded for it."""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__` (PEP 562), `__dir__` and `__all__`, of the imports in the `.pyi` beside its `file`."""
    imports = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8")).body
    homes = {n.name: f"{package}.{i.module}" for i in imports if isinstance(i, ast.ImportFrom) for n in i.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted(homes), sorted(homes)
