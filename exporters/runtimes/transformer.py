"""A model of transformers that is called on one tensor, in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from transformers.utils import ModelOutput

from exporters.runtimes.module import RuntimeModule, answer
from exporters.runtimes.session import Session
from slimdiff.errors import InputError


class Transformer(RuntimeModule):
    """Drop-in for a component such as LDM's `bert` or a `depth_estimator`, whose graph has its outputs' names.

    Raises:
        InputError: if the session takes more than one tensor.
    """

    def __init__(self, session: Session, config: dict[str, Any]):
        if len(session.inputs) != 1:
            raise InputError(f"{session.source} is no such model: its inputs are {', '.join(session.inputs)}")
        self.tensor = next(iter(session.outputs))  # type: ignore[misc]  # a class's own elsewhere
        super().__init__(session, FrozenDict(config))

    def forward(self, tensor: Tensor, **others: Any) -> ModelOutput:
        """The outputs by name, on the tensor's device, in the graph's dtypes.

        Raises:
            InputError: for a shape that the graph was not exported for, or further arguments.
        """
        if others:
            raise InputError(f"{self.session.source} has no input for {', '.join(others)}")
        found = answer(self.session, {next(iter(self.session.inputs)): tensor})
        return ModelOutput({name: value.to(tensor.device) for name, value in found.items()})
