"""A CLIP text encoder in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput
from transformers.utils import ModelOutput

from exporters.layout import FINAL_NORM, read_config
from exporters.runtimes.language_model import LanguageModel
from exporters.runtimes.module import answer
from exporters.runtimes.session import Session
from slimdiff.errors import InputError


class TextEncoder(LanguageModel):
    """Drop-in for a pipeline's text_encoder or text_encoder_2, a CLIPTextModel with or without projection.

    Raises:
        InputError: if the session is no such text encoder.
    """

    def __init__(self, session: Session, config: dict[str, Any]):
        if set(session.inputs) != {"input_ids"} or "last_hidden_state" not in session.outputs:
            raise InputError(f"{session.source} is no CLIP text encoder: its inputs are {', '.join(session.inputs)}")
        super().__init__(session, config)

    @classmethod
    def open_in(cls, folder: Path, name: str, runtime: str, threads: int | None = None) -> Any:
        """Open the text encoder of that name, CLIP or a `LanguageModel`, by its configuration."""
        kind = cls if "clip" in str(read_config(folder / name).get("model_type", "clip")) else LanguageModel
        return kind.open(folder / name, runtime, threads)

    def configured(self, config: dict[str, Any]) -> CLIPTextConfig:
        return CLIPTextConfig.from_dict(config)

    def output(self, found: Mapping[str, Tensor], **states: Any) -> ModelOutput:
        if "text_embeds" in found:
            return CLIPTextModelOutput(text_embeds=found["text_embeds"], **states)
        return BaseModelOutputWithPooling(pooler_output=found["pooler_output"], **states)

    @cached_property
    def text_model(self) -> Any:
        """Has `final_layer_norm`, which Stable Diffusion puts on the hidden state that `clip_skip` names.

        Raises:
            InputError: if the graph was exported without it.
        """
        if not set(FINAL_NORM) <= set(self.session.outputs):
            raise InputError(
                f"{self.session.source} does not give its final norm: clip_skip needs that, so export it again "
                "(slimdiff export)"
            )
        batch, length = (n if isinstance(n, int) else 1 for n in self.session.inputs["input_ids"])
        found = answer(self.session, {"input_ids": torch.zeros(batch, length, dtype=torch.long)})
        weight, bias = (found[name][0] for name in FINAL_NORM)
        shape, eps = tuple(weight.shape), self.config.layer_norm_eps

        def normalize(x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, shape, weight.to(x), bias.to(x), eps)

        return SimpleNamespace(final_layer_norm=normalize)
