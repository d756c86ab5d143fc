"""A diffusion transformer in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from exporters.graphs.inputs import named_inputs
from exporters.layout import EXPORTED_FOR
from exporters.runtimes.denoiser import GraphDenoiser
from exporters.runtimes.module import answer
from exporters.runtimes.session import Session
from slimdiff.errors import InputError


class DiffusionTransformer(GraphDenoiser):
    """Drop-in for a pipeline's transformer: `pipeline.transformer = DiffusionTransformer.open("onnx/transformer")`.

    Takes what a diffusers pipeline gives its transformer, by name or with `hidden_states` first, in any floating-point
    dtype and on any device, and answers in the same.

    Raises:
        InputError: if the session is no transformer.
    """

    tensor = "hidden_states"

    def __init__(self, session: Session, config: dict[str, Any]):
        if not {"hidden_states", "timestep"} <= set(session.inputs):
            raise InputError(
                f"{session.source} is no diffusion transformer: its inputs are {', '.join(session.inputs)}"
            )
        about = config.get(EXPORTED_FOR) or {}
        super().__init__(session, FrozenDict({k: v for k, v in config.items() if k != EXPORTED_FOR}))
        # What pipelines read off the module itself.
        self.num_heads = config.get("num_attention_heads")
        self.inner_dim = (self.num_heads or 0) * (config.get("attention_head_dim") or 0)
        size = about.get("latents") or (None, None)
        self._latents: tuple[int | None, int | None] = (size[0], size[1])

    @property
    def latents(self) -> tuple[int | None, int | None]:
        """Height and width of the latents, before they are packed into tokens."""
        return self._latents

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Nothing is cached between steps: pipelines enter this around every call."""
        yield

    def forward(
        self, hidden_states: Tensor, timestep: Any = None, return_dict: bool = True, **others: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise, or the velocity.

        Args:
            hidden_states: `[B, C, H, W]`, or `[B, tokens, C]`.
            timestep: one for all samples, or one for each.
            others: by the names and places of `exporters.graphs.inputs`; None where the graph has no input for them.

        Returns:
            the output as the model has it, in the dtype of `hidden_states`, on its device.

        Raises:
            InputError: for a shape that the graph was not exported for, or other arguments.
        """
        if timestep is None:
            raise InputError(f"{self.session.source} takes a timestep: one for all samples, or one for each")
        time = torch.as_tensor(timestep).expand(len(hidden_states))
        inputs, unknown = named_inputs({"hidden_states": hidden_states, "timestep": time, **others})
        if unknown := unknown + [name for name in inputs if name not in self.session.inputs]:
            raise InputError(f"{self.session.source} has no input for {', '.join(unknown)}")
        output = next(iter(answer(self.session, inputs).values())).to(hidden_states.device, hidden_states.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
