"""A text encoder other than CLIP in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutput

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
        own = dict(config)
        super().__init__(session, AutoConfig.for_model(own.pop("model_type"), **own))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode tokens `[B, L]`.

        Args:
            attention_mask: `[B, L]`; all ones if not given and the graph takes one.

        Returns:
            `last_hidden_state [B, L, D]` and `hidden_states`, on the device of `input_ids`, in the graph's dtype.

        Raises:
            InputError: for a length that the graph was not exported for, or what it has no input or output for.
        """
        inputs = {"input_ids": input_ids}
        if "attention_mask" in self.session.inputs:
            inputs["attention_mask"] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        elif attention_mask is not None:
            raise InputError(f"{self.session.source} has no input for attention_mask")
        length, takes = input_ids.shape[-1], self.session.inputs["input_ids"][-1]
        if isinstance(takes, int) and length != takes:
            raise InputError(
                f"the prompt has {length} tokens, and {self.session.source} takes {takes}: give that many "
                f"(max_sequence_length={takes}), or export for others (slimdiff export --argument)"
            )
        outputs = {name: value.to(input_ids.device) for name, value in answer(self.session, inputs).items()}
        hidden = [value for name, value in outputs.items() if name.startswith("hidden_states.")]
        if output_hidden_states and not hidden:
            raise InputError(f"{self.session.source} gives no hidden states: export it again (slimdiff export)")
        last = outputs["last_hidden_state"]
        states = (*hidden, last) if output_hidden_states else None
        output = BaseModelOutput(last_hidden_state=last, hidden_states=states)
        return output.to_tuple() if return_dict is False else output
