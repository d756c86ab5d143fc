"""Running only what comes after a change: what was computed before it is remembered from the unchanged denoiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.denoising.trajectory import Call, predict


@dataclass
class _Run:
    """What is known of a module after a pass: when it began and ended, by counts of a clock, and what it gave."""

    calls: int = 0
    began: int = 0
    ended: int = 0
    second: float = 0.0
    output: Any = None
    versions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Change:
    """A module that computes otherwise for the length of a block."""

    path: str
    made: Callable[[], AbstractContextManager[Any]]


class Replay:
    """One call of a denoiser, remembered, so that a change inside a module runs that module and what follows alone.

    Stages are the denoiser's children and the items of its module lists: blocks, their layers, samplers. What they gave
    is held, by reference, in the denoiser's dtype and on its device. A stage that runs more than once in a call, or
    whose output is changed in place afterwards, always runs again. So do all, should they not give the denoiser's
    output when nothing has changed.

    Attributes:
        output: the denoiser's own output for the call (`predict`).
        seconds: what the call took.
    """

    def __init__(self, denoiser: nn.Module, call: Call, paths: Sequence[str]) -> None:
        """Run the call and remember it.

        Args:
            paths: of the modules that may be changed later.
        """
        self.denoiser, self.call = denoiser, call
        stages = _stages(denoiser)
        self._runs = {path: _Run() for path in (*stages, *paths)}
        clock = iter(range(1_000_000_000))
        handles = []
        for path, run in self._runs.items():
            module = denoiser.get_submodule(path)
            handles.append(module.register_forward_pre_hook(_begin(run, clock)))
            handles.append(module.register_forward_hook(_end(run, clock, keep=path in stages)))
        start = time.perf_counter()
        try:
            self.output = predict(denoiser, call)
        finally:
            for handle in handles:
                handle.remove()
        self.seconds = time.perf_counter() - start
        self._begins = {path: self._runs[path].second - start for path in paths if self._runs[path].calls}
        steady = [
            p for p in stages if self._runs[p].calls == 1 and _versions(self._runs[p].output) == self._runs[p].versions
        ]
        self._steady = {path: self._runs[path] for path in steady}
        self._before: dict[str, dict[str, Any]] = {}
        latest = max(self._begins, key=lambda path: self._begins[path], default=None)
        if latest is not None and not torch.equal(self.predict(latest), self.output):
            self._steady, self._before = {}, {}

    def share(self, path: str) -> float:
        """The share of a call that runs again when the module at a path changes."""
        return 1 - self._begins.get(path, 0.0) / self.seconds if self.before(path) else 1.0

    def before(self, path: str) -> dict[str, Any]:
        """By path, the outputs of the stages that had ended when a module began; none of them lies in another."""
        if path not in self._before:
            run = self._runs[path]
            over = [p for p, other in self._steady.items() if run.calls == 1 and 0 < other.ended < run.began]
            done = set(over)
            self._before[path] = {p: self._steady[p].output for p in over if not done.intersection(_parents(p))}
        return self._before[path]

    @property
    def steady(self) -> list[str]:
        """Paths of the stages that run once, and whose outputs may stand for them."""
        return list(self._steady)

    def held(self) -> dict[str, Any]:
        """Their outputs."""
        return {path: run.output for path, run in self._steady.items()}

    def predict(self, path: str) -> Tensor:
        """The denoiser's output for the call (`predict`), of whose modules the one at a path alone has changed."""
        with _answering(self.denoiser, self.before(path)):
            return predict(self.denoiser, self.call)


class Frontier:
    """Calls of a denoiser whose modules change one after the other, from the first that runs to the last.

    What a call has computed before the module whose turn it is, is held (by reference, on the denoiser's device) and
    not computed again.

    Args:
        paths: of the modules that change.
        most: bytes that may be held: calls beyond run from their beginning.
    """

    def __init__(self, denoiser: nn.Module, calls: Sequence[Call], paths: Sequence[str], most: int) -> None:
        self.denoiser, self.calls, self.most = denoiser, calls, most
        self._stages = Replay(denoiser, calls[0], paths).steady
        self._held: list[dict[str, Any]] = [{} for _ in calls]

    @contextmanager
    def before(self, number: int, path: str) -> Iterator[None]:
        """In this block, the call of this number begins where it has to before the module at a path changes."""
        seen: dict[str, Any] = {}
        begun: list[bool] = []

        def keep(stage: str, _module: nn.Module, _args: Any, output: Any) -> None:
            if not begun:
                seen[stage] = output

        with ExitStack() as stack:
            for stage in self._stages:
                hook = partial(keep, stage)
                stack.callback(self.denoiser.get_submodule(stage).register_forward_hook(hook).remove)
            begin = self.denoiser.get_submodule(path).register_forward_pre_hook(lambda *_: begun.append(True))
            stack.callback(begin.remove)
            stack.enter_context(_answering(self.denoiser, self._held[number]))
            yield
        known = self._held[number] | seen
        found = {p: output for p, output in known.items() if known.keys().isdisjoint(_parents(p))}
        others = sum(_bytes(outputs) for i, outputs in enumerate(self._held) if i != number)
        if others + _bytes(found) <= self.most:
            self._held[number] = found


def held_bytes(denoiser: nn.Module, call: Call, paths: Sequence[str]) -> int:
    """The most that a `Frontier` of these modules holds of one call."""
    stages = Replay(denoiser, call, paths).held()
    return sum(_bytes(output) for path, output in stages.items() if stages.keys().isdisjoint(_parents(path)))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(_bytes(part) for part in value) if isinstance(value, list | tuple) else 0


def _stages(denoiser: nn.Module) -> list[str]:
    """Paths of the denoiser's children, lists opened, and of the items of module lists inside them."""
    lists = {path for path, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)}
    return [p for p, m in denoiser.named_modules() if p and p not in lists and (p.rpartition(".")[0] in lists | {""})]


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _begin(run: _Run, clock: Iterator[int]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        run.calls, run.began, run.second = run.calls + 1, next(clock), time.perf_counter()

    return hook


def _end(run: _Run, clock: Iterator[int], *, keep: bool) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        run.ended = next(clock)
        if keep:
            run.output, run.versions = output, _versions(output)

    return hook


def _versions(value: Any) -> tuple[int, ...]:
    """How often each tensor of an output was changed in place."""
    if isinstance(value, Tensor):
        return (value._version,)
    if isinstance(value, dict):
        value = list(value.values())
    return tuple(v for part in value for v in _versions(part)) if isinstance(value, list | tuple) else ()


@contextmanager
def _answering(denoiser: nn.Module, outputs: dict[str, Any]) -> Iterator[None]:
    """Modules that give what they are said to, and compute nothing, for the length of a block."""
    modules = {path: denoiser.get_submodule(path) for path in outputs}
    own = {path: vars(module).get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.forward = _constant(outputs[path])  # type: ignore[method-assign]
        yield
    finally:
        for path, module in modules.items():
            if own[path] is None:
                del module.forward
            else:
                module.forward = own[path]  # type: ignore


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output
