"""The trained models that quality is measured on, each with its captions and its judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import benchmarks
from benchmarks.embedded.card import EVALUATION, EVALUATION_SCENES
from benchmarks.things import evaluate, world
from benchmarks.things import judge as things_judge
from slimdiff import embedded
from slimdiff.embedded import evaluator, scenes
from slimdiff.errors import InputError
from slimdiff.settings import Sampling

THINGS = Path(benchmarks.__file__).parent / "things"
JUDGED = 250
"""Pictures that a judge sees at once."""


class World(ABC):
    """A model's world.

    Attributes:
        model: as `load_pipeline` takes it.
        guidance: that it makes pictures with.
        evaluation: how the pictures that are judged are made; its batch is what a CPU likes.
        sharpest: the attribute that tells methods apart first.
    """

    model: str
    guidance: float
    evaluation: Sampling
    sharpest: str

    @abstractmethod
    def captions(self, count: int, seed: int, *, held_out: bool = False) -> list[str]:
        """Random captions; with `held_out`, ones that training never saw."""

    @abstractmethod
    def choose(self, count: int, device: str) -> list[str]:
        """Draw the held-out captions that the judge will read back, and load it."""

    @abstractmethod
    def hits(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """By attribute, how many of it each caption's picture shows, and how many the caption names: `[N, 2]`."""

    def frechet_distance(self, images: np.ndarray) -> float | None:
        """To as many rendered scenes, where the judge has features for it."""
        return None


class Shapes(World):
    """The embedded model's coloured shapes."""

    model, guidance, evaluation, sharpest = "demo", 5.0, EVALUATION, "shape"

    def captions(self, count: int, seed: int, *, held_out: bool = False) -> list[str]:
        return embedded.captions(count, seed, held_out=held_out)

    def choose(self, count: int, device: str) -> list[str]:
        self.scenes = scenes.sample_scenes(count, EVALUATION_SCENES, held_out=True)
        self.judge, self.rendered = evaluator.load(), scenes.render(self.scenes, 1)
        return [scene.caption() for scene in self.scenes]

    def hits(self, images: np.ndarray) -> dict[str, np.ndarray]:
        rows = evaluator.attribute_hits(self.judge, evaluator.to_tensor(list(images)), self.scenes)
        return {name: np.array([[sum(r[name]), len(r[name])] for r in rows]) for name in evaluator.ATTRIBUTES}

    def frechet_distance(self, images: np.ndarray) -> float | None:
        return evaluator.frechet_distance(self.judge, evaluator.to_tensor(list(images)), self.rendered)


class Things(World):
    """Named things in two styles (`benchmarks.things`)."""

    model, guidance, sharpest = str(THINGS / "model"), evaluate.GUIDANCE, "concept"
    evaluation = Sampling(steps=evaluate.STEPS, guidance=evaluate.GUIDANCE, batch=10, seed=evaluate.SEED + 1_000_000)

    def captions(self, count: int, seed: int, *, held_out: bool = False) -> list[str]:
        return world.captions(world.sample_scenes(count, seed, held=held_out))

    def choose(self, count: int, device: str) -> list[str]:
        file = THINGS / "judge.safetensors"
        if not file.is_file():
            raise InputError(f"{file} is missing: train the model and its judge (python -m benchmarks.things.train)")
        self.judge, self.device = things_judge.load(file).to(device), device
        self.scenes = world.sample_scenes(count, evaluate.SEED, held=True)
        return world.captions(self.scenes)

    def hits(self, images: np.ndarray) -> dict[str, np.ndarray]:
        pictures = evaluator.to_tensor(list(images))
        parts = [
            things_judge.attribute_hits(self.judge, some.to(self.device), own.to(self.device))
            for some, own in zip(pictures.split(JUDGED), self.scenes.split(JUDGED), strict=True)
        ]
        # Attributes of things come in the order of their captions, as many as each has.
        things = (world.things(self.scenes)[..., 0] >= 0).sum(1)
        whose = torch.arange(len(things)).repeat_interleave(things)
        return {name: _counted(torch.cat([p[name] for p in parts]).cpu(), whose) for name in things_judge.ATTRIBUTES}


def _counted(hits: Tensor, whose: Tensor) -> np.ndarray:
    """Hits and how many could be, by picture `[N, 2]`, of hits by thing or by picture."""
    count = int(whose.max()) + 1
    whose = whose if len(hits) == len(whose) else torch.arange(count)
    return torch.stack([torch.bincount(whose, weights, count) for weights in (hits.double(), None)], 1).double().numpy()


WORLDS: dict[str, type[World]] = {"demo": Shapes, "things": Things}
