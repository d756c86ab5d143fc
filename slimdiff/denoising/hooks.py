"""Watching modules for the length of a block of code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class Hooks:
    """Puts hooks on modules; `watching` gives one and takes its hooks off again."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def before(self, module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call `see(args, kwargs)` whenever the module is about to run."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args, kwargs)

        self.stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        """Call `see(args, kwargs, output)` whenever the module has run."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(args, kwargs, output)

        self.stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


@contextmanager
def watching() -> Iterator[Hooks]:
    """Hooks on any modules until the block ends, however it ends.

    What `see` raises ends the forward pass and reaches whoever began it.
    """
    with ExitStack() as stack:
        yield Hooks(stack)
