"""From command-line arguments to settings, with errors that name the flag."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from slimdiff.errors import InputError

if TYPE_CHECKING:
    from slimdiff.settings import PlanSettings

S = TypeVar("S", bound=BaseModel)


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def settings(kind: type[S], args: argparse.Namespace, *names: str, **more: Any) -> S:
    """Settings from the arguments of these names that were given; the rest keeps its default.

    Raises:
        InputError: naming the flag and what would be right.
    """
    values = {**given(**{name: getattr(args, name) for name in names}), **more}
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]) if first["loc"] else kind.__name__
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"--{flag.replace('_', '-')}: {message[:1].lower()}{message[1:]}, got {first['input']!r}"
        ) from error


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """How ranks are chosen, and by which forms: what `deploy.cli.flags.add_calibration` asks for."""
    from slimdiff.settings import PlanSettings  # with torch, which not every command needs

    forms = given(
        centre_keys=False if args.raw_keys else None,
        value_moments=args.value_moments,
        joint_output=False if args.heads_apart else None,
        channels=args.channels,
        constant=False if args.no_constant else None,
        compensate=args.compensate,
    )
    groups = tuple(part.strip() for part in args.groups.split(",")) if args.groups else None
    if groups:
        from slimdiff.groups import fault_in

        if fault := fault_in(groups):
            raise InputError(f"--groups: {fault}")
    return settings(PlanSettings, args, "align", "allocation", forms=forms, **given(groups=groups))
