"""What small changes inside a denoiser do to its output, for many of them at once: random projections, backwards.

A change d of what a module gives moves the output by J d, to first order. For v of independent standard normal numbers
E (v . J d)^2 = |J d|^2 (Hutchinson 1989), and one backward pass from v gives v J of every module: so a few passes
measure all changes, where measuring each alone takes a pass for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.denoising.modules import frozen
from slimdiff.denoising.replay import Change
from slimdiff.denoising.samples import batch_size
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call, map_tensors, output_of, predict
from slimdiff.progress import bar

PASSES = 1.6
"""What a projection takes, over the first pass, in which changed modules run too: the parts between checkpoints run
again, and then backwards."""
KEPT = torch.bfloat16
"""Dtype that changes are held in: its three digits are finer than what a few projections tell."""
SEED = 250_921_498
"""Of the projections. None that pictures are made of: a call's output looks like the noise that its picture began
with, and would not be drawn at random from it."""


class Projection:
    """One call of a denoiser, ready to be differentiated, with what each change does to its own module's output.

    Attributes:
        output: the denoiser's own output for the call (`predict`).
        unseen: changes of which no gradient has come: nothing is known of them.
        seconds: what the call took, and the changed modules beside it.
    """

    def __init__(self, denoiser: nn.Module, call: Call, changes: Mapping[str, Change]) -> None:
        """Run the call, and every change where its module runs; each sees what the module itself was given."""
        self.denoiser, self.changes = denoiser, changes
        self.batch = batch_size(call) or 1
        self._at: dict[str, list[str]] = {}
        for name, change in changes.items():
            self._at.setdefault(change.path, []).append(name)
        self._recording, self._dots = True, dict[str, list[Tensor]]()
        self.unseen = set(changes)
        self._hooks = ExitStack()
        start = time.perf_counter()
        with ExitStack() as failing:
            failing.callback(self.close)
            self._hooks.enter_context(_checkpointed(denoiser))
            self._hooks.enter_context(frozen(denoiser))
            for path in self._at:
                hook = partial(self._see, path)
                module = denoiser.get_submodule(path)
                self._hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
            with torch.enable_grad():
                self._graph = output_of(denoiser, call)
            failing.pop_all()
        self._recording = False
        self.output = self._graph.detach()
        self.seconds = time.perf_counter() - start

    def close(self) -> None:
        """Take every hook off the denoiser."""
        self._hooks.close()

    def squared(self, draws: int, number: int = 0, name: str = "projections") -> dict[str, float]:
        """By change, an estimate of the squared change of the output, summed over it.

        Its relative standard deviation is the square root of 2/n. Here n is the draws, or the draws times the samples
        of the call where a module keeps them apart and they change alike.

        Args:
            draws: backward passes.
            number: of the call, for projections of its own; they are the same in every process.
            name: of the progress bar.
        """
        generator = torch.Generator().manual_seed(SEED + number)
        found = dict.fromkeys(self.changes, 0.0)
        if not self._graph.requires_grad:
            return found
        for left in bar(range(draws - 1, -1, -1), name, "pass"):
            self._dots = {}
            direction = torch.randn(self._graph.shape, generator=generator)
            torch.autograd.backward(self._graph, direction, retain_graph=left > 0)
            self.unseen -= self._dots.keys()
            for change, dots in self._dots.items():
                found[change] += float(_summed(dots).square().sum()) / draws
        return found

    def _see(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook: what the changes do here, and that their gradients are to be seen."""
        if not torch.is_grad_enabled():  # a changed module's own pass
            return None
        given = map_tensors(_differentiable, output)
        if self._recording:
            for name in self._at[path]:
                with torch.no_grad(), self.changes[name].made():
                    other = module(*args, **kwargs)
                for before, after in zip(_tensors(given), _tensors(other), strict=True):
                    before.register_hook(partial(self._project, name, (after - before.detach()).to(KEPT)))
        return given

    def _project(self, name: str, change: Tensor, gradient: Tensor) -> None:
        """A tensor's hook: what a change does to the projected output, by sample if the tensor keeps them apart."""
        products = gradient.float() * change.float()
        apart = len(change) == self.batch
        self._dots.setdefault(name, []).append(products.flatten(1).sum(1) if apart else products.sum().reshape(1))


@own_torch_state()
def project_changes(
    denoiser: nn.Module,
    call: Call,
    changes: Mapping[str, Change],
    draws: int,
    number: int = 0,
    expected: Callable[[float], None] = lambda _seconds: None,
    name: str = "projections",
) -> tuple[dict[str, float], Tensor]:
    """By change, the squared change of the output that it makes alone, estimated; and the output itself.

    Where no gradient comes through, the change is measured by a pass of its own: else it would seem to cost nothing.

    Args:
        draws, number, name: see `Projection.squared`.
        expected: is told how many seconds it takes, when that is known.
    """
    projection = Projection(denoiser, call, changes)
    try:
        expected(draws * PASSES * projection.seconds)
        found = projection.squared(draws, number, name)
    finally:
        projection.close()
    for change in sorted(projection.unseen):
        with changes[change].made():
            found[change] = float((predict(denoiser, call) - projection.output).double().square().sum())
    return found, projection.output


def _summed(dots: list[Tensor]) -> Tensor:
    """Over the tensors of a change: by sample, or all together where one of them does not keep samples apart."""
    if len({len(dot) for dot in dots}) > 1:
        dots = [dot.sum().reshape(1) for dot in dots]
    return torch.stack(dots).double().sum(0)


def _differentiable(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad or not tensor.is_floating_point() else tensor.detach().requires_grad_()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors of a nest that gradients are of."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextmanager
def _checkpointed(denoiser: Any) -> Iterator[None]:
    """A denoiser whose blocks run again on the way back, where diffusers knows how: else it holds all it computes."""
    if not getattr(denoiser, "_supports_gradient_checkpointing", False) or denoiser.is_gradient_checkpointing:
        yield
        return
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()
