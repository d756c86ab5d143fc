"""A text encoder in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from exporters.runtimes.module import RuntimeModule, answer
from exporters.runtimes.session import Session
from slimdiff.errors import InputError


class LanguageModel(RuntimeModule):
    """Drop-in for a T5EncoderModel and its like.

    Raises:
        InputError: if the session is no such text encoder.
    """

    tensor = "last_hidden_state"

    def __init__(self, session: Session, config: dict[str, Any]):
        if not {"input_ids"} <= set(session.inputs) <= {"input_ids", "attention_mask"}:
            raise InputError(f"{session.source} is no text encoder: its inputs are {', '.join(session.inputs)}")
        super().__init__(session, self.configured(dict(config)))

    def configured(self, config: dict[str, Any]) -> Any:
        """The configuration as transformers has it."""
        return AutoConfig.for_model(config.pop("model_type"), **config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Encode tokens `[B, L]`.

        Args:
            attention_mask: `[B, L]`; all ones if not given and the graph takes one.
            output_hidden_states: give all layers' outputs, too. The last of them is `last_hidden_state`, as in optimum,
                but where a CLIP's graph gives the one before its final norm, as transformers does.

        Returns:
            what transformers gives: `last_hidden_state [B, L, D]`, `hidden_states` and, of CLIP, `text_embeds` or
            `pooler_output`; on the device of `input_ids`, in the graph's dtype.

        Raises:
            InputError: for a length that the graph was not exported for, or what it has no input or output for.
        """
        inputs, source = {"input_ids": input_ids}, self.session.source
        if "attention_mask" in self.session.inputs:
            inputs["attention_mask"] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        elif attention_mask is not None:
            raise InputError(f"{source} has no input for attention_mask")
        length, takes = input_ids.shape[-1], self.session.inputs["input_ids"][-1]
        if isinstance(takes, int) and length != takes:
            raise InputError(
                f"the prompt has {length} tokens, and {source} takes {takes}: give that many (most pipelines by "
                f"max_sequence_length={takes}), or export for others (slimdiff export --argument)"
            )
        found = {name: value.to(input_ids.device) for name, value in answer(self.session, inputs).items()}
        last, hidden = found["last_hidden_state"], None
        if output_hidden_states:
            names = [f"hidden_states.{i}" for i in range(self.config.num_hidden_layers)]
            layers = [found[name] for name in names if name in found]
            if len(layers) < len(names):
                raise InputError(
                    f"{source} has {len(layers)} hidden states of {len(names)}, and the pipeline (clip_skip, for one) "
                    "asks for them: export it again (slimdiff export)"
                )
            hidden = (*layers, found.get(f"hidden_states.{len(names)}", last))
        output = self.output(found, last_hidden_state=last, hidden_states=hidden)
        return output.to_tuple() if return_dict is False else output

    def output(self, found: Mapping[str, Tensor], **states: Any) -> ModelOutput:
        """What the graph gives, by name in `found`, as transformers has it."""
        return BaseModelOutput(**states)
