"""A whole diffusers pipeline in optimum's directory layout, one graph per component."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from exporters.graphs.export import (
    dtype_of,
    export_module,
    export_unet,
    in_precision,
    in_steps,
    open_size,
    write_config,
)
from exporters.graphs.steering import check_image_encoder, steering_jobs
from exporters.layout import (
    CONFIGURED,
    FINAL_NORM,
    INDEX,
    SAFETY_CHECKER,
    TEXT_ENCODERS,
    VAES,
    check_carried,
    is_component,
    without_safety_checker,
)
from exporters.settings import ExportSettings
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call, denoiser_name, record_calls
from slimdiff.errors import InputError
from slimdiff.loading.steering import check_steered
from slimdiff.loading.transformers_files import write_vocabulary
from slimdiff.progress import bar
from slimdiff.settings import Sampling

_OPTIMUM = "optimum.onnxruntime.modeling_diffusion"
_GRAPHS = {"unet": "ORTUnet", "vae": "ORTVae", "text_encoder": "ORTTextEncoder", "text_encoder_2": "ORTTextEncoder"}

FEW_STEPS = (1, 2, 4, 8)
"""Numbers of steps of a call for export: Runge-Kutta schedulers take four or more, and SCM two alone."""


class _TextEncoder(nn.Module):
    """CLIP with outputs in optimum's order: what the pipeline takes as item 0 comes first, hidden states last.

    Stable Diffusion puts the final norm, which it takes from the encoder, on the hidden state that `clip_skip` names:
    its graph gives that norm's weights, too, once a sample.
    """

    def __init__(self, encoder: Any, norm: bool):
        super().__init__()
        self.text_encoder = encoder
        self.projects = hasattr(encoder, "text_projection")
        self.norm = getattr(encoder, "text_model", encoder).final_layer_norm if norm else None

    def names(self) -> list[str]:
        first = ["text_embeds", "last_hidden_state"] if self.projects else ["last_hidden_state", "pooler_output"]
        hidden = [f"hidden_states.{i}" for i in range(self.text_encoder.config.num_hidden_layers)]
        return first + (list(FINAL_NORM) if self.norm else []) + hidden

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.text_encoder(input_ids, output_hidden_states=True)
        last = found.last_hidden_state
        first = (found.text_embeds, last) if self.projects else (last, found.pooler_output)
        norm = (self.norm.weight, self.norm.bias) if self.norm else ()
        # optimum puts last_hidden_state in place of the last hidden state.
        return (*first, *(weight.expand(len(input_ids), -1) for weight in norm), *found.hidden_states[:-1])


class _VaeDecoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae: Any = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


class _VaeEncoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae: Any = vae

    def forward(self, sample: Tensor) -> Tensor:
        found = self.vae.encode(sample)
        return found.latent_dist.parameters if hasattr(found, "latent_dist") else found.latents


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
    without: Sequence[str] = (),
) -> list[Path]:
    """Export every component of a Stable Diffusion (XL) pipeline, so that `ORTDiffusionPipeline` loads the folder.

    It gives the graphs' files.

    Text encoders and VAE are open in the batch always, the UNet if `settings.dynamic_batch`: with a fixed batch, the
    pipeline makes that many images (half of it with guidance) and no other number. Height and width are those of the
    call, or open with `settings.dynamic_size`. A VAE whose config asks for it (`force_upcast`) stays in float32, and
    so does a safety checker. optimum itself runs none; `slimdiff`'s runtimes do.

    Args:
        pipeline: with a unet, a vae and CLIP text encoders; not changed.
        folder: gets a subfolder per component and `model_index.json`.
        call: whose shapes the graphs are for; `example_call`'s if not given.
        without: graphs that are not needed: `unet`, `vae_encoder`, ...

    Raises:
        InputError: for a pipeline without a unet, with text encoders other than CLIP's, or with a component that there
            is no place for.
        MissingPackageError: without onnx and onnxscript.
    """
    settings, folder = settings or ExportSettings(), Path(folder)
    parts: dict[str, Any] = {n: getattr(pipeline, n, None) for n in (*_GRAPHS, *CONFIGURED, SAFETY_CHECKER)}
    if not isinstance(parts["unet"], nn.Module) or not isinstance(parts["vae"], nn.Module):
        raise InputError(f"{type(pipeline).__name__} has no unet with a vae: only such pipelines are exported to ONNX")
    encoders = {name: parts[name] for name in TEXT_ENCODERS if parts[name] is not None}
    for name, encoder in encoders.items():
        if not type(encoder).__name__.startswith("CLIPTextModel"):
            raise InputError(f"the {name} is a {type(encoder).__name__}: only CLIP text encoders are exported to ONNX")
    index = dict(pipeline.config) if settings.safety_checker else without_safety_checker(pipeline.config)
    check_carried(index, type(pipeline).__name__)
    check_steered(pipeline)
    check_image_encoder(pipeline)
    call = call or example_call(pipeline)
    export = partial(export_unet, scheduler=parts["scheduler"])
    jobs: dict[str, Callable[[], Path]] = {"unet": partial(export, parts["unet"], folder / "unet", call, settings)}
    for name, encoder in encoders.items():
        tokenizer = parts[name.replace("text_encoder", "tokenizer")]
        norm = TEXT_ENCODERS[1] not in encoders  # SDXL takes hidden states as they are
        jobs[name] = partial(_export_text_encoder, encoder, folder / name, tokenizer.model_max_length, norm, settings)
    if is_component(index.get(SAFETY_CHECKER)):
        jobs[SAFETY_CHECKER] = partial(_export_safety_checker, parts[SAFETY_CHECKER], folder / SAFETY_CHECKER, settings)
    jobs |= steering_jobs(pipeline, folder, call, settings)
    jobs |= {name: partial(_export_vae, name, pipeline, folder / name, call, settings) for name in VAES}
    jobs = {name: job for name, job in jobs.items() if name not in without}
    files = []
    with bar(jobs.items(), name="export", unit="graph") as shown:
        for name, job in shown:
            shown.set_postfix_str(name)
            files.append(job())
    for name in CONFIGURED:
        if parts[name] is not None:
            parts[name].save_pretrained(folder / name)
            write_vocabulary(parts[name], folder / name)
    (folder / INDEX).write_text(json.dumps(_index(pipeline, index), indent=2) + "\n")
    return files


@own_torch_state()
def example_call(
    pipeline: DiffusionPipeline,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    guidance: float = Sampling().guidance,
) -> Call:
    """A denoiser call of this pipeline for export: the first of as few scheduler steps as it takes, on neutral inputs.

    A UNet on images is not run for it: of an export, that would be a large part.

    Args:
        height, width: of the image in pixels; the pipeline's default if not given.
        batch: samples in the denoiser call; if not given, as many as one image takes at that guidance: two with
            classifier-free guidance, one without, as for a model that is distilled for few steps.
        guidance: that the pipeline is used with; see `Sampling.guidance`.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))

    @wraps(denoiser.forward)
    def zeros(sample: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor]:
        return (sample.new_zeros(len(sample), denoiser.config.out_channels, *sample.shape[2:]),)

    refused: list[InputError] = []
    asked: Any = {"guidance": guidance, "batch": 1} if batch is None else {"guidance": 1.0, "batch": batch}
    whole = Sampling(seed=0, height=height, width=width, **asked)
    inputs, sampling = neutral_inputs(pipeline, whole.batch, whole)
    with patch.object(denoiser, "forward", zeros) if isinstance(denoiser, UNet2DConditionModel) else nullcontext():
        for steps in FEW_STEPS:
            try:
                return record_calls(pipeline, inputs, sampling.model_copy(update={"steps": steps}))[0]
            except InputError as error:
                refused.append(error)
    raise refused[0]


def _export_text_encoder(encoder: Any, folder: Path, length: int, norm: bool, settings: ExportSettings) -> Path:
    wrapped = _TextEncoder(in_precision(encoder, dtype_of(settings)), norm)
    inputs = {"input_ids": torch.ones(2, length, dtype=torch.long)}
    open_batch = {"input_ids": {0: "batch"}}
    file = export_module(wrapped, inputs, wrapped.names(), folder, settings, open_batch, "text_encoder.")
    write_config(encoder, folder)
    return file


def _export_safety_checker(checker: Any, folder: Path, settings: ExportSettings) -> Path:
    wrapped = _SafetyChecker(in_precision(checker, torch.float32))
    vision = checker.config.vision_config
    inputs = {"clip_input": torch.randn(2, vision.num_channels, vision.image_size, vision.image_size)}
    open_batch = {"clip_input": {0: "batch"}}
    file = export_module(wrapped, inputs, ["has_nsfw_concepts"], folder, settings, open_batch, "safety_checker.")
    write_config(checker, folder)
    return file


def _export_vae(name: str, pipeline: Any, folder: Path, call: Call, settings: ExportSettings) -> Path:
    vae, scale = pipeline.vae, pipeline.vae_scale_factor
    height, width = call.arguments["sample"].shape[-2:]
    if name == "vae_decoder":
        inside, outside, step = "latent_sample", "sample", 1
        example = torch.randn(2, vae.config.latent_channels, height, width)
    else:
        inside, outside, step = "sample", "latent_parameters" if hasattr(vae, "quant_conv") else "latent_sample", scale
        example = torch.randn(2, vae.config.in_channels, height * scale, width * scale)
    opened: dict[int, Any] = {0: "batch"}
    if settings.dynamic_size:
        example = in_steps(example, step)
        opened |= open_size(step)
    dtype = torch.float32 if vae.config.get("force_upcast") else dtype_of(settings)
    cast = in_precision(vae, dtype)
    wrapped = _VaeDecoder(cast) if name == "vae_decoder" else _VaeEncoder(cast)
    file = export_module(wrapped, {inside: example.to(dtype)}, [outside], folder, settings, {inside: opened}, "vae.")
    write_config(vae, folder)
    return file


def _index(pipeline: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """`model_index.json` as optimum writes it, from a pipeline's `config`: no path of this machine."""
    index = {name: value for name, value in config.items() if name != "_name_or_path"}
    for name, value in index.items():
        if is_component(value):
            index[name] = [_OPTIMUM, _GRAPHS[name]] if name in _GRAPHS else list(value)
    # SDXL notes nowhere that it marks its images, and otherwise would mark them wherever the package for it is.
    marks = {"add_watermarker": pipeline.watermark is not None} if hasattr(pipeline, "watermark") else {}
    return {"_class_name": type(pipeline).__name__, **index, **marks}
