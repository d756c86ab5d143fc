"""Text encoders other than CLIP (T5, UMT5, BERT, Gemma 2) as graphs, for the calls that their pipeline makes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.graphs.export import dtype_of, export_module, in_precision, write_config
from exporters.settings import ExportSettings
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.denoising.trajectory import denoiser_name, sample_batch, watch_calls
from slimdiff.errors import InputError, SlimdiffError
from slimdiff.settings import Sampling

log = logging.getLogger("slimdiff")
INPUTS = ("input_ids", "attention_mask")


class _LanguageModel(nn.Module):
    """With tensors only: `last_hidden_state`, and the hidden states before it where the pipeline asks for them."""

    def __init__(self, model: nn.Module, names: Sequence[str], layers: int):
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.layers = layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        tensors = (input_ids, attention_mask)[: len(self.names)]
        output = self.model(**dict(zip(self.names, tensors, strict=True)), output_hidden_states=self.layers > 0)
        return (output.last_hidden_state, *(output.hidden_states or ())[: self.layers])


class _Stop(SlimdiffError):
    """Ends a pipeline's call where its denoiser is reached."""


def export_language_model(model: Any, folder: Path, pipeline: Any, settings: ExportSettings) -> Path:
    """The graph of a text encoder, open in the batch, in float32: T5 overflows in half precision.

    Its inputs are `input_ids [B, L]` and, where the pipeline gives one, `attention_mask [B, L]`; its outputs are
    `last_hidden_state [B, L, D]` and, where the pipeline asks for them, `hidden_states.0` and on, as in optimum.
    `settings.arguments`, of the pipeline's call, may say how many tokens a prompt has. That number is open where the
    pipeline itself asks for several: Sana puts an instruction before a prompt, and none before a negative one.
    """
    if dtype_of(settings) != torch.float32:
        log.info("export: the text encoder %s stays in fp32: it overflows in half precision", type(model).__name__)
    calls = encoder_calls(pipeline, model, settings.arguments)
    call, lengths = calls[0], {each["input_ids"].shape[1] for each in calls}
    names = [name for name in INPUTS if call.get(name) is not None]
    layers = model.config.num_hidden_layers if call.get("output_hidden_states") else 0
    inputs = {name: torch.cat([call[name][:1].long()] * 2) for name in names}
    outputs = ["last_hidden_state", *(f"hidden_states.{i}" for i in range(layers))]
    wrapped = _LanguageModel(in_precision(model, torch.float32), names, layers)
    axes: dict[int, Any] = {0: "batch", **({1: torch.export.Dim("tokens", min=2)} if len(lengths) > 1 else {})}
    opened = dict.fromkeys(names, axes)
    file = export_module(wrapped, inputs, outputs, folder, settings, opened, "model.")
    write_config(model, folder)
    return file


def encoder_calls(pipeline: Any, encoder: nn.Module, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a pipeline that guides gives one of its text encoders; the denoiser is not run for it.

    Raises:
        InputError: if the pipeline does not call it, or calls it with more than tokens and their mask.
    """
    calls: list[dict[str, Any]] = []

    def stop(*_: Any) -> None:
        raise _Stop

    inputs, sampling = neutral_inputs(pipeline, 1, Sampling(steps=4, batch=1))
    with ExitStack() as watched:
        watched.enter_context(watch_calls(encoder, calls.append))
        watched.enter_context(getattr(pipeline, denoiser_name(pipeline)).register_forward_pre_hook(stop))
        watched.enter_context(suppress(_Stop))
        sample_batch(pipeline, inputs, [0], sampling.model_copy(update={"arguments": dict(arguments)}))
    kind = type(encoder).__name__
    if not calls:
        raise InputError(f"{type(pipeline).__name__} does not call its {kind}: take it out, or stay in torch")
    tensors = {name for call in calls for name, value in call.items() if isinstance(value, Tensor)}
    if odd := sorted(tensors - set(INPUTS)):
        raise InputError(f"{type(pipeline).__name__} gives its {kind} {', '.join(odd)}: such an encoder stays in torch")
    return calls
