"""Every scheduler of diffusers and every mode that its configuration offers, as this diffusers has them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import typing
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers.schedulers
from diffusers import DiffusionPipeline, SchedulerMixin

ORDERS = (1, 2, 3)


@cache
def every_scheduler() -> dict[str, type[SchedulerMixin]]:
    """Those that can be imported here, by name: the rest need packages of their own."""
    found: dict[str, type[SchedulerMixin]] = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, f"{diffusers.schedulers.__name__}."):
        try:
            inside = vars(importlib.import_module(module.name))
        except ImportError:
            continue
        kinds = (v for v in inside.values() if inspect.isclass(v) and issubclass(v, SchedulerMixin))
        found |= {kind.__name__: kind for kind in kinds if kind is not SchedulerMixin}
    return dict(sorted(found.items()))


def schedulers_of(pipeline: DiffusionPipeline, run: Callable[[], Any] | None = None) -> dict[str, SchedulerMixin]:
    """The schedulers that a pipeline takes, by name, each with what it shares of the pipeline's configuration.

    Args:
        run: makes an image; those with which that fails in diffusers alone are left out. Without it, these are the
            schedulers that the pipeline's own says are compatible.
    """
    own = pipeline.scheduler
    kinds = every_scheduler().values() if run else {type(own), *own.compatibles}
    found: dict[str, SchedulerMixin] = {}
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        try:
            pipeline.scheduler = kind.from_config(own.config)
            if run:
                run()
            found[kind.__name__] = kind.from_config(own.config)
        except Exception:  # diffusers raises anything for a scheduler that does not fit
            continue
        finally:
            pipeline.scheduler = own
    return found


def modes_of(kind: type[SchedulerMixin]) -> list[dict[str, Any]]:
    """What can be changed in a scheduler's configuration, one key at a time: words, switches and orders.

    Words are those of its signature, or those that its source compares the argument with. What the scheduler refuses at
    once is left out.
    """
    return [mode for mode in _changes(kind) if can_be_made(kind, mode)]


def _changes(kind: type[SchedulerMixin]) -> list[dict[str, Any]]:
    changes = []
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        default = parameter.default
        if name == "self" or default is parameter.empty:
            continue
        if isinstance(default, bool) or "bool" in str(parameter.annotation):
            values: list[Any] = [not default]
        elif name.endswith("_order"):
            values = list(ORDERS)
        else:
            values = sorted({*_literals(parameter.annotation), *_compared(kind)[name]})
        changes += [{name: value} for value in values if value != default]
    return changes


def _literals(annotation: Any) -> list[str]:
    """The words of a `Literal`, optional or not."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [word for part in typing.get_args(annotation) for word in _literals(part)]


@cache
def _compared(kind: type[SchedulerMixin]) -> dict[str, set[str]]:
    """Words that a scheduler's source compares its arguments with, by argument."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, words in re.findall(r'(\w+) (?:==|in|not in) [\[(]?((?:"\w[\w+-]*"(?:, )?)+)', inspect.getsource(kind)):
        found[name].update(re.findall(r'"([^"]+)"', words))
    return found


def can_be_made(kind: type[SchedulerMixin], mode: dict[str, Any]) -> bool:
    """Whether a scheduler needs nothing but these changes of its configuration."""
    try:
        kind(**mode)
    except Exception:
        return False
    return True
