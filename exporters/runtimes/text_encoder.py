"""A CLIP text encoder in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from exporters.layout import FINAL_NORM, read_config
from exporters.runtimes.language_model import LanguageModel
from exporters.runtimes.module import RuntimeModule, answer
from exporters.runtimes.session import Session
from slimdiff.errors import InputError


class TextEncoder(RuntimeModule):
    """Drop-in for a pipeline's text_encoder or text_encoder_2, a CLIPTextModel with or without projection.

    Raises:
        InputError: if the session is no such text encoder.
    """

    tensor = "last_hidden_state"

    def __init__(self, session: Session, config: dict[str, Any]):
        if set(session.inputs) != {"input_ids"} or "last_hidden_state" not in session.outputs:
            raise InputError(f"{session.source} is no CLIP text encoder: its inputs are {', '.join(session.inputs)}")
        super().__init__(session, CLIPTextConfig.from_dict(config))
        self.projects = "text_embeds" in session.outputs

    @classmethod
    def open_in(cls, folder: Path, name: str, runtime: str, threads: int | None = None) -> Any:
        """Open the text encoder of that name, CLIP or a `LanguageModel`, by its configuration."""
        kind = cls if "clip" in str(read_config(folder / name).get("model_type", "clip")) else LanguageModel
        return kind.open(folder / name, runtime, threads)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode tokens.

        Args:
            input_ids: `[B, L]`.
            attention_mask: must be None; the graph has no input for it.
            output_hidden_states: give all layers' outputs. The last of them comes before the final norm where the graph
                gives that, as in transformers; elsewhere it is `last_hidden_state`, after the norm, as in optimum.

        Returns:
            what transformers gives: `text_embeds` or `pooler_output`, `last_hidden_state`, `hidden_states`; tensors on
            the device of `input_ids`, in the graph's dtype.

        Raises:
            InputError: for a length that the graph was not exported for, or what it has no input or output for.
        """
        if attention_mask is not None:
            raise InputError(f"{self.session.source} has no input for attention_mask")
        found = {n: t.to(input_ids.device) for n, t in answer(self.session, {"input_ids": input_ids}).items()}
        last, hidden = found["last_hidden_state"], None
        if output_hidden_states:
            names = [f"hidden_states.{i}" for i in range(self.config.num_hidden_layers)]
            layers = [found[name] for name in names if name in found]
            if len(layers) < len(names):
                raise self._lacking(f"has {len(layers)} hidden states of {len(names)}")
            hidden = (*layers, found.get(f"hidden_states.{len(names)}", last))
        if self.projects:
            output = CLIPTextModelOutput(text_embeds=found["text_embeds"], last_hidden_state=last, hidden_states=hidden)
        else:
            pooled = found["pooler_output"]
            output = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=hidden)
        return output.to_tuple() if return_dict is False else output

    @cached_property
    def text_model(self) -> Any:
        """Has `final_layer_norm`, which Stable Diffusion puts on the hidden state that `clip_skip` names.

        Raises:
            InputError: if the graph was exported without it.
        """
        if not set(FINAL_NORM) <= set(self.session.outputs):
            raise self._lacking("does not give its final norm")
        batch, length = (n if isinstance(n, int) else 1 for n in self.session.inputs["input_ids"])
        found = answer(self.session, {"input_ids": torch.zeros(batch, length, dtype=torch.long)})
        weight, bias = (found[name][0] for name in FINAL_NORM)
        shape, eps = tuple(weight.shape), self.config.layer_norm_eps

        def normalize(x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, shape, weight.to(x), bias.to(x), eps)

        return SimpleNamespace(final_layer_norm=normalize)

    def _lacking(self, what: str) -> InputError:
        return InputError(f"{self.session.source} {what}: clip_skip needs that, so export it again (slimdiff export)")
