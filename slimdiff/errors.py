"""What can go wrong for a user, each with the exit code that the command line gives it."""

from __future__ import annotations

import importlib
from types import ModuleType


class SlimdiffError(Exception):
    """A failure that one line explains: what, where, and what would be right."""

    exit_code = 1


class InputError(SlimdiffError):
    """Bad input or usage."""

    exit_code = 2


class MissingPackageError(SlimdiffError):
    """A runtime or package that this step needs is not installed."""

    exit_code = 3


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package where it is used.

    Raises:
        MissingPackageError: naming the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{module} is not usable here ({error}): install it with: pip install 'slimdiff[{extra}]'"
        ) from error
