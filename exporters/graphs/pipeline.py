"""A whole diffusers pipeline in optimum's directory layout, one graph per component."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple
from PIL import Image
from torch import Tensor, nn

from exporters.graphs.export import (
    check_transformer,
    dtype_of,
    export_module,
    export_unet,
    in_precision,
    refuse_scheduled,
    write_config,
)
from exporters.graphs.inputs import latent_size
from exporters.graphs.language_model import export_language_model
from exporters.graphs.steering import check_image_encoder, folders_of
from exporters.graphs.vae import settings_for_unet, tile_call
from exporters.layout import (
    FINAL_NORM,
    INDEX,
    STEERING,
    check_carried,
    components_of,
    exported_entry,
    is_component,
    without_safety_checker,
)
from exporters.settings import ExportSettings
from slimdiff.denoising.sizes import LATENT_UPSCALER, autoencoder_of, pixels_per_latent
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call, denoiser_name, record_calls
from slimdiff.errors import InputError
from slimdiff.loading.steering import check_steered
from slimdiff.loading.transformers_files import write_vocabulary
from slimdiff.progress import bar
from slimdiff.settings import Sampling


def _tokens(_pipeline: Any, _size: tuple[int, int]) -> Tensor:
    return torch.ones(2, 77, dtype=torch.long)  # LDM's pipeline asks its tokenizer for as many


def _features(pipeline: Any, size: tuple[int, int]) -> Tensor:
    return pipeline.feature_extractor([Image.new("RGB", size)] * 2, return_tensors="pt").pixel_values


_NAMED: dict[str, tuple[str, Callable[[Any, tuple[int, int]], Tensor], tuple[str, ...]]] = {
    "LDMBertModel": ("input_ids", _tokens, ("last_hidden_state",)),
    "DPTForDepthEstimation": ("pixel_values", _features, ("predicted_depth",)),
}
"""Of transformers' classes that pipelines call on one tensor: its name, an example (by the pipeline, and width and
height of its images), and the outputs that are read."""

FEW_STEPS = (1, 2, 4, 8)
"""Numbers of steps of a call for export: Runge-Kutta schedulers take four or more, and SCM two alone."""


class _TextEncoder(nn.Module):
    """CLIP with outputs in optimum's order: what the pipeline takes as item 0 comes first, hidden states last.

    Stable Diffusion puts the final norm, which it takes from the encoder, on the hidden state that `clip_skip` names:
    its graph gives that norm's weights, too, once a sample.

    Args:
        last: give the last hidden state before that norm, too. optimum gives it after the norm alone, which is not what
            transformers does.
    """

    def __init__(self, encoder: Any, norm: bool, last: bool = False):
        super().__init__()
        self.text_encoder = encoder
        self.projects = hasattr(encoder, "text_projection")
        self.norm = getattr(encoder, "text_model", encoder).final_layer_norm if norm else None
        self.layers = encoder.config.num_hidden_layers + last

    def names(self) -> list[str]:
        first = ["text_embeds", "last_hidden_state"] if self.projects else ["last_hidden_state", "pooler_output"]
        hidden = [f"hidden_states.{i}" for i in range(self.layers)]
        return first + (list(FINAL_NORM) if self.norm else []) + hidden

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.text_encoder(input_ids, output_hidden_states=True)
        last = found.last_hidden_state
        first = (found.text_embeds, last) if self.projects else (last, found.pooler_output)
        norm = (self.norm.weight, self.norm.bias) if self.norm else ()
        # optimum puts last_hidden_state in place of the last hidden state.
        return (*first, *(weight.expand(len(input_ids), -1) for weight in norm), *found.hidden_states[: self.layers])


class _Transformer(nn.Module):
    """A model of transformers with tensors only, in and out."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]):
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        found = self.model(tensor)
        return tuple(found[name] for name in self.outputs)


class _SafetyChecker(nn.Module):
    """Stable Diffusion's, as far as its verdict: which images are to be black, by scores rounded to thousandths."""

    def __init__(self, checker: nn.Module):
        super().__init__()
        self.safety_checker: Any = checker

    def forward(self, clip_input: Tensor) -> Tensor:
        checker = self.safety_checker
        image = nn.functional.normalize(checker.visual_projection(checker.vision_model(clip_input)[1]))
        special, concepts = (
            image @ nn.functional.normalize(embeds).T - thresholds
            for embeds, thresholds in (
                (checker.special_care_embeds, checker.special_care_embeds_weights),
                (checker.concept_embeds, checker.concept_embeds_weights),
            )
        )
        care = (torch.round(1000 * special).amax(1, keepdim=True) > 0).to(special.dtype)
        return torch.round(1000 * (concepts + 0.01 * care)).amax(1) > 0


@own_torch_state()
def export_pipeline(
    pipeline: DiffusionPipeline,
    folder: Path | str,
    settings: ExportSettings | None = None,
    *,
    call: Call | None = None,
    without: Collection[str] = (),
    vae_tile: int | None = None,
    calibration: Sequence[Call] = (),
) -> list[Path]:
    """Export every component of a pipeline, so that `ORTDiffusionPipeline` loads the folder where optimum has its kind.

    It gives the graphs' files, and of a denoiser in parts (`settings.split`) its folder. What becomes of a component is
    said by its row of `exporters.layout.COMPONENTS`, whose function is called once a graph: with the component, the
    graph's folder, the pipeline, `call` and `settings`.

    Text encoders and VAE are open in the batch always, the denoiser if `settings.dynamic_batch`: with a fixed batch,
    the pipeline makes that many images (half of it with guidance) and no other number. Height and width are those of
    the call, or open with `settings.dynamic_size`. A VAE whose config asks for it (`force_upcast`) stays in float32,
    unless `settings.keep_fp32` names what of it does, and so does a safety checker. optimum itself runs none;
    `slimdiff`'s runtimes do.

    Args:
        pipeline: with a unet or a transformer; not changed.
        folder: gets a subfolder per component and `model_index.json`.
        call: whose shapes the graphs are for; `example_call`'s if not given.
        without: graphs that are not needed: `unet`, `transformer`, `vae_encoder`, ...
        vae_tile: side in pixels of the VAE's graphs, which then make larger images by tiles of that size.
        calibration: recorded calls that int8, which is the UNet's alone, is calibrated on.

    Raises:
        InputError: for a pipeline without a denoiser, or with a component that there is no place for; for a path or
            pattern in `keep_fp32` of no module, and a tile that the VAE cannot have.
        MissingPackageError: without onnx and onnxscript.
    """
    settings, folder = settings or ExportSettings(), Path(folder)
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    refuse_scheduled(denoiser)
    index = named_components(pipeline)
    index = index if settings.safety_checker else without_safety_checker(index)
    check_steered(pipeline)
    check_image_encoder(pipeline)
    check_carried({**index, "_class_name": type(pipeline).__name__}, type(pipeline).__name__)
    call = call or example_call(pipeline, arguments=settings.arguments)
    autoencoder = autoencoder_of(pipeline)
    settings_for_unet(denoiser, autoencoder, settings)
    if "sample" not in call.arguments:
        check_transformer(denoiser, call, settings)
    of_vae = call if vae_tile is None else tile_call(call, vae_tile, autoencoder, settings)
    jobs: dict[str, Callable[[], Path]] = {}
    for name, row in components_of(index).items():
        component = getattr(pipeline, name)
        own = of_vae if component is autoencoder else call
        for part, model in (folders_of(pipeline) if name in STEERING else {name: component}).items():
            for graph in row.folders(part):
                if row.exports and graph not in without:
                    more = {"calibration": calibration} if component is denoiser else {}
                    jobs[graph] = partial(row.load("exports"), model, folder / graph, pipeline, own, settings, **more)
        if not row.exports:
            component.save_pretrained(folder / name)
            write_vocabulary(component, folder / name)
    files = []
    with bar(jobs.items(), name="export", unit="graph") as shown:
        for graph, job in shown:
            shown.set_postfix_str(graph)
            files.append(job())
    (folder / INDEX).write_text(json.dumps(_index(pipeline, index, settings.split), indent=2) + "\n")
    return files


@own_torch_state()
def example_call(
    pipeline: DiffusionPipeline,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    guidance: float = Sampling().guidance,
    arguments: Mapping[str, Any] | None = None,
) -> Call:
    """A denoiser call of this pipeline for export: the first of as few scheduler steps as it takes, on neutral inputs.

    A UNet on images is not run for it: of an export, that would be a large part.

    Args:
        height, width: of the image in pixels; the pipeline's default if not given.
        batch: samples in the denoiser call; if not given, as many as one image takes at that guidance: two with
            classifier-free guidance, one without, as for a model that is distilled for few steps.
        guidance: that the pipeline is used with; see `Sampling.guidance`.
        arguments: more of the pipeline's call, such as `max_sequence_length`.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))

    @wraps(denoiser.forward)
    def zeros(sample: Tensor, *_args: Any, **_kwargs: Any) -> UNet2DConditionOutput:
        return UNet2DConditionOutput(sample.new_zeros(len(sample), denoiser.config.out_channels, *sample.shape[2:]))

    refused: list[InputError] = []
    asked: Any = {"guidance": guidance, "batch": 1} if batch is None else {"guidance": 1.0, "batch": batch}
    whole = Sampling(seed=0, height=height, width=width, arguments=dict(arguments or {}), **asked)
    inputs, sampling = neutral_inputs(pipeline, whole.batch, whole)
    with patch.object(denoiser, "forward", zeros) if isinstance(denoiser, UNet2DConditionModel) else nullcontext():
        for steps in FEW_STEPS:
            try:
                return record_calls(pipeline, inputs, sampling.model_copy(update={"steps": steps}))[0]
            except InputError as error:
                refused.append(error)
    raise refused[0]


def named_components(pipeline: Any) -> dict[str, Any]:
    """A pipeline's `config`, with the components that it has though its config says none: they were put there since."""
    index = dict(pipeline.config)
    parts = {
        name: getattr(pipeline, name, None) for name, entry in index.items() if entry in ((None, None), [None, None])
    }
    return index | {name: _fetch_class_library_tuple(part) for name, part in parts.items() if part is not None}


def export_denoiser(
    unet: Any, folder: Path, pipeline: Any, call: Call, settings: ExportSettings, calibration: Sequence[Call] = ()
) -> Path:
    """The graph of a pipeline's denoiser; see `export_unet`."""
    settings = settings_for_unet(unet, autoencoder_of(pipeline), settings)
    return export_unet(unet, folder, call, settings, scheduler=pipeline.scheduler, calibration=calibration)


def export_text_encoder(encoder: Any, folder: Path, pipeline: Any, call: Call, settings: ExportSettings) -> Path:
    """The graph of a text encoder, in the folder of its name."""
    if not type(encoder).__name__.startswith("CLIP"):
        return export_language_model(encoder, folder, pipeline, settings)
    length = getattr(pipeline, folder.name.replace("text_encoder", "tokenizer")).model_max_length
    norm = getattr(pipeline, "text_encoder_2", None) is None  # SDXL takes hidden states as they are
    last = type(pipeline).__name__ == LATENT_UPSCALER  # which reads it
    wrapped = _TextEncoder(in_precision(encoder, dtype_of(settings)), norm, last)
    inputs = {"input_ids": torch.ones(2, length, dtype=torch.long)}
    open_batch = {"input_ids": {0: "batch"}}
    file = export_module(wrapped, inputs, wrapped.names(), folder, settings, open_batch, "text_encoder.")
    write_config(encoder, folder)
    return file


def export_transformer(model: Any, folder: Path, pipeline: Any, call: Call, settings: ExportSettings) -> Path:
    """The graph of a model of transformers that is called on one tensor, its outputs by their names there."""
    name, example, outputs = _NAMED[type(model).__name__]
    wrapped = _Transformer(in_precision(model, dtype_of(settings)), outputs)
    high, wide = (side * pixels_per_latent(pipeline) for side in latent_size(call.arguments))
    value = example(pipeline, (wide, high))
    inputs = {name: value.to(dtype_of(settings)) if value.is_floating_point() else value}
    file = export_module(wrapped, inputs, list(outputs), folder, settings, {name: {0: "batch"}}, "model.")
    write_config(model, folder)
    return file


def export_safety_checker(checker: Any, folder: Path, _pipeline: Any, _call: Call, settings: ExportSettings) -> Path:
    """The graph of a safety checker, in float32."""
    wrapped = _SafetyChecker(in_precision(checker, torch.float32))
    vision = checker.config.vision_config
    inputs = {"clip_input": torch.randn(2, vision.num_channels, vision.image_size, vision.image_size)}
    open_batch = {"clip_input": {0: "batch"}}
    file = export_module(wrapped, inputs, ["has_nsfw_concepts"], folder, settings, open_batch, "safety_checker.")
    write_config(checker, folder)
    return file


def _index(pipeline: Any, config: Mapping[str, Any], split: bool) -> dict[str, Any]:
    """`model_index.json` as optimum writes it, from a pipeline's `config`: no path of this machine."""
    index = {name: value for name, value in config.items() if name != "_name_or_path"}
    for name, value in index.items():
        if is_component(value):
            index[name] = exported_entry(name, value, split)
    # SDXL notes nowhere that it marks its images, and otherwise would mark them wherever the package for it is.
    marks = {"add_watermarker": pipeline.watermark is not None} if hasattr(pipeline, "watermark") else {}
    return {"_class_name": type(pipeline).__name__, **index, **marks}
