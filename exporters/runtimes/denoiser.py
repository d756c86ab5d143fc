"""What denoisers in a runtime have in common, and one way to open any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.layout import COMPONENTS, read_config
from exporters.runtimes.module import RuntimeModule
from exporters.runtimes.opening import open_session
from exporters.runtimes.session import Session, Shape
from slimdiff.denoising.trajectory import Call


class GraphDenoiser(RuntimeModule):
    """A denoiser whose graph or engine is open: see `UNet` and `DiffusionTransformer`."""

    def __init__(self, session: Session, config: Any):
        super().__init__(session, config)
        if "hidden_states" in session.inputs or "encoder_hidden_states" not in session.inputs:
            # Pipelines make the noise in this dtype then, and hand it to a VAE that may be in another: as in torch.
            self.dtype = torch.float32
            self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def inputs(self) -> dict[str, Shape]:
        """Shapes of the session's inputs."""
        return self.session.inputs

    @property
    def batch(self) -> int | str:
        """Samples in a call; the name of the open dim where that is open."""
        return self.inputs[self.tensor][0]

    @property
    def latents(self) -> tuple[int | None, int | None]:
        """Height and width of what it denoises; None where it takes any."""
        height, width = (side if isinstance(side, int) else None for side in self.inputs[self.tensor][-2:])
        return height, width

    @torch.no_grad()
    def predict(self, call: Call) -> Tensor:
        """The output for a recorded call, as the model has it, float32 on the CPU."""
        return self(**call.to("cpu"), return_dict=False)[0].float()


def open_denoiser(path: Path | str, runtime: str = "onnxruntime", threads: int | None = None) -> GraphDenoiser:
    """Open a UNet or a transformer, whichever the graph or engine is; see `RuntimeModule.open`.

    Raises:
        InputError: if it is neither.
        MissingPackageError: if the runtime is not here; see `open_session`.
    """
    return denoiser_in(open_session(path, runtime, threads), read_config(path))


def denoiser_in(session: Session, config: dict[str, Any]) -> GraphDenoiser:
    """The denoiser that an open session is of."""
    name = "transformer" if "hidden_states" in session.inputs else "unet"
    row = next(row for row in COMPONENTS if name in row.names)
    denoiser: GraphDenoiser = row.load("opens")(session, config)
    return denoiser
